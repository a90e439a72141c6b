"""The verb `register` as a function: a network of a run in MLflow's model registry."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from wml_ray.errors import UserError
from wml_ray.export.network import Network
from wml_ray.storage.files import read_json
from wml_ray.tracking.client import check_reachable, explain_connection_errors, tracking_uri
from wml_ray.tracking.models import RegisteredModel, check_names, register_model
from wml_ray.tracking.runs import TrackedRun
from wml_ray.verbs.export import Exported, export_network


def register(
    network: Network, folder: Path, name: str, alias: str | None = None, int8: bool = False, max_drop: float = 0.02
) -> tuple[RegisteredModel, Exported]:
    """Export a network of the run in `folder` to ONNX, check it, and register it in MLflow as a version of `name`.

    The run's own MLflow run is the source of the version; `alias` is moved to it.

    Raises:
        UserError: as `export_network`; a name is not allowed, the run has no MLflow run, or MLflow does not answer.
    """
    check_names(name, alias)
    tracked = _tracked_run(folder)
    check_reachable(tracked.uri)
    with tempfile.TemporaryDirectory() as temporary:
        exported = export_network(network, "onnx", temporary, int8, max_drop)
        files = [exported.folder / file for file in exported.files]
        example = np.zeros((1, *network.info.spec.shape), np.uint8)
        with explain_connection_errors():
            return register_model(tracked, name, alias, files, exported.card, example), exported


def _tracked_run(folder: Path) -> TrackedRun:
    """The MLflow run of a run's folder, in the store of this process: an address in run.json has no password."""
    record = read_json(folder / "run.json", "restore it", ("tracked",))
    if not record or not record["tracked"]:
        raise UserError(f"{folder} has no MLflow run (run.json); run `wml-ray train` with its config.yaml once more")
    return TrackedRun(**{**record["tracked"], "uri": tracking_uri()})
