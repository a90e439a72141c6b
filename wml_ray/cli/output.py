"""The tables and lines that the command line prints."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from wml_ray.cli.exit_codes import OK, USER_ERROR
from wml_ray.errors import number_of

if TYPE_CHECKING:
    from pathlib import Path

    from wml_ray.cluster.preflight import CheckResult
    from wml_ray.config.schema import Config
    from wml_ray.report.comparison_page import ComparisonReport
    from wml_ray.tracking.results import StudyRecords
    from wml_ray.training.prediction import StepPrediction
    from wml_ray.verbs.plan import RunPlan
    from wml_ray.verbs.run import Run


def show_plan(config: Config, plan: RunPlan) -> None:
    """Print the peers, sizes, resources and state of a run."""
    from rich.console import Console

    from wml_ray.report.run_report import plan_table
    from wml_ray.training.precision import describe_precision

    Console().print(plan_table(plan.peers))
    separate_params = sum(peer["params"] for peer in plan.peers)
    workers = config.scale.workers
    where = "in this process" if workers == 0 else f"on {workers} Ray workers"
    exits = f", exits after {list(config.model.exits)} stages" if config.model.exits else ""
    device = "one GPU each" if config.scale.gpu else "CPU"
    print_line(f"images      {plan.images}, {config.data.batch_size} a step, {config.optim.epochs} epochs")
    print_line(f"model       {config.model.backbone}, sharing {list(config.model.sharing)}{exits}")
    copies = ", ".join(f"{name} {number}" for name, number in zip(plan.stages, config.model.sharing, strict=True))
    print_line(f"stages      copies of each: {copies}; sharing may split before any but the first")
    if plan.pretrained:
        print_line(f"pretrained  {plan.pretrained}")
    if plan.teacher:
        print_line(f"teacher     {plan.teacher}")
    print_line(f"params      {plan.tree_params:,} in the tree ({separate_params:,} in separate peers)")
    print_line(f"memory      about {plan.memory_bytes / 2**20:,.0f} MiB a worker")
    print_line(f"resources   {where}, {device}")
    if plan.step:
        _show_step(plan.step)
    print_line(f"precision   {describe_precision(config)}")
    print_line(f"run id      {config.run_id}")
    print_line(f"folder      {config.run_folder} ({plan.state})")


def _show_step(step: StepPrediction) -> None:
    """Print the predicted split of a training step."""
    network, update = step.network, step.update
    each = f"{network.bandwidth_gbit:g} Gbit/s and {1e6 * network.latency_s:.0f} us a message"
    print_line(f"network     {network.workers} workers, {step.images} images each, {each}")
    exchanged = (
        f"all-reduce {_ms(step.gradient_s)} of {step.gradient_bytes / 1e6:.2f} MB, {_ms(step.exposed_s)} exposed"
    )
    print_line(f"step        compute {_measured(step, step.compute_s)}, {exchanged}")
    if step.statistics_s:
        print_line(f"batchnorm   {_ms(step.statistics_s)} a step for optim.sync_batchnorm")
    if update:
        reduced = f"{update.all_reduces} x " * (update.all_reduces > 1) + "all-reduce"
        computed = _measured(step, update.compute_s)
        print_line(f"omega       every {update.every} steps: compute {computed}, {reduced} {_ms(update.all_reduce_s)}")
    if step.device:
        rate = f"{network.workers * step.images / step.step_s:,.0f} images/s"
        print_line(f"predicted   {_ms(step.step_s)} a step, {rate}, {100 * step.computing:.0f} % of it compute")


def _measured(step: StepPrediction, seconds: float) -> str:
    return _ms(seconds) if step.device else "not measured (this machine has no GPU)"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def show_run(run: Run) -> None:
    """Print the result of a finished run."""
    from rich.console import Console

    from wml_ray.report.run_report import peer_table

    result, folder = run.record, run.folder
    if not run.trained_now:
        print_line("this run has finished before; its result:")
    Console().print(peer_table(result))
    rule = "the last epoch" if result["test_rule"] == "last" else "the best epoch by validation"
    device = "CPU" if result["device"] == "cpu" else "GPU"
    print_line(f"accuracy    of epoch {result['test_epoch']}, {rule}; test accuracy was measured once, at the end")
    threads = result["latency_threads"]
    print_line(f"latency     of one image on the {device}, {threads} CPU thread, median of repeated calls")
    print_line(f"run         {folder} (pictures in report/)")
    if run.tracked:
        print_line(f"MLflow      {run.tracked.command}")
    if not run.trained_now:
        seed = run.config.seed + 1
        print_line(
            f"train anew  change a key (seed={seed}), name another experiment (run.name=...), or delete {folder}"
        )
    if run.undelivered:
        warn_undelivered(folder / "result.json")


def show_checks(results: Iterable[CheckResult]) -> int:
    """Print each check as it ends; returns the exit code."""
    failed = 0
    for result in results:
        failed += not result.passed
        print_line(f"{result.subject:<11} {'ok' if result.passed else 'NO'}  {result.text}")
    print_line(f"{number_of(failed, 'check')} failed" if failed else "all checks passed; nothing was started")
    return USER_ERROR if failed else OK


def show_study(study: StudyRecords) -> None:
    """Print the states of the trials and the Pareto front of a study."""
    from rich.console import Console

    from wml_ray.report.study_tables import front_table, trials_summary

    console = Console()
    print_line(trials_summary(study))
    console.print(front_table(study, console.width))


def show_comparison(report: ComparisonReport) -> None:
    """Print the tables of a comparison, aligned as plain text; a wide terminal is not needed to copy them."""
    print_line(f"\n{report.text()}\n")


def warn_undelivered(path: Path) -> None:
    """Print to stderr that MLflow lacks metrics, which are in `path`."""
    print(
        f"wml-ray: MLflow cannot be reached; every metric is in {path}: run the same command again when MLflow is "
        "back, to deliver them",
        file=sys.stderr,
    )


def print_line(line: str) -> None:
    """Print a line and flush it."""
    print(line, flush=True)


def configure_warnings() -> None:
    """Show the warnings of wml_ray on one line each, and none of the libraries."""

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
    ) -> None:
        print(f"wml-ray: warning: {message}", file=sys.stderr)

    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=UserWarning, module=r"wml_ray(\..*)?")
    warnings.showwarning = show
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
