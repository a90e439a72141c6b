"""Runs a training, a study or a comparison: one given on the command line, or the job.json of a Ray job.

`wml-ray submit` starts it on the cluster as `python -m wml_ray.cli.job job.json`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from wml_ray.cli.exit_codes import FAILED, OK, exit_code
from wml_ray.cli.options import compare_settings, search_settings
from wml_ray.cli.output import (
    configure_warnings,
    print_line,
    show_checks,
    show_comparison,
    show_run,
    show_study,
    warn_undelivered,
)
from wml_ray.errors import UserError, number_of
from wml_ray.submit.entry import apply_environment, enter_ray_job, in_ray_job

if TYPE_CHECKING:
    from wml_ray.submit.job import Job


def main(argument: str) -> int:
    """Run the job described by a JSON file, or by JSON text; returns the exit code."""
    configure_warnings()
    return exit_code(lambda: _run_described(argument))


def _run_described(argument: str) -> int:
    try:
        text = argument if argument.startswith("{") else Path(argument).read_text()
        apply_environment()
        from wml_ray.submit.job import Job

        return run_job(Job.from_json(text))
    except ModuleNotFoundError as error:
        raise UserError(
            f"the Python of this cluster has no package '{error.name}'; start its nodes from an environment or image "
            "with requirements.lock installed, or submit with --packages"
        ) from error


def job_from_options(options: argparse.Namespace) -> Job:
    """Read and check the config, the space and the start points that the command line names.

    Raises:
        UserError: a mistake in one of them, or in the settings of the search.
    """
    from wml_ray.config.load import load_config
    from wml_ray.submit.job import Job

    config = load_config(options.config, options.overrides)
    if options.verb == "train":
        return Job("train", config, check_data=options.check_data, dry_run=options.dry_run)
    if options.verb == "compare":
        from wml_ray.search.comparison import comparison_of

        comparison = compare_settings(options, config)
        comparison_of(config, comparison)
        return Job("compare", config, comparison=comparison, dry_run=options.dry_run, verbose=options.verbose)
    from wml_ray.cluster.space import load_space
    from wml_ray.search.space import check_stop_metric, load_start_points

    space = load_space(options.space, config)
    search = search_settings(options, config)
    check_stop_metric(search, space)
    start = load_start_points(Path(options.start), space) if options.start else []
    flags = {"dry_run": options.dry_run, "verbose": options.verbose}
    return Job("tune", config, space, search, start, options.warm_start, **flags)


def run_job(job: Job) -> int:
    """Train, tune or compare, and print the result; returns the exit code."""
    if in_ray_job():
        enter_ray_job(job.verbose)
    try:
        return {"train": _train, "tune": _tune, "compare": _compare}[job.verb](job)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command continues from the last checkpoint") from None


def _train(job: Job) -> int:
    if job.check_data:
        from wml_ray.data.check import undecodable_images

        undecodable_images(job.config.data, decode_all=True, show_progress=True)
    if job.dry_run:
        from wml_ray.cluster.preflight import run_checks

        return show_checks(run_checks(job.config))
    from wml_ray.verbs.progress import TrainingProgress

    with TrainingProgress(job.config) as progress:  # its first line comes before the slow imports
        from wml_ray.verbs.train import train

        run = train(job.config, progress)
    show_run(run)
    return OK if run.undelivered == 0 else FAILED


def _tune(job: Job) -> int:
    assert job.space is not None
    assert job.search is not None
    if job.dry_run:
        from wml_ray.verbs.tune import dry_run

        return show_checks(dry_run(job.space, job.search))
    keys, epochs = len(job.space.searched), job.config.optim.epochs
    print_line(f"study {job.search.study}: {job.search.trials} trials of {epochs} epochs, {keys} keys searched")
    from wml_ray.verbs.tune import tune

    result = tune(job.space, job.search, None, job.start, job.warm_start, job.verbose)
    if result.study is None:
        warn_undelivered(result.folder)
        return FAILED
    if not result.trained_now:
        print_line("this study has finished before (a larger --trials adds trials); its result:")
    show_study(result.study)
    for path in result.files:
        print_line(f"wrote {path}")
    print_line(f"MLflow      {result.tracked.command}")
    if (result.folder / "config.yaml") not in result.files:
        print("wml-ray: no trial reached its full number of epochs; the report has the reasons", file=sys.stderr)
        return FAILED
    print_line(f"best        wml-ray train {result.folder / 'config.yaml'}")
    return OK


def _compare(job: Job) -> int:
    assert job.comparison is not None
    if job.dry_run:
        from wml_ray.verbs.compare import dry_run

        return show_checks(dry_run(job.config, job.comparison))
    settings = job.comparison
    methods, seeds = ", ".join(settings.methods), number_of(settings.seeds, "seed")
    print_line(f"comparison {settings.study}: {methods}; {seeds}, {job.config.optim.epochs} epochs")
    from wml_ray.report.comparison_page import study_report
    from wml_ray.verbs.compare import compare

    result = compare(job.config, settings, None, job.verbose)
    if result.study is None:
        warn_undelivered(result.folder)
        return FAILED
    show_comparison(study_report(result.study))
    for path in result.files:
        print_line(f"wrote {path}")
    print_line(f"MLflow      {result.tracked.command}")
    return FAILED if (result.study.trials["state"] != "COMPLETE").any() else OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
