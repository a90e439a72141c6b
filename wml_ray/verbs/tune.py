"""The verb `tune` as a function: a study from its space to its report."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from wml_ray.cluster.preflight import CheckResult, run_check, run_checks
from wml_ray.config.load import with_values
from wml_ray.config.schema import Config
from wml_ray.data.load import load_dataset
from wml_ray.errors import UserError
from wml_ray.methods.settings import TEACHER_METHODS
from wml_ray.report.study_page import write_study
from wml_ray.report.study_tables import front_markdown
from wml_ray.search.optuna_study import TrialRecord, check_sampler, open_storage
from wml_ray.search.ratios import Increasing
from wml_ray.search.settings import SearchConfig
from wml_ray.search.space import Space, check_stop_metric, decode, extremes, result_settings
from wml_ray.search.study import RunningStudy
from wml_ray.tracking.results import complete_trials
from wml_ray.training.start import initial_checkpoint
from wml_ray.training.teacher import check_teacher
from wml_ray.verbs.progress import StudyProgress
from wml_ray.verbs.study import Study, StudyKind, run_study, study_folder


def tune(
    space: Space,
    search: SearchConfig,
    on_change: Callable[[RunningStudy], None] | None = None,
    start: Sequence[Mapping[str, Any]] = (),
    warm_start: Sequence[str] = (),
    verbose: bool = False,
) -> Study:
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
    check_stop_metric(search, space)
    check_sampler(search, space)
    with study_folder(space, search.study) as (folder, lease, stored):
        _check_same_study(folder, stored, space)
        storage = open_storage(search.storage, search.study, stored.get("token"))
        earlier = [record for name in dict.fromkeys(warm_start) for record in _earlier_trials(name, search, space)]
        study = RunningStudy(space, search, folder, stored.get("token") or uuid.uuid4().hex, on_change, lease)
        return run_study(study, _kind(space, search), storage, start, earlier, verbose)


def dry_run(space: Space, search: SearchConfig) -> Iterator[CheckResult]:
    """Run the checks that `tune` runs before the first trial; nothing is written.

    Raises:
        UserError: a mistake in the settings.
    """
    check_stop_metric(search, space)
    check_sampler(search, space)
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


def _kind(space: Space, search: SearchConfig) -> StudyKind:
    settings = {key: str(value) for key, value in search.model_dump(exclude={"study", "storage", "trials"}).items()}
    settings["grace_epochs"] = str(search.grace(space.base.optim.epochs))

    def check() -> None:
        check_teachers(space)
        check_ratios(space)

    fixed = _fixed_settings(space)
    return StudyKind(fixed, settings, {}, "space.py", check, write_study, front_markdown, has_best=True)


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
    settings = result_settings(space.base).items()
    config = {key: value for key, value in settings if key not in space.searched}
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
