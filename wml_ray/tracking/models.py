"""Exported networks in MLflow's model registry, in the onnx flavour."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from wml_ray.errors import UserError, one_line
from wml_ray.settings import NAME
from wml_ray.tracking.client import client_of
from wml_ray.tracking.runs import TrackedRun

REQUIREMENTS = ("mlflow", "onnx", "onnxruntime", "numpy")  # of a process that serves the model
MAX_DESCRIPTION = 5000


@dataclass(frozen=True)
class RegisteredModel:
    """One version of a registered model."""

    name: str
    version: int
    alias: str | None

    @property
    def uri(self) -> str:
        """Its address, by alias if it has one."""
        return f"models:/{self.name}@{self.alias}" if self.alias else f"models:/{self.name}/{self.version}"


def check_names(name: str, alias: str | None) -> None:
    """Check the name of a registered model and an alias, before anything is exported.

    Raises:
        UserError: MLflow would refuse one of them.
    """
    for option, value in (("--name", name), ("--alias", alias)):
        if value is not None and not re.match(NAME, value):
            raise UserError(
                f"{option} {value!r}: use letters, digits, dot, dash and underscore, at most 100, such as digits-small"
            )
    if alias is not None and (alias == "latest" or re.fullmatch(r"v\d+", alias)):
        raise UserError(f"--alias {alias} is reserved by MLflow; use another one, such as champion")


def register_model(
    tracked: TrackedRun, name: str, alias: str | None, files: Sequence[Path], card: Mapping[str, Any], example: Any
) -> RegisteredModel:
    """Register an ONNX file as a new version of the model `name`, with `tracked` as its source run.

    `files` are the ONNX file, then further artifacts. The version has the card as its description; the logged model has
    the signature, `example` as input example, and sizes and accuracies as params and metrics.

    Raises:
        UserError: MLflow refuses it.
    """
    from mlflow.exceptions import MlflowException

    client = client_of(tracked.uri)
    try:
        if not client.search_registered_models(filter_string=f"name = '{name}'"):
            client.create_registered_model(name)
        logged = client.create_logged_model(
            tracked.experiment_id,
            name=f"{card['network']}-{card['format'].replace(' ', '-')}",
            source_run_id=tracked.run_id,
            params={key: str(card[key]) for key in ("title", "format", "data", "params", "macs", "epoch", "run_id")},
            model_type="image classifier",
        )
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            _save(files, folder, card, example)
            client.log_model_artifacts(logged.model_id, str(folder))
        client.finalize_logged_model(logged.model_id, "READY")
        _log_metrics(client, tracked, logged.model_id, card)
        created = client.create_model_version(
            name,
            source=f"models:/{logged.model_id}",
            run_id=tracked.run_id,
            model_id=logged.model_id,
            tags={key: str(card[key]) for key in ("run_id", "network", "epoch", "format")},
            description=_description(files),
        )
        if alias:
            client.set_registered_model_alias(name, alias, created.version)
    except MlflowException as error:
        raise UserError(f"MLflow does not register '{name}': {one_line(error)}") from error
    return RegisteredModel(name, int(created.version), alias)


def _save(files: Sequence[Path], folder: Path, card: Mapping[str, Any], example: Any) -> None:
    """The ONNX flavour's files, with the other files beside them."""
    import mlflow.onnx
    import numpy as np
    import onnx
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    shape = card["input"]["shape"]
    inputs = Schema([TensorSpec(np.dtype(np.uint8), (-1, *shape[1:]), card["input"]["name"])])
    outputs = Schema([TensorSpec(np.dtype(np.float32), (-1, len(card["classes"])), "logits")])
    mlflow.onnx.save_model(
        onnx.load(files[0]),
        str(folder),
        signature=ModelSignature(inputs, outputs),
        input_example={card["input"]["name"]: example},
        pip_requirements=[f"{package}=={version(package)}" for package in REQUIREMENTS],
        save_as_external_data=False,
        metadata={key: card[key] for key in ("title", "classes", "accuracy", "input", "run_id", "network", "epoch")},
    )
    for path in files[1:]:
        shutil.copy(path, folder / path.name)


def _log_metrics(client: Any, tracked: TrackedRun, model_id: str, card: Mapping[str, Any]) -> None:
    """Accuracies of the run, and accuracy, latency and size of the file, as metrics of the logged model."""
    from mlflow.entities import Metric

    found = card["verification"]
    metrics = {f"export/{split}_accuracy": of["value"] for split, of in card["accuracy"].items()}
    metrics |= {"export/file_accuracy": found["accuracy"], "export/bytes": float(found["bytes"])}
    metrics |= {f"export/latency_ms_batch_{size}": value for size, value in found["latency_ms"].items()}
    timestamp_ms = time.time_ns() // 1_000_000
    entities = [
        Metric(key, value, timestamp_ms, card["epoch"], model_id=model_id, run_id=tracked.run_id)
        for key, value in metrics.items()
    ]
    client.log_batch(tracked.run_id, metrics=entities)


def _description(files: Sequence[Path]) -> str:
    """The card, as far as MLflow takes it."""
    cards = [path.read_text() for path in files if path.suffix == ".md"]
    return "".join(cards)[:MAX_DESCRIPTION]
