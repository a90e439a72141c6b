"""The verb `tune` as a function: a study from its space to its report."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from wml_ray.cluster.connect import join_cluster
from wml_ray.cluster.preflight import CheckResult, require_checks, run_check, run_checks
from wml_ray.cluster.train import DELIVERY_S, INTERRUPTED_DELIVERY_S
from wml_ray.cluster.tune import run_trials
from wml_ray.config.load import with_values
from wml_ray.config.schema import Config
from wml_ray.data.load import load_dataset
from wml_ray.errors import UserError, one_line
from wml_ray.methods.settings import TEACHER_METHODS
from wml_ray.report.study_page import write_study
from wml_ray.report.study_tables import front_markdown
from wml_ray.search.optuna_study import TrialRecord, open_storage
from wml_ray.search.publisher import Publisher
from wml_ray.search.ratios import Increasing
from wml_ray.search.settings import SearchConfig
from wml_ray.search.space import Space, check_stop_metric, decode, extremes
from wml_ray.search.study import Study
from wml_ray.storage.files import check_storage, read_json, write_json, write_text
from wml_ray.storage.lease import exclusive_access
from wml_ray.storage.paths import to_path
from wml_ray.storage.retry import retry_storage
from wml_ray.tracking.client import check_reachable, explain_connection_errors, tracking_uri
from wml_ray.tracking.results import StudyRecords, complete_trials, load_study
from wml_ray.tracking.runs import TrackedRun, close_run, finish_run, log_files, open_run
from wml_ray.tracking.tags import BEST_TRIAL_TAG, KIND_TAG, NOTE_TAG, REASON_TAG, STUDY_TAG
from wml_ray.training.start import initial_checkpoint
from wml_ray.training.teacher import check_teacher
from wml_ray.verbs.progress import StudyProgress

STUDY_FILE = "study.json"


@dataclass(frozen=True)
class StudyResult:
    """A finished study."""

    study: StudyRecords | None
    """The study as read from MLflow; None if MLflow lacks a part of it."""
    folder: Path
    files: list[Path]
    """The best config, if a trial is complete, and the report."""
    tracked: TrackedRun
    undelivered: int
    """Operations that MLflow did not accept; the next start repeats them."""
    trained_now: bool


def tune(
    space: Space,
    search: SearchConfig,
    on_change: Callable[[Study], None] | None = None,
    start: Sequence[Mapping[str, Any]] = (),
    warm_start: Sequence[str] = (),
    verbose: bool = False,
) -> StudyResult:
    """Run a study, or its remaining trials, and write its report.

    `on_change` is called at each change of a trial; without it a live table is shown. `start` are points to try first,
    see `load_start_points`. `warm_start` are names of earlier studies; the sampler learns from their complete trials.
    `verbose` shows Ray's output instead of the live table.

    A second call with the same space continues the study: finished trials stay, interrupted ones resume from their
    checkpoints, and a larger `search.trials` adds trials.

    Raises:
        UserError: a mistake in the space, the settings or the config, before the first trial.
    """
    if on_change is None and not verbose:
        with StudyProgress() as progress:
            return tune(space, search, progress, start, warm_start)
    folder = to_path(space.base.run.storage_path) / search.study
    check_stop_metric(search, space)
    check_storage(folder)
    check_reachable(tracking_uri())
    with exclusive_access(folder) as lease:
        remedy = "delete it: the study continues from its trial files, in a new MLflow run"
        stored = read_json(folder / STUDY_FILE, remedy, ("token", "config", "space", "objectives")) or {}
        _check_same_study(folder, stored, space)
        storage = open_storage(search.storage, search.study, stored.get("token"))
        earlier = [record for name in dict.fromkeys(warm_start) for record in _earlier_trials(name, search, space)]
        study = Study(space, search, folder, stored.get("token") or uuid.uuid4().hex, on_change, lease)
        if study.remaining:
            join_cluster(verbose)
            require_checks(space.base, searching=True)
            check_teachers(space)
            check_ratios(space)
        if not stored:
            for trial in study.trials.values():  # of a study whose file was lost
                trial.delivered = False
            write_json(folder / STUDY_FILE, {"token": study.token, **_fixed_settings(space)})
        trains_now = study.remaining > 0
        publisher = Publisher(study, _open_run(study))
        try:
            if trains_now:
                run_trials(study, storage, start, earlier, verbose)
        except BaseException as error:
            _close_interrupted(study, publisher, error)
            raise
        return _conclude(study, publisher, trains_now)


def dry_run(space: Space, search: SearchConfig) -> Iterator[CheckResult]:
    """Run the checks that `tune` runs before the first trial; nothing is written.

    Raises:
        UserError: a mistake in the settings.
    """
    check_stop_metric(search, space)
    yield from run_checks(space.base, searching=True)
    yield from (run_check("teacher", partial(check_teacher, config)) for config in _with_other_teachers(space))
    yield run_check("pruning", partial(check_ratios, space))


def check_teachers(space: Space) -> None:
    """Check the teacher of each method of the space; that of the base config's method is one of `require_checks`.

    Raises:
        UserError: a teacher cannot be used.
    """
    for config in _with_other_teachers(space):
        check_teacher(config)


def _with_other_teachers(space: Space) -> list[Config]:
    """The base config with each other method of the space that has a teacher."""
    methods = [method for method in space.methods() if method in TEACHER_METHODS and method != space.base.method.name]
    return [with_values(space.base, {"method.name": method}) for method in methods]


def check_ratios(space: Space) -> str:
    """Prune each network of the space once at both ends of the ratios' range; returns the result in words.

    Raises:
        UserError: a ratio of the space cannot be reached by a network of the space.
    """
    ratios: list[dict[str, Any]] = []
    for key, domain in space.domains.items():
        if isinstance(domain, Increasing):
            peers = space.base.num_peers
            ratios += [{key: [domain.lower] * (peers - 1) + [domain.upper]}, {key: [domain.upper] * peers}]
        elif key.startswith("pruning.ratios."):
            ratios += [{key: value} for value in extremes(domain)]
    networks = [
        [(key, choice) for choice in extremes(domain)]
        for key, domain in space.domains.items()
        if not isinstance(domain, Increasing)
        if key.startswith(("model.", "pruning.")) and space.searched[key] == "choice"
    ]
    if ratios:
        dataset = load_dataset(space.base)
        for network, values in product(product(*networks), ratios):
            initial_checkpoint(with_values(space.base, {**dict(network), **values}), dataset)
    return "every ratio of the space can be reached"


def _close_interrupted(study: Study, publisher: Publisher, error: BaseException) -> None:
    """Close the MLflow runs of a study that stops before its end."""
    publisher.interrupt()
    publisher.close(INTERRUPTED_DELIVERY_S)
    status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
    close_run(publisher.parent, status, tags={REASON_TAG: one_line(error, limit=500)})
    study.delete_stopped_checkpoints()


def _conclude(study: Study, publisher: Publisher, trained_now: bool) -> StudyResult:
    """Write the study's best config and its report, also to MLflow."""
    parent, best = publisher.parent, study.best()
    study.delete_stopped_checkpoints()
    undelivered = publisher.close(DELIVERY_S)
    if undelivered:
        return StudyResult(None, study.folder, [], parent, undelivered, trained_now)
    files = []
    if best is not None:
        files = [study.folder / "config.yaml"]
        write_text(files[0], study.config(best).to_yaml())
    try:
        with explain_connection_errors():
            records = load_study(study.search.study, parent.run_id)
            report = retry_storage(lambda: write_study(records, study.folder / "report"), study.folder)
            log_files(parent, report, "report")
            tags = {BEST_TRIAL_TAG: str(best.number) if best else "none", NOTE_TAG: front_markdown(records)}
            best_values = {f"best/{metric}": value for metric, value in study.best_values().items()}
            finish_run(parent, "FINISHED", files, tags, best_values)
    except UserError:  # MLflow stopped responding after `close`
        return StudyResult(None, study.folder, files, parent, 1, trained_now)
    return StudyResult(records, study.folder, [*files, *report], parent, 0, trained_now)


