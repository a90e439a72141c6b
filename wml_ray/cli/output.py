"""What the command line prints."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from wml_ray.cluster.preflight import CheckResult
    from wml_ray.tracking.results import StudyRecords
    from wml_ray.verbs.train import RunResult


OK, FAILED, USER_ERROR = 0, 1, 2


def reader_has_left() -> bool:
    """Whether what we print is a pipe that nobody reads any more (`| head`); if so, the rest is not kept for it."""
    import select

    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def show_run(outcome: RunResult) -> None:
    from rich.console import Console

    from wml_ray.report.run_report import peer_table

    result, folder = outcome.result, outcome.folder
    if not outcome.trained_now:
        print_line("this run has finished before; here is its result")
    Console().print(peer_table(result))
    rule = "the last epoch" if result["test_rule"] == "last" else "the best epoch by validation"
    device = "CPU" if result["device"] == "cpu" else "GPU"
    print_line(f"accuracy    of epoch {result['test_epoch']}, {rule}; the test images were looked at once, at the end")
    print_line(
        f"latency     of one image on the {device}, {result['latency_threads']} CPU thread, median of repeated calls"
    )
    print_line(f"run         {folder} (pictures in report/)")
    print_line(f"MLflow      {outcome.tracked.command}")
    if not outcome.trained_now:
        print_line(f"train anew  change a key (seed=1), name another experiment (run.name=...), or delete {folder}")
    if outcome.undelivered:
        say_undelivered(folder / "result.json")


def show_checks(findings: Iterable[CheckResult]) -> int:
    wrong = 0
    for finding in findings:  # as they come: a node may take a while to answer
        wrong += not finding.fine
        print_line(f"{finding.subject:<11} {'ok' if finding.fine else 'NO'}  {finding.text}")
    print_line(f"{wrong} to mend" if wrong else "ready; nothing was started")
    return USER_ERROR if wrong else OK


def show_study(study: StudyRecords) -> None:
    from rich.console import Console

    from wml_ray.report.study_tables import front_table, trials_summary

    console = Console()
    print_line(trials_summary(study))
    console.print(front_table(study, console.width))


def say_undelivered(place: Path) -> None:
    print(
        f"wml-ray: MLflow does not answer; every metric is in {place}: run the same command again when it is back, and "
        "they are delivered",
        file=sys.stderr,
    )


def print_line(line: str) -> None:
    print(line, flush=True)


def quieten() -> None:
    """Our warnings on one line, none from the libraries below."""

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
    ) -> None:
        print(f"wml-ray: warning: {message}", file=sys.stderr)

    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=UserWarning, module=r"wml_ray(\..*)?")
    warnings.showwarning = show
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
