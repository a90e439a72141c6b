"""The verb `tune` as a function: a study from its space to its report."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from wml_ray.cluster.connect import join_cluster
from wml_ray.cluster.preflight import CheckResult, require_checks, run_checks
from wml_ray.cluster.train import DELIVERY_S, INTERRUPTED_DELIVERY_S
from wml_ray.cluster.tune import run_trials
from wml_ray.config.load import with_values
from wml_ray.data.load import load_dataset
from wml_ray.errors import UserError
from wml_ray.report.study_page import write_study
from wml_ray.search.optuna_study import TrialRecord, open_storage
from wml_ray.search.ratios import Increasing
from wml_ray.search.settings import SearchConfig
from wml_ray.search.space import Space, bounds, check_stop_metric
from wml_ray.search.study import Study
from wml_ray.storage.files import check_storage, read_json, write_json, write_text
from wml_ray.storage.lease import exclusive_access
from wml_ray.storage.paths import to_path
from wml_ray.storage.retry import retry_storage
from wml_ray.tracking.client import check_reachable, explain_connection_errors, is_unreachable, tracking_uri
from wml_ray.tracking.results import StudyRecords, complete_trials, load_study
from wml_ray.tracking.runs import TrackedRun, close_run, finish_run, log_files, open_run
from wml_ray.tracking.tags import KIND_TAG, STUDY_TAG
from wml_ray.training.start import initial_checkpoint

STUDY_FILE = "study.json"


@dataclass(frozen=True)
class StudyResult:
    """A finished study: what MLflow has of it, where its files are, and what could not be delivered to MLflow."""

    study: StudyRecords | None  # None where MLflow lacks something
    folder: Path
    files: list[Path]
    tracked: TrackedRun
    undelivered: int
    trained_now: bool


def tune(
    space: Space,
    search: SearchConfig,
    on_change: Callable[[Study], None] | None = None,
    start: Sequence[Mapping[str, Any]] = (),
    warm_start: Sequence[str] = (),
    verbose: bool = False,
) -> StudyResult:
    """Run a study, or the trials it still lacks, and report on it.

    `start` are points tried before the sampler is asked; `warm_start` names earlier studies whose complete trials the
    sampler learns from. Called again with the same space it continues: finished trials stay, interrupted ones go on
    from their checkpoints, and a larger `search.trials` adds the difference.

    Raises:
        UserError: a mistake in the space, the settings or the config, before the first trial.
    """
    folder = to_path(space.base.run.storage_path) / search.study
    check_stop_metric(search, space)
    check_storage(folder)
    check_reachable(tracking_uri())
    with exclusive_access(folder) as lease:
        begun = _identity(folder)
        _check_same_study(folder, begun, space)
        optuna_storage = open_storage(search.storage, search.study, begun.get("token"))
        earlier = [known for name in dict.fromkeys(warm_start) for known in _earlier_trials(name, search, space)]
        sweep = Study(space, search, folder, begun.get("token") or uuid.uuid4().hex, on_change, lease)
        if sweep.to_do:
            join_cluster(verbose)
            require_checks(space.base, searching=True)
            check_ratios(space)
        if not begun:
            write_json(folder / STUDY_FILE, {"token": sweep.token, **_determinants(space)})
        parent, trains_now = _open(sweep), sweep.to_do > 0
        sweep.publish_to(parent)
        try:
            if trains_now:
                run_trials(sweep, optuna_storage, start, earlier, verbose)
        except BaseException as error:
            _give_up(sweep, parent, error)
            raise
        return _conclude(sweep, parent, trains_now)


def dry_run(space: Space, search: SearchConfig) -> Iterator[CheckResult]:
    """What `tune` looks at before the first trial; nothing is left behind.

    Raises:
        UserError: a mistake in the settings.
    """
    check_stop_metric(search, space)
    yield from run_checks(space.base, searching=True)
    try:
        check_ratios(space)
        yield CheckResult("pruning", True, "every ratio of the space can be reached")
    except UserError as error:
        yield CheckResult("pruning", False, str(error))


def _give_up(sweep: Study, parent: TrackedRun, error: BaseException) -> None:
    """Last words to MLflow of a study that is to be continued."""
    sweep.interrupted()
    sweep.close(INTERRUPTED_DELIVERY_S)
    status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
    close_run(parent, status, reason=str(error).partition("\n")[0] or type(error).__name__)
    sweep.tidy()


def _conclude(sweep: Study, parent: TrackedRun, trained_now: bool) -> StudyResult:
    """The study's best config and its report, in its folder and in MLflow."""
    sweep.tidy()
    undelivered = sweep.close(DELIVERY_S)
    if undelivered:
        return StudyResult(None, sweep.folder, [], parent, undelivered, trained_now)
    best = sweep.best()
    files = []
    if best is not None:
        files = [sweep.folder / "config.yaml"]
        write_text(files[0], sweep.config(best).to_yaml())
    try:
        study = load_study(sweep.search.study, parent.run_id)
        pictures = retry_storage(lambda: write_study(study, sweep.folder / "report"), sweep.folder)
        log_files(parent, pictures, "report")
        tags = {"wml_ray.best_trial": str(best.number) if best else "none"}
        finish_run(parent, "FINISHED", files, tags)
    except Exception as error:
        if isinstance(error, UserError) or is_unreachable():  # it was there a moment ago
            return StudyResult(None, sweep.folder, files, parent, 1, trained_now)
        raise
    return StudyResult(study, sweep.folder, [*files, *pictures], parent, 0, trained_now)


