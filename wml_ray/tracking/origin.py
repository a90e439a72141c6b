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


def dataset_inputs(result: Mapping[str, Any]) -> list[Any]:
    """The splits that a finished run was trained, validated and tested on, as MLflow's dataset inputs.

    The digest covers all that decides which images a split holds: the dataset, the seed and the sizes of the splits;
    for an image folder or a set of shards also its path and resolution.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    config, images = result["config"], result["images"]
    data = config["data"]
    own_folder = [data["root"], data["resolution"]] if data["name"] in ("imagefolder", "shards") else []
    identity = [data["name"], config["seed"], images, *own_folder]

    source = json.dumps({"uri": "scikit-learn" if data["name"] == "digits" else data["root"]})
    inputs = []
    for split, context in CONTEXTS.items():
        digest = hashlib.sha256(json.dumps([*identity, split], sort_keys=True).encode()).hexdigest()[:8]
        profile = json.dumps({"num_rows": images[split]})
        dataset = Dataset(data["name"], digest, "local", source, profile=profile)
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
    return inputs


def num_images(dataset_inputs: Sequence[Any], context: str) -> float:
    """The number of images of the split with this context among MLflow's dataset inputs of a run; NaN if unknown."""
    for dataset_input in dataset_inputs:
        if any(tag.value == context for tag in dataset_input.tags):
            return float(json.loads(dataset_input.dataset.profile)["num_rows"])
    return math.nan
