"""Where a run comes from, in MLflow's terms: its program, its commit and its dataset."""

from __future__ import annotations

import getpass
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXTS = {"train": "training", "validation": "validation", "test": "test"}  # split -> MLflow's word for its use


def source_tags() -> dict[str, str]:
    """MLflow's tags for the user, the program and, in a git repository, the commit of the working directory."""
    program = Path(sys.argv[0]).name
    tags = {
        "mlflow.source.name": "wml-ray" if program in ("__main__.py", "wml-ray") else program or "python",
        "mlflow.source.type": "LOCAL",
    }
    with suppress(OSError, KeyError):  # a container whose user has no name
        tags["mlflow.user"] = getpass.getuser()
    with suppress(OSError, subprocess.SubprocessError):  # no git, or no repository
        command = ["git", "rev-parse", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        tags["mlflow.source.git.commit"] = found.stdout.strip()
    return tags


@dataclass(frozen=True)
class DatasetSplit:
    """One split of a dataset as MLflow lists it among the inputs of a run."""

    name: str
    digest: str
    context: str
    source: str
    num_images: int


def dataset_splits(result: Mapping[str, Any]) -> list[DatasetSplit]:
    """The splits that a finished run was trained, validated and tested on.

    The digest covers all that decides which images a split holds: the dataset, the seed and the sizes of the splits;
    for an image folder also its path and resolution.
    """
    config, images = result["config"], result["images"]
    data = config["data"]
    own_folder = [data["root"], data["resolution"]] if data["name"] == "imagefolder" else []
    identity = [data["name"], config["seed"], images, *own_folder]

    def digest(split: str) -> str:
        return hashlib.sha256(json.dumps([*identity, split], sort_keys=True).encode()).hexdigest()[:8]

    source = "scikit-learn" if data["name"] == "digits" else data["root"]
    return [
        DatasetSplit(data["name"], digest(split), context, source, images[split]) for split, context in CONTEXTS.items()
    ]


def num_images(dataset_inputs: Sequence[Any], context: str) -> float:
    """The number of images of the split with this context among MLflow's dataset inputs of a run; NaN if unknown."""
    for dataset_input in dataset_inputs:
        if any(tag.value == context for tag in dataset_input.tags):
            return float(json.loads(dataset_input.dataset.profile)["num_rows"])
    return math.nan
