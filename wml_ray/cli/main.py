"""The command line. Heavy imports live inside the verbs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext

from wml_ray.cli.options import parse_arguments, search_settings
from wml_ray.cli.output import (
    FAILED,
    OK,
    USER_ERROR,
    print_line,
    quieten,
    reader_has_left,
    say_undelivered,
    show_checks,
    show_run,
    show_study,
)


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; 0 done, 2 the user's input is wrong, 1 anything else."""
    options = parse_arguments(arguments)
    quieten()
    from wml_ray.errors import UserError

    try:
        return int(VERBS[options.verb](options))
    except UserError as error:
        print(f"wml-ray: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("wml-ray: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        if not reader_has_left():
            raise
        return FAILED
    except RuntimeError as error:
        from wml_ray.errors import Diverged

        if not isinstance(error, Diverged):
            raise
        print(f"wml-ray: {error}", file=sys.stderr)
        return FAILED


def _plan(options: argparse.Namespace) -> int:
    from rich.console import Console

    from wml_ray.config.load import load_config
    from wml_ray.report.run_report import plan_table
    from wml_ray.verbs.plan import plan

    config = load_config(options.config, options.overrides)
    found = plan(config, options.check_data)
    console = Console()
    console.print(plan_table(found.peers))
    separate = sum(peer["params"] for peer in found.peers)
    workers = config.scale.workers
    where = "in this process" if workers == 0 else f"on {workers} Ray workers"
    device = "one GPU each" if config.scale.gpu else "CPU"
    print_line(f"images      {found.images}, {config.data.batch_size} a step, {config.optim.epochs} epochs")
    print_line(f"model       {config.model.backbone}, sharing {list(config.model.sharing)}")
    print_line(f"params      {found.tree_params:,} in the tree ({separate:,} in separate peers)")
    print_line(f"memory      about {found.memory_bytes / 2**20:,.0f} MiB a worker")
    print_line(f"resources   {where}, {device}")
    print_line(f"run id      {config.run_id}")
    print_line(f"folder      {config.run_folder} ({found.state})")
    return OK


def _train(options: argparse.Namespace) -> int:
    from wml_ray.config.load import load_config

    config = load_config(options.config, options.overrides)
    if options.check_data:
        from wml_ray.data.check import undecodable_images

        undecodable_images(config.data, decode_all=True, show_progress=True)
    if options.dry_run:
        from wml_ray.cluster.preflight import run_checks

        return show_checks(run_checks(config))
    from wml_ray.training.threads import describe_threads

    peers = f"{config.num_peers} peers of {config.model.backbone}"
    print_line(f"run {config.run_id}: {peers} on {config.data.name}, {describe_threads(config)}")
    from wml_ray.verbs.progress import TrainingProgress
    from wml_ray.verbs.train import train

    with TrainingProgress(config) as progress:
        outcome = train(config, progress)
    show_run(outcome)
    return OK if outcome.undelivered == 0 else FAILED


def _tune(options: argparse.Namespace) -> int:
    from pathlib import Path

    from wml_ray.config.load import load_config
    from wml_ray.search.space import load_space

    base = load_config(options.config, options.overrides)
    space = load_space(options.space, base)
    search = search_settings(options, base)
    if options.dry_run:
        from wml_ray.verbs.tune import dry_run

        return show_checks(dry_run(space, search))
    keys, epochs = len(space.searched), base.optim.epochs
    print_line(f"study {search.study}: {search.trials} trials of {epochs} epochs, {keys} keys searched")
    from wml_ray.search.space import load_start_points
    from wml_ray.verbs.progress import StudyProgress
    from wml_ray.verbs.tune import tune

    start = load_start_points(Path(options.start), space) if options.start else []
    with nullcontext() if options.verbose else StudyProgress() as progress:
        outcome = tune(space, search, progress, start, options.warm_start, options.verbose)
    if outcome.study is None:
        say_undelivered(outcome.folder)
        return FAILED
    if not outcome.trained_now:
        print_line("this study has finished before; here is its result (a larger --trials adds the difference)")
    show_study(outcome.study)
    for path in outcome.files:
        print_line(f"wrote {path}")
    print_line(f"MLflow      {outcome.tracked.command}")
    if (outcome.folder / "config.yaml") not in outcome.files:
        print("wml-ray: no trial reached its full budget; why is in the report", file=sys.stderr)
        return FAILED
    print_line(f"best        wml-ray train {outcome.folder / 'config.yaml'}")
    return OK


def _report(options: argparse.Namespace) -> int:
    from pathlib import Path

    from rich.console import Console

    from wml_ray.report.run_report import runs_table, write_comparison
    from wml_ray.tracking.results import attach_report, finished_runs, is_study, load_study

    folder = Path(options.out) / options.experiment
    study = load_study(options.experiment) if is_study(options.experiment) else None
    runs = study.trials if study else finished_runs(options.experiment)
    if options.csv:
        runs.drop(columns="peers").to_csv(sys.stdout, index=False)
        return OK
    if study:
        from wml_ray.report.study_page import write_study

        show_study(study)
        files = write_study(study, folder)
        attach_report(options.experiment, files)
    else:
        Console().print(runs_table(runs))
        files = write_comparison(runs, folder)
    for path in files:
        print_line(f"wrote {path}")
    return OK


VERBS = {"plan": _plan, "train": _train, "tune": _tune, "report": _report}
