"""The verbs as functions: what a run would be, and one run from its config to its result."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wml_ray import preflight, ray_train, report, session, storage, tracking
from wml_ray.checkpoint import Checkpoints
from wml_ray.config import Config, DataMissing, UserError
from wml_ray.costs import count_params
from wml_ray.data import Dataset, ResidentDataset, generator_for, load
from wml_ray.lock import Claim, only_one
from wml_ray.loop import Diverged, Report, check_shares
from wml_ray.memory import training_memory_bytes
from wml_ray.pruning import apply_plan
from wml_ray.readers import image_spec
from wml_ray.storage import patiently, read_json, write_json, write_text
from wml_ray.tracking import TrackedRun


@dataclass(frozen=True)
class Plan:
    """What a run would be."""

    peers: list[dict[str, Any]]
    tree_params: int
    memory_bytes: int  # estimated peak of one worker's training step
    state: str
    images: str


@dataclass(frozen=True)
class Outcome:
    """A finished run: its result, where MLflow has it, and what could not be delivered there."""

    result: dict[str, Any]
    folder: Path
    tracked: TrackedRun
    trained_now: bool
    undelivered: int


def plan(config: Config) -> Plan:
    """Build and prune the tree, and measure it; nothing is trained and nothing is written.

    Raises:
        UserError: as `train`, but for the data: where it is missing, noise stands in for it.
    """
    storage.check(config.run_folder)
    dataset, images = _data_or_noise(config)
    start = session.beginning(config, dataset)
    tree = session.fresh_tree(config, dataset.spec)
    apply_plan(tree, start.plan["channels"])
    tree.load_state_dict(start.model)
    fewest, most = ray_train.worker_range(config)
    check_shares(config, dataset, max(most, 1))
    images_a_worker = -(-config.data.batch_size // max(fewest, 1))
    memory = training_memory_bytes(tree, dataset.spec, images_a_worker, config)
    return Plan(start.plan["peers"], count_params(tree), memory, _state(config), images)


def train(config: Config, on_event: Report) -> Outcome:
    """Train, or resume the same run if it was interrupted, or return the result it has.

    Raises:
        UserError: the user's mistake, found before anything is written.
        Diverged: training turned non-finite; the MLflow run is FAILED and the last good checkpoint stays.
    """
    folder = config.run_folder
    storage.check(folder)
    result = _result(config)
    if result and _identity(folder)["delivered"]:
        return Outcome(result, folder, TrackedRun(**_identity(folder)["tracked"]), False, 0)
    with only_one(folder) as claim:
        result = _result(config)
        return _deliver(config, result) if result else _train(config, on_event, claim)


def _train(config: Config, on_event: Report, claim: Claim) -> Outcome:
    folder = config.run_folder
    tracking.check_reachable(tracking.tracking_uri())
    preflight.check(config)
    session.prepare(config, max(ray_train.worker_range(config)[1], 1), claim)
    write_text(folder / "config.yaml", config.to_yaml())
    tracked = _open(config, _identity(folder)["token"])
    _remember(folder, tracked, delivered=False)
    try:
        undelivered = ray_train.fit(config, tracked, on_event, claim)
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        tracking.close_run(tracked, status, reason=reason)
        if isinstance(error, Diverged):
            raise Diverged(f"{error}; the last good checkpoint is kept in {folder / 'checkpoints'}") from None
        raise
    result = _result(config)
    assert result is not None
    if undelivered == 0:
        undelivered = _publish(folder, tracked, result)
    return Outcome(result, folder, tracked, True, undelivered)


def _deliver(config: Config, result: dict[str, Any]) -> Outcome:
    """The result a run has; what MLflow missed when it finished is delivered now."""
    folder = config.run_folder
    identity = _identity(folder)
    try:
        tracking.check_reachable(tracking.tracking_uri())
    except UserError:  # the result is there all the same
        return Outcome(result, folder, TrackedRun(**identity["tracked"]), False, 1)
    tracked = _open(config, identity["token"])
    tracker = tracking.Tracker(tracked)
    session.deliver(result, tracker.log)
    undelivered = tracker.close(ray_train.DELIVERY_S) or _publish(folder, tracked, result)
    return Outcome(result, folder, tracked, False, undelivered)


def _open(config: Config, token: str) -> TrackedRun:
    tags = {"wml_ray.run_id": config.run_id}
    with tracking.gone_is_a_sentence():
        return tracking.open_run(config.run.name, config.run_id, token, config.flatten(), tags)


def _publish(folder: Path, tracked: TrackedRun, result: dict[str, Any]) -> int:
    """Artifacts and final status; 0, or 1 if MLflow did not take them."""
    files = patiently(lambda: report.write_files(result, folder / "report"), folder)
    if not tracking.close_run(tracked, "FINISHED", [folder / "config.yaml", *files]):
        return 1
    _remember(folder, tracked, delivered=True)
    return 0


def _identity(folder: Path) -> dict[str, Any]:
    """A token drawn when the folder was made: the MLflow run that carries it is this folder's run."""
    path = folder / "run.json"
    identity = read_json(path)
    if identity is None:
        identity = {"token": uuid.uuid4().hex, "tracked": None, "delivered": False}
        write_json(path, identity)
    return identity


def _remember(folder: Path, tracked: TrackedRun, delivered: bool) -> None:
    public = {**vars(tracked), "uri": tracking.shown(tracked.uri)}
    write_json(folder / "run.json", {**_identity(folder), "tracked": public, "delivered": delivered})


def _result(config: Config) -> dict[str, Any] | None:
    return read_json(config.run_folder / session.RESULT)


def _state(config: Config) -> str:
    if _result(config):
        return "finished"
    epochs = Checkpoints(config.run_folder / "checkpoints", 1).epochs()
    return f"epoch {epochs[-1]} of {config.optim.epochs} done" if epochs else "not started"


def _data_or_noise(config: Config) -> tuple[Dataset, str]:
    name = config.data.name
    try:
        return load(config.model_copy(update={"data": config.data.model_copy(update={"download": False})})), name
    except DataMissing:
        spec = image_spec(config.data)
        images = max(config.data.batch_size, config.pruning.saliency_images)
        generator = generator_for(config.seed, "noise")
        pixels = torch.randint(256, (images, *spec.shape), dtype=torch.uint8, generator=generator)
        labels = torch.randint(spec.num_classes, (images,), generator=generator)
        every = torch.arange(images)
        splits = {"train": every, "outer": every, "validation": every, "test": every}
        dataset = ResidentDataset(config, spec, splits, pixels, labels, torch.device("cpu"))  # type: ignore[arg-type]
        return dataset, f"noise, as '{config.data.root}' holds no {name}; widths may differ a little"