@explain_connection_errors()
def _open(sweep: Study) -> TrackedRun:
    """The study's own run in MLflow, with all that its report will need."""
    space, search = sweep.space, sweep.search
    settings = {key: str(value) for key, value in search.model_dump(exclude={"study", "storage", "trials"}).items()}
    settings["grace_epochs"] = str(search.grace(space.base.optim.epochs))
    about = {"objectives": space.objectives, "searched": space.searched, "settings": settings}
    params = {
        **{f"space.{key}": domain for key, domain in space.describe().items()},
        **{f"objective.{metric}": mode for metric, mode in space.objectives.items()},
        **{f"search.{key}": value for key, value in settings.items()},
    }
    tags = {KIND_TAG: "study", STUDY_TAG: json.dumps(about)}
    parent = open_run(search.study, search.study, sweep.token, params, tags)
    source = sweep.folder / "space.py"
    write_text(source, space.source)
    log_files(parent, [source])
    return parent


def _identity(folder: Path) -> dict[str, Any]:
    """What makes a study this one, and the token by which MLflow and Optuna know it; nothing before it begins."""
    return read_json(folder / STUDY_FILE) or {}


def _check_same_study(folder: Path, begun: Mapping[str, Any], space: Space) -> None:
    for part, now in _determinants(space).items():
        before = begun.get(part, now)
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if keys:
            raise UserError(
                f"study '{folder.name}' was begun with another {part}: {keys[0]} was {before.get(keys[0])} and is now "
                f"{now.get(keys[0])}; name another study with --study, or delete {folder}"
            )
        if list(before) != list(now) and part == "objectives":
            raise UserError(
                f"study '{folder.name}' was begun with its objectives in the order {', '.join(before)}; keep it"
            )


def _determinants(space: Space) -> dict[str, dict[str, Any]]:
    """What every trial of a study has in common; where it runs does not enter."""
    base = space.base.flatten()
    places = ("scale.", "run.", "data.root", "data.download", "data.loader_workers")
    config = {key: value for key, value in base.items() if not key.startswith(places) or key == "run.test_epoch"}
    config = {key: value for key, value in config.items() if key not in space.searched}
    return {"config": config, "space": space.describe(), "objectives": space.objectives}


def check_ratios(space: Space) -> None:
    """Prune once at each end of the ratios' range: what cannot be reached is better known before the first trial.

    Raises:
        UserError: a ratio the space holds is out of reach for a network the space holds.
    """
    extremes: list[dict[str, Any]] = []
    for key, domain in space.domains.items():
        if isinstance(domain, Increasing):
            lowest, highest = [domain.lower] * space.base.num_peers, [domain.upper] * space.base.num_peers
            extremes += [{key: [*lowest[1:], domain.upper]}, {key: highest}]
        elif key.startswith("pruning.ratios."):
            extremes += [{key: value} for value in bounds(domain)]
    networks = [
        [(key, category) for category in domain.categories]
        for key, domain in space.domains.items()
        if key.startswith(("model.", "pruning.")) and hasattr(domain, "categories")
    ]
    if extremes:
        dataset = load_dataset(space.base)
        for network, ratios in product(product(*networks), extremes):
            initial_checkpoint(with_values(space.base, {**dict(network), **ratios}), dataset)


def _earlier_trials(name: str, search: SearchConfig, space: Space) -> list[TrialRecord]:
    """Complete trials of another study on the same data that lie in this space and know its objectives."""
    if name == search.study:
        raise UserError(f"warm_start = '{name}': a study remembers its own trials; name another one, or leave it out")
    known = []
    for row in complete_trials(name, [*space.domains, "data.name"]):
        values = [float(row.get(metric, math.nan)) for metric in space.objectives]
        if any(map(math.isnan, values)) or row["data.name"] != space.base.data.name:
            continue
        try:
            point = space.point(with_values(space.base, {key: _parsed(row[key]) for key in space.domains}))
        except UserError:  # it lies elsewhere
            continue
        known.append(TrialRecord(f"{name}/{row['trial']}", point, "COMPLETE", values, {}))
    if not known:
        raise UserError(f"warm_start = '{name}': none of its complete trials lies in this space; leave it out")
    return known


def _parsed(value: Any) -> Any:
    """Lists come from MLflow as JSON."""
    return json.loads(value) if isinstance(value, str) and value.startswith("[") else value
