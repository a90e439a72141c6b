"""What `tune` and `compare` share: a study from its first checks to its report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wml_ray.cluster.connect import join_cluster
from wml_ray.cluster.preflight import require_checks
from wml_ray.cluster.train import DELIVERY_S, INTERRUPTED_DELIVERY_S
from wml_ray.cluster.tune import run_trials
from wml_ray.errors import UserError, one_line
from wml_ray.search.optuna_study import TrialRecord
from wml_ray.search.publisher import Publisher
from wml_ray.search.space import Space
from wml_ray.search.study import RunningStudy
from wml_ray.storage.files import check_storage, read_json, write_json, write_text
from wml_ray.storage.lease import Lease, exclusive_access
from wml_ray.storage.paths import to_path
from wml_ray.storage.retry import retry_storage
from wml_ray.tracking.client import check_reachable, explain_connection_errors, tracking_uri
from wml_ray.tracking.results import StudyRecords, load_study
from wml_ray.tracking.runs import TrackedRun, close_run, finish_run, log_files, open_run, set_tags
from wml_ray.tracking.tags import BEST_TRIAL_TAG, KIND_TAG, NOTE_TAG, REASON_TAG, STUDY_TAG

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

STUDY_FILE = "study.json"
STUDY_FILE_REMEDY = "delete it: the study continues from its trial files, in a new MLflow run"


@dataclass(frozen=True)
class Study:
    """A finished study."""

    study: StudyRecords | None
    """The study as read from MLflow; None if MLflow lacks a part of it."""
    folder: Path
    files: list[Path]
    """The best config of a search, if a trial is complete, and the report."""
    tracked: TrackedRun
    undelivered: int
    """Operations that MLflow did not accept; the next start repeats them."""
    trained_now: bool


@dataclass(frozen=True)
class StudyKind:
    """In what a search and a comparison differ."""

    fixed: Mapping[str, Any]
    """The parts of study.json that a later start of the study must repeat."""
    settings: Mapping[str, str]
    """Of the report, and params of the study's run in MLflow."""
    about: Mapping[str, Any]
    """What the report needs, beside objectives, searched keys and settings."""
    source_name: str
    """The file with the text of the space."""
    check: Callable[[], object]
    """Raises UserError before the first trial if a trial would fail."""
    write_report: Callable[[StudyRecords, Path], list[Path]]
    note: Callable[[StudyRecords], str]
    """The description of the study's run in MLflow, as Markdown."""
    has_best: bool
    """A best trial is the result."""


@contextmanager
def study_folder(space: Space, search_name: str) -> Iterator[tuple[Path, Lease, dict[str, Any]]]:
    """The folder of a study, the lease on it, and its study.json, which is empty before the first start.

    Raises:
        UserError: the storage or MLflow cannot be used, or another process works in the folder.
    """
    folder = to_path(space.base.run.storage_path) / search_name
    check_storage(folder)
    check_reachable(tracking_uri())
    with exclusive_access(folder) as lease:
        yield folder, lease, read_json(folder / STUDY_FILE, STUDY_FILE_REMEDY, ("token",)) or {}


def run_study(
    study: RunningStudy,
    kind: StudyKind,
    storage: BaseStorage,
    start: Sequence[Mapping[str, Any]] = (),
    earlier: Sequence[TrialRecord] = (),
    verbose: bool = False,
) -> Study:
    """Run the remaining trials and write the report. `start` are points to try first, `earlier` trials to learn from.

    Raises:
        UserError: a check failed before the first trial, or the storage failed for too long.
    """
    trains_now = study.remaining > 0
    if trains_now:
        join_cluster(verbose)
        require_checks(study.space.base, searching=True)
        kind.check()
    file = study.folder / STUDY_FILE
    contents = {"token": study.token, **kind.fixed}
    stored = read_json(file, STUDY_FILE_REMEDY)
    if stored is None:
        for trial in study.trials.values():  # of a study whose file was lost
            trial.delivered = False
    if stored != contents:
        write_json(file, contents)
    publisher = Publisher(study, _open_run(study, kind))
    try:
        if trains_now:
            run_trials(study, storage, start, earlier, verbose)
    except BaseException as error:
        _close_interrupted(study, publisher, error)
        raise
    return _conclude(study, publisher, kind, trains_now)


def _close_interrupted(study: RunningStudy, publisher: Publisher, error: BaseException) -> None:
    """Close the MLflow runs of a study that stops before its end."""
    publisher.interrupt()
    publisher.close(INTERRUPTED_DELIVERY_S)
    status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
    close_run(publisher.parent, status, tags={REASON_TAG: one_line(error, limit=500)})
    study.delete_stopped_checkpoints()


def _conclude(study: RunningStudy, publisher: Publisher, kind: StudyKind, trained_now: bool) -> Study:
    """Write the best config and the report, also to MLflow."""
    parent, best = publisher.parent, study.best() if kind.has_best else None
    study.delete_stopped_checkpoints()
    files = []
    if best is not None:
        files = [study.folder / "config.yaml"]
        write_text(files[0], study.config(best).to_yaml())
    undelivered = publisher.close(DELIVERY_S)
    if undelivered:
        return Study(None, study.folder, files, parent, undelivered, trained_now)
    try:
        with explain_connection_errors():
            records = load_study(study.search.study, parent.run_id)
            report = retry_storage(lambda: kind.write_report(records, study.folder / "report"), study.folder)
            log_files(parent, report, "report")
            tags, best_values = {NOTE_TAG: kind.note(records)}, {}
            if kind.has_best:
                tags[BEST_TRIAL_TAG] = str(best.number) if best else "none"
                best_values = {f"best/{metric}": value for metric, value in study.best_values().items()}
            finish_run(parent, "FINISHED", files, tags, best_values)
    except UserError:  # MLflow stopped responding after `close`
        return Study(None, study.folder, files, parent, 1, trained_now)
    return Study(records, study.folder, [*files, *report], parent, 0, trained_now)


@explain_connection_errors()
def _open_run(study: RunningStudy, kind: StudyKind) -> TrackedRun:
    """The study's own run in MLflow, with the data that its report needs."""
    space, name = study.space, study.search.study
    about = {"objectives": space.objectives, "searched": space.searched, "settings": kind.settings, **kind.about}
    params = {
        **{f"space.{key}": domain for key, domain in space.describe().items()},
        **{f"objective.{metric}": mode for metric, mode in space.objectives.items()},
        **{f"search.{key}": value for key, value in kind.settings.items()},
    }
    tags = {KIND_TAG: "study", STUDY_TAG: json.dumps(about)}
    parent = open_run(name, name, study.token, params, tags)
    set_tags(parent, {STUDY_TAG: tags[STUDY_TAG]})  # a comparison that is continued may have more rows
    source = study.folder / kind.source_name
    write_text(source, space.source)
    log_files(parent, [source])
    return parent