@explain_connection_errors()
def _open_run(study: Study) -> TrackedRun:
    """The study's own run in MLflow, with the data that its report needs."""
    space, search = study.space, study.search
    settings = {key: str(value) for key, value in search.model_dump(exclude={"study", "storage", "trials"}).items()}
    settings["grace_epochs"] = str(search.grace(space.base.optim.epochs))
    about = {"objectives": space.objectives, "searched": space.searched, "settings": settings}
    params = {
        **{f"space.{key}": domain for key, domain in space.describe().items()},
        **{f"objective.{metric}": mode for metric, mode in space.objectives.items()},
        **{f"search.{key}": value for key, value in settings.items()},
    }
    tags = {KIND_TAG: "study", STUDY_TAG: json.dumps(about)}
    parent = open_run(search.study, search.study, study.token, params, tags)
    source = study.folder / "space.py"
    write_text(source, space.source)
    log_files(parent, [source])
    return parent


def _check_same_study(folder: Path, stored: Mapping[str, Any], space: Space) -> None:
    for part, now in _fixed_settings(space).items():
        before = stored.get(part, now)
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed:
            key = changed[0]
            raise UserError(
                f"study '{folder.name}' was started with another {part}: {key} was {before.get(key)} and is now "
                f"{now.get(key)}; choose another study name with --study, or delete {folder}"
            )
        if list(before) != list(now) and part == "objectives":
            raise UserError(
                f"study '{folder.name}' was started with its objectives in the order {', '.join(before)}; keep it"
            )


def _fixed_settings(space: Space) -> dict[str, dict[str, Any]]:
    """The settings that all trials of a study share; those that do not change the trained networks are left out."""
    base = space.base.flatten()
    left_out = ("scale.", "run.", "data.root", "data.download", "data.loader_workers")
    config = {key: value for key, value in base.items() if not key.startswith(left_out) or key == "run.test_epoch"}
    config = {key: value for key, value in config.items() if key not in space.searched}
    return {"config": config, "space": space.describe(), "objectives": space.objectives}


def _earlier_trials(name: str, search: SearchConfig, space: Space) -> list[TrialRecord]:
    """Complete trials of another study on the same data that are inside this space and have its objectives."""
    if name == search.study:
        raise UserError(f"warm_start = '{name}': a study always uses its own trials; name another one, or leave it out")
    records = []
    for row in complete_trials(name, [*space.domains, "data.name"]):
        values = [float(row.get(metric, math.nan)) for metric in space.objectives]
        if any(map(math.isnan, values)) or row["data.name"] != space.base.data.name:
            continue
        try:
            point = space.point(with_values(space.base, {key: decode(row[key]) for key in space.domains}))
        except UserError:  # outside this space
            continue
        records.append(TrialRecord(f"{name}/{row['trial']}", point, "COMPLETE", values, {}))
    if not records:
        raise UserError(f"warm_start = '{name}': none of its complete trials is inside this space; leave it out")
    return records
