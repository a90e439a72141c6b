"""Finished runs and studies, read from MLflow as tables."""

from __future__ import annotations

import gc
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from wml_ray.errors import UserError, root_cause
from wml_ray.storage.paths import to_path
from wml_ray.tracking.client import check_reachable, client_of, redacted, tracking_uri
from wml_ray.tracking.origin import num_images
from wml_ray.tracking.runs import TrackedRun, log_files
from wml_ray.tracking.tags import (
    EPOCHS_TAG,
    KIND_TAG,
    PARENT_TAG,
    REASON_TAG,
    RUN_ID_TAG,
    STATE_TAG,
    STUDY_TAG,
    TRIAL_TAG,
    VARIANT_TAG,
)

if TYPE_CHECKING:
    import pandas as pd


def finished_runs(experiment: str) -> pd.DataFrame:
    """The finished runs of an experiment, the highest validation accuracy of the method's prediction first.

    Columns: `run` (its name), `run_id`, `test_images` (their number), every metric under its MLflow name, every param,
    and `peers`, a list of dicts with the keys `peer`, `macs`, `params`, `val`, `test` and, where the method has
    weights, `weight`.

    Raises:
        UserError: there is no such experiment, or no run of it has finished.
    """
    import pandas as pd

    client, experiment_id = _find(experiment)
    runs = _search(client, experiment_id, "attributes.status = 'FINISHED'")
    rows = [
        {
            "run": run.info.run_name,
            "run_id": run.data.tags.get(RUN_ID_TAG, ""),
            "test_images": num_images(run.inputs.dataset_inputs, "test"),
            **_metrics_of(client, run),
            **run.data.params,
        }
        for run in runs
        if "test/accuracy/method" in run.data.metrics  # other programs may log to the experiment too
    ]
    rows = [{**row, "peers": _peers_of(row)} for row in rows]
    if not rows:
        raise UserError(f"experiment '{experiment}' has no finished run yet; wait, or start one with wml-ray train")
    return pd.DataFrame(rows).sort_values("val/accuracy/method", ascending=False, ignore_index=True)


def _metrics_of(client: Any, run: Any) -> dict[str, float]:
    """Metrics of the epoch that was tested, which may be an earlier one than the last."""
    metrics = dict(run.data.metrics)
    if run.data.params.get("run.test_epoch") != "best":
        return metrics
    tested = {entry.step for key in metrics if key.startswith("test/") for entry in _history(client, run, key)}
    for key in metrics:
        if tested and key.startswith(("val/", "weights/")):  # a run that was stopped early has no tested epoch
            metrics[key] = next(entry.value for entry in _history(client, run, key) if entry.step in tested)
    return metrics


def _history(client: Any, run: Any, key: str) -> Any:
    return client.get_metric_history(run.info.run_id, key)


def _peers_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = {"macs": "peers/macs", "params": "peers/params", "val": "val/accuracy", "test": "test/accuracy"}
    names["weight"] = "weights"
    count = sum(key.startswith("test/accuracy/peer") for key in row)
    return [
        {"peer": index}
        | {short: row[f"{name}/peer{index}"] for short, name in names.items() if f"{name}/peer{index}" in row}
        for index in range(count)
    ]


def logged_run_folder(mlflow_run: str) -> Path | None:
    """The folder of a run by the id of its MLflow run; None if MLflow has no such run, or it is none of wml_ray.

    Raises:
        UserError: MLflow does not answer.
    """
    if not re.fullmatch(r"[0-9a-f]{32}", mlflow_run):
        return None
    from mlflow.exceptions import MlflowException

    check_reachable(tracking_uri())
    try:
        data = client_of(tracking_uri()).get_run(mlflow_run).data
    except MlflowException:
        return None
    if RUN_ID_TAG not in data.tags:
        return None
    storage: Path = to_path(data.params["run.storage_path"])
    name: str = data.params["run.name"]
    if TRIAL_TAG in data.tags:
        name = f"{data.params['run.study'].partition('/')[0]}/trials/{int(data.tags[TRIAL_TAG]):04d}"
    return storage / name / str(data.tags[RUN_ID_TAG])


def is_study(experiment: str) -> bool:
    """True if the experiment holds a study.

    Raises:
        UserError: there is no such experiment.
    """
    return bool(_parents(*_find(experiment)))


def load_study(name: str, run_id: str | None = None) -> StudyRecords:
    """Load a study with all its trials: the newest one named `name`, or the one whose MLflow run is `run_id`.

    Raises:
        UserError: there is no such experiment, or it holds no study.
    """
    import pandas as pd

    client, parent, children = _study_runs(name, run_id)
    about = json.loads(parent.data.tags[STUDY_TAG])
    rows = [_trial(client, run, about["searched"]) for run in children]
    compared = {key: about[key] for key in ("variants", "published") if key in about}
    columns = ["trial", "state", "epochs", "reason", "peers", *about["searched"], *about["objectives"]]
    columns += ["variant"] if compared else []
    trials = pd.DataFrame(rows, columns=list(dict.fromkeys([*columns, *(key for row in rows for key in row)])))
    return StudyRecords(name, about["objectives"], about["searched"], about["settings"], trials, **compared)


