"""The command line. Heavy imports are inside the verbs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from wml_ray.cli.choose import evaluate_run, pick_networks
from wml_ray.cli.exit_codes import OK, exit_code
from wml_ray.cli.export import export_network, register_network
from wml_ray.cli.job import job_from_options, run_job
from wml_ray.cli.options import parse_arguments
from wml_ray.cli.output import configure_warnings, print_line, show_comparison, show_plan, show_study
from wml_ray.cli.shard import shard_images
from wml_ray.cli.submit import manage_jobs, submit_job


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns 0 when done, 2 when the user's input is wrong, 1 for anything else."""
    options = parse_arguments(arguments)
    configure_warnings()
    return exit_code(lambda: VERBS[options.command](options))


def _plan(options: argparse.Namespace) -> int:
    from wml_ray.config.load import load_config

    config = load_config(options.config, options.overrides)  # before the slow import of torch
    from wml_ray.verbs.plan import plan

    show_plan(config, plan(config, options.check_data, options.bandwidth_gbit))
    return OK


def _run(options: argparse.Namespace) -> int:
    return run_job(job_from_options(options))


def _report(options: argparse.Namespace) -> int:
    from rich.console import Console

    from wml_ray.report.run_report import runs_table, write_comparison
    from wml_ray.tracking.results import attach_report, finished_runs, is_study, load_study

    folder = Path(options.out) / options.experiment
    if options.group_by:
        return _report_groups(options, folder)
    study = load_study(options.experiment) if is_study(options.experiment) else None
    runs = study.trials if study else finished_runs(options.experiment)
    if options.csv:
        runs.drop(columns="peers").to_csv(sys.stdout, index=False)
        return OK
    if study and study.variants:
        from wml_ray.report.comparison_page import study_report

        report = study_report(study)
        show_comparison(report)
        files = report.write(folder)
        attach_report(options.experiment, files)
    elif study:
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


def _report_groups(options: argparse.Namespace, folder: Path) -> int:
    """The tables of a comparison, of any finished runs that differ in some keys and in their seeds."""
    from wml_ray.report.comparison import group_runs
    from wml_ray.report.comparison_page import runs_report
    from wml_ray.report.comparison_tables import tidy_csv
    from wml_ray.tracking.results import finished_runs

    keys = [key for keys in options.group_by for key in keys.split(",")]
    report = runs_report(options.experiment, *group_runs(finished_runs(options.experiment), keys))
    if options.csv:
        print(tidy_csv(report.rows), end="")
        return OK
    show_comparison(report)
    for path in report.write(folder):
        print_line(f"wrote {path}")
    return OK


VERBS = {
    "plan": _plan,
    "train": _run,
    "tune": _run,
    "compare": _run,
    "report": _report,
    "pick": pick_networks,
    "evaluate": evaluate_run,
    "export": export_network,
    "register": register_network,
    "shard": shard_images,
    "submit": submit_job,
    "jobs": manage_jobs,
}
