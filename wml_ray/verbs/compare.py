"""The verb `compare` as a function: methods side by side, each with the same seeds."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wml_ray.cluster.preflight import CheckResult, run_check, run_checks
from wml_ray.config.load import as_config, load_config, with_values
from wml_ray.config.schema import Config
from wml_ray.data.load import load_dataset
from wml_ray.errors import UserError
from wml_ray.networks.spec import ImageSpec
from wml_ray.pruning.widths import ChannelWidths
from wml_ray.report.comparison_page import study_report
from wml_ray.search.comparison import (
    OBJECTIVES,
    TEACHER,
    VARIANT,
    Comparison,
    comparison_of,
    make_comparison,
    taught_by,
    tuning_study,
)
from wml_ray.search.method_spaces import method_space, start_at_config
from wml_ray.search.optuna_study import open_storage
from wml_ray.search.settings import CompareConfig, SearchConfig
from wml_ray.search.space import lookup
from wml_ray.search.study import RunningStudy
from wml_ray.search.trials import TrialStore
from wml_ray.storage.paths import to_path
from wml_ray.storage.retry import retry_storage
from wml_ray.tracking.results import StudyRecords
from wml_ray.training.start import build_method, initial_checkpoint
from wml_ray.training.teacher import load_teacher
from wml_ray.verbs.progress import StudyProgress
from wml_ray.verbs.study import STUDY_FILE, Study, StudyKind, run_study, study_folder
from wml_ray.verbs.tune import tune

TUNING_SEED = 10_000
"""Added to the config's seed for `CompareConfig.tune`, so that no seed is searched and compared."""


def compare(
    config: str | Path | Mapping[str, Any] | Config,
    settings: CompareConfig,
    on_change: Callable[[RunningStudy], None] | None = None,
    verbose: bool = False,
    **overrides: Any,
) -> Study:
    """Train each method with each seed, or what remains of that, and write the report.

    All runs of a seed have the same data, split, budget, initial tree and plan. With `settings.tune` each row is first
    searched by a study of its own, on validation images of another seed; its best settings are then compared.
    `config` and `overrides` are those of `train`, `on_change` and `verbose` those of `tune`.

    A second call continues the comparison; further methods, keys and seeds are added to it.

    Raises:
        UserError: a mistake in the config or the settings, before the first trial.
    """
    config = as_config(config, overrides)
    if on_change is None and not verbose:
        with StudyProgress() as progress:
            return compare(config, settings, progress)
    comparison = comparison_of(config, settings)
    if settings.tune:
        file = to_path(config.run.storage_path) / settings.study / STUDY_FILE
        if not retry_storage(file.exists, file):
            check_rows(comparison)  # before the long search, and not again once the comparison has begun
        comparison = _tuned(comparison, settings, on_change, verbose)
    with study_folder(comparison, settings.study) as (folder, lease, stored):
        earlier = [trial.point for trial in TrialStore(folder).trials()]
        whole = _with_earlier_rows(comparison, folder, stored, earlier)
        start = [*earlier, *(point for point in comparison.points() if point not in earlier)]
        token = stored.get("token") or uuid.uuid4().hex
        study = RunningStudy(whole, _search(settings, len(start)), folder, token, on_change, lease)
        storage = open_storage(None, settings.study, token)
        return run_study(study, _kind(whole, settings), storage, start, verbose=verbose)


def dry_run(config: Config, settings: CompareConfig) -> Iterator[CheckResult]:
    """Run the checks that `compare` runs before the first trial; nothing is written.

    Raises:
        UserError: a mistake in the settings.
    """
    comparison = comparison_of(config, settings)
    yield from run_checks(comparison.base, searching=True)
    yield run_check("pruning", lambda: check_rows(comparison))