def attach_report(name: str, files: Sequence[Path]) -> None:
    """Log the report of a study to its run; a failure is a warning, as the server may be read-only."""
    _, parent = _study_run(name)
    tracked = TrackedRun(tracking_uri(), parent.info.experiment_id, parent.info.run_id)
    try:
        log_files(tracked, files, "report")
    except Exception as error:  # the files are on disk in any case
        warnings.warn(f"the report could not be logged to MLflow ({root_cause(error)})", stacklevel=2)


def complete_trials(name: str, keys: Iterable[str]) -> list[dict[str, Any]]:
    """The complete trials of a study: `trial`, the values of the config keys `keys` and all metrics.

    Raises:
        UserError: there is no such study.
    """
    client, _, children = _study_runs(name)
    complete = [run for run in children if run.data.tags.get(STATE_TAG) == "COMPLETE"]
    return [_trial(client, run, keys) for run in complete]


def _study_runs(name: str, run_id: str | None = None) -> tuple[Any, Any, list[Any]]:
    """The client, the run of the study, and the runs of its trials by number."""
    client, parent = _study_run(name, run_id)
    children = _search(client, parent.info.experiment_id, f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'")
    return client, parent, sorted(children, key=lambda run: int(run.data.tags[TRIAL_TAG]))


def _study_run(name: str, run_id: str | None = None) -> tuple[Any, Any]:
    """The client and the run of the study."""
    client, experiment_id = _find(name)
    parents = [run for run in _parents(client, experiment_id) if run_id in (None, run.info.run_id)]
    if not parents:
        raise UserError(f"experiment '{name}' holds no study; start one with wml-ray tune --study {name}")
    return client, parents[0]


def _trial(client: Any, run: Any, keys: Iterable[str]) -> dict[str, Any]:
    tags, metrics = run.data.tags, _metrics_of(client, run)
    complete = tags.get(STATE_TAG) == "COMPLETE"
    return {
        "trial": int(tags[TRIAL_TAG]),
        "state": tags.get(STATE_TAG, "RUNNING"),
        "epochs": int(tags.get(EPOCHS_TAG, 0)),
        "reason": tags.get(REASON_TAG, ""),
        **({"variant": tags[VARIANT_TAG]} if VARIANT_TAG in tags else {}),
        **{key: _value(run.data.params, key) for key in keys},
        **metrics,
        "peers": _peers_of(metrics) if complete else [],
    }


def _value(params: Mapping[str, str], key: str) -> Any:
    """A param as a number or a string; a list, which MLflow stores as one param an entry, as JSON."""
    if key in params:
        return _parsed(params[key])
    entries = {name: text for name, text in params.items() if name.startswith(f"{key}.")}
    if not entries:  # the section of a method that was not chosen, at its defaults
        return None
    return json.dumps([_parsed(entries[f"{key}.{index}"]) for index in range(len(entries))])


def _parsed(text: str) -> Any:
    if text == "None":
        return None
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)  # for YAML, 1e-05 is a string
    except ValueError:
        return yaml.safe_load(text)


def _find(experiment: str) -> tuple[Any, str]:
    uri = tracking_uri()
    check_reachable(uri)
    path = uri.removeprefix("sqlite:///")
    if path != uri and not Path(path).exists():  # the client would create it
        raise UserError(
            f"experiment '{experiment}': the file {path} does not exist; set MLFLOW_TRACKING_URI, or train first"
        )
    client = client_of(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        names = ", ".join(e.name for e in client.search_experiments()) or "none"
        raise UserError(f"experiment '{experiment}' does not exist at {redacted(uri)}; existing experiments: {names}")
    return client, found.experiment_id


def _parents(client: Any, experiment_id: str) -> list[Any]:
    return _search(client, experiment_id, f"tags.`{KIND_TAG}` = 'study'")


def _search(client: Any, experiment_id: str, condition: str) -> list[Any]:
    found, token = [], None
    with _no_garbage_collection():
        while True:
            page = client.search_runs([experiment_id], condition, max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                return found


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Each param of each run is some objects: looking for cycles among them took two thirds of the reading time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True, eq=False)
class StudyRecords:
    """A study as stored in MLflow."""

    name: str
    objectives: dict[str, str]
    """MLflow metric -> "max" or "min", in the order of the space; at least one."""
    searched: dict[str, str]
    """Config key -> "linear", "log" or "choice"."""
    settings: dict[str, str]
    """Sampler, scheduler and other settings of the search, as text."""
    trials: pd.DataFrame
    """One row for each trial, by number: `trial`, `state`, `epochs`, `reason`, the searched keys, every metric under
    its MLflow name (NaN where absent), and `peers`, a list of dicts with the keys `peer`, `macs`, `params`, `val`,
    `test` and, where the method has weights, `weight` (empty unless COMPLETE)."""
    variants: list[str] = field(default_factory=list)
    """Of a comparison: its rows by name, the one that others are compared with first; `trials` then has `variant`."""
    published: str = ""
    """Of a comparison: published accuracies as CSV."""