def check_rows(comparison: Comparison) -> str:
    """Prune each tree of the comparison once, and build each row's method on its tree; returns the result in words.

    Rows whose teacher is not trained yet are left out.

    Raises:
        UserError: a ratio cannot be reached, the backbone, the sharing or the data are wrong, or a method refuses its
            tree.
    """
    pruned: list[tuple[Any, ImageSpec, ChannelWidths]] = []
    for variant in comparison.variants:
        point = {VARIANT: variant, "seed": comparison.seeds[0]}
        if comparison.needed_point(point) is not None:
            continue
        config = comparison.config(point)
        tree = (config.model, config.pruning, config.data)
        found = next((row for row in pruned if row[0] == tree), None)
        if found:
            build_method(config, *found[1:], load_teacher(config))
        else:
            dataset = load_dataset(config)
            pruned.append((tree, dataset.spec, initial_checkpoint(config, dataset).metadata["channels"]))
    return "every ratio of the comparison can be reached, and every method takes its tree"


def _search(settings: CompareConfig, trials: int) -> SearchConfig:
    """The settings of a study of fixed points, of which none is stopped early."""
    fixed = {"sampler": "random", "scheduler": "none"}
    return SearchConfig(study=settings.study, trials=trials, concurrent=settings.concurrent, **fixed)


def _kind(comparison: Comparison, settings: CompareConfig) -> StudyKind:
    rows = {
        name: {"values": values, "config": comparison.fixed_settings(name)}
        for name, values in comparison.variants.items()
    }
    shown = {"methods": ", ".join(comparison.methods()), "seeds": ", ".join(map(str, comparison.seeds))}
    if settings.tune:
        shown["tuned"] = f"{settings.tune} trials of each row with another seed, by {next(iter(OBJECTIVES))}"
    about = {"variants": list(comparison.variants), "published": settings.published}

    def check() -> object:
        return check_rows(comparison)

    def write_report(records: StudyRecords, folder: Path) -> list[Path]:
        return study_report(records).write(folder)

    def note(records: StudyRecords) -> str:
        return study_report(records).note()

    fixed = {"variants": rows}
    return StudyKind(fixed, shown, about, "comparison.yaml", check, write_report, note, has_best=False)


def _with_earlier_rows(
    comparison: Comparison, folder: Path, stored: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]
) -> Comparison:
    """The comparison with the rows and seeds of its earlier starts.

    Raises:
        UserError: the folder holds another study, or a row has other settings now.
    """
    if stored and "variants" not in stored:
        raise UserError(f"study '{folder.name}' is no comparison; choose another name with --study")
    rows = stored.get("variants", {})
    values = {name: row["values"] for name, row in rows.items()}
    whole = comparison.including(values, [point["seed"] for point in earlier])
    for name, row in rows.items():
        before, now = row["config"], whole.fixed_settings(name)
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed:
            key = changed[0]
            raise UserError(
                f"comparison '{folder.name}' was started with another {name}: {key} was {before.get(key)} and is now "
                f"{now.get(key)}; choose another name with --study, or delete {folder}"
            )
    return whole


def _tuned(
    comparison: Comparison, settings: CompareConfig, on_change: Callable[[RunningStudy], None] | None, verbose: bool
) -> Comparison:
    """The comparison with the best settings of each row, each found by a study of its own."""
    variants, teacher = dict(comparison.variants), ""
    for name in sorted(variants, key=lambda name: name != TEACHER):  # its best run teaches
        values = {**variants[name], "seed": comparison.base.seed + TUNING_SEED}
        if comparison.needed_point({VARIANT: name, "seed": values["seed"]}):
            values |= taught_by(teacher, values["method.name"])
        space = method_space(with_values(comparison.base, values), OBJECTIVES, fixed=variants[name])
        if not space.domains:  # the keys of the row are all that would be searched
            continue
        study = tuning_study(settings.study, name)
        search = SearchConfig(study=study, trials=settings.tune, scheduler="none", concurrent=settings.concurrent)
        result = tune(space, search, on_change, start_at_config(space), verbose=verbose)
        config_file = result.folder / "config.yaml"
        if config_file not in result.files:
            raise UserError(
                f"no trial of {study} has reached its last epoch; {result.folder / 'report'} has the reasons"
            )
        best = load_config(config_file)
        if name == TEACHER:
            number = int(str(best.run.study).rpartition("/")[2])
            teacher = str(TrialStore(result.folder).trial_folder(number).resolve() / best.run_id)
        variants[name] = {**variants[name], **{key: lookup(best, key) for key in space.domains}}
    return make_comparison(comparison.base, variants, comparison.seeds)
