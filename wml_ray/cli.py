"""The command line. Heavy imports live inside the verbs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from wml_ray.config import Config
    from wml_ray.loop import EpochEnd, Tick
    from wml_ray.run import Outcome

OK, FAILED, USER_ERROR = 0, 1, 2
PLAIN_LINE_S = 10.0  # between two progress lines where there is no terminal


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; 0 done, 2 the user's input is wrong, 1 anything else."""
    options = _parser().parse_args(arguments)
    _quieten()
    from wml_ray.config import UserError

    try:
        return int(options.verb(options))
    except UserError as error:
        print(f"wml-ray: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("wml-ray: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return FAILED
    except RuntimeError as error:
        from wml_ray.loop import Diverged

        if not isinstance(error, Diverged):
            raise
        print(f"wml-ray: {error}", file=sys.stderr)
        return FAILED


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="wml-ray",
        description="Train a whole family of differently sized networks in one run (Weighted Mutual Learning).",
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, verb, text in (
        ("plan", _plan, "show what a run would be: peers, params, MACs, memory, resources, run id; trains nothing"),
        ("train", _train, "train, or resume the same run if it was interrupted"),
    ):
        one = verbs.add_parser(name, help=text, description=text)
        one.add_argument("config", metavar="CONFIG", help="YAML file, see jobs/")
        one.add_argument("overrides", metavar="key=value", nargs="*", help="config keys, such as wml.alpha=0.3")
        one.set_defaults(verb=verb)
    text = "tables and pictures of the finished runs of an MLflow experiment"
    report = verbs.add_parser("report", help=text, description=text)
    report.add_argument("experiment", metavar="EXPERIMENT", help="its name: run.name in the config")
    report.add_argument("--out", metavar="FOLDER", default="reports", help="where pictures and CSV go (reports/)")
    report.set_defaults(verb=_report)
    return parser


def _plan(options: argparse.Namespace) -> int:
    from rich.console import Console

    from wml_ray.config import load
    from wml_ray.report import plan_table
    from wml_ray.run import plan

    config = load(options.config, options.overrides)
    found = plan(config)
    console = Console()
    console.print(plan_table(found.peers))
    separate = sum(peer["params"] for peer in found.peers)
    workers = config.scale.workers
    where = "in this process" if workers == 0 else f"on {workers} Ray workers"
    device = "one GPU each" if config.scale.gpu else "CPU"
    _print(f"images      {found.images}, {config.data.batch_size} a step, {config.optim.epochs} epochs")
    _print(f"model       {config.model.backbone}, sharing {list(config.model.sharing)}")
    _print(f"params      {found.tree_params:,} in the tree ({separate:,} in separate peers)")
    _print(f"memory      about {found.memory_bytes / 2**20:,.0f} MiB a worker")
    _print(f"resources   {where}, {device}")
    _print(f"run id      {config.run_id}")
    _print(f"folder      {config.run_folder} ({found.state})")
    return OK


def _train(options: argparse.Namespace) -> int:
    from wml_ray.config import load

    config = load(options.config, options.overrides)
    _print(f"run {config.run_id}: {config.num_peers} peers of {config.model.backbone} on {config.data.name}")
    from wml_ray.run import train

    with _Progress(config) as progress:
        outcome = train(config, progress)
    _show(outcome)
    return OK if outcome.undelivered == 0 else FAILED


def _report(options: argparse.Namespace) -> int:
    from pathlib import Path

    from rich.console import Console

    from wml_ray.report import runs_table, write_comparison
    from wml_ray.tracking import finished_runs

    runs = finished_runs(options.experiment)
    Console().print(runs_table(runs))
    for path in write_comparison(runs, Path(options.out) / options.experiment):
        _print(f"wrote {path}")
    return OK


def _show(outcome: Outcome) -> None:
    from rich.console import Console

    from wml_ray.report import peer_table

    result, folder = outcome.result, outcome.folder
    if not outcome.trained_now:
        _print("this run has finished before; here is its result")
    Console().print(peer_table(result))
    rule = "the last epoch" if result["test_rule"] == "last" else "the best epoch by validation"
    device = "CPU" if result["device"] == "cpu" else "GPU"
    _print(f"accuracy    of epoch {result['test_epoch']}, {rule}; the test images were looked at once, at the end")
    _print(f"latency     of one image on the {device} it was trained on")
    _print(f"run         {folder} (pictures in report/)")
    _print(f"MLflow      {outcome.tracked.command}")
    if not outcome.trained_now:
        _print(f"train anew  change a key (seed=1), name another experiment (run.name=...), or delete {folder}")
    if outcome.undelivered:
        print(
            f"wml-ray: MLflow does not answer; every metric is in {folder / 'result.json'}: run the same command again "
            "when it is back, and they are delivered",
            file=sys.stderr,
        )


def _print(line: str) -> None:
    print(line, flush=True)


class _Progress:
    """One live line with an ETA; without a terminal, a plain line now and then."""

    def __init__(self, config: Config) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self.epochs = config.optim.epochs
        console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("ETA"))
        self.bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self.task = self.bar.add_task("starting", total=None)
        self.plain = not console.is_terminal
        self.accuracy = ""
        self.first: tuple[float, int] | None = None
        self.last_line_s = time.monotonic()

    def __enter__(self) -> _Progress:
        if not self.plain:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.plain:
            self.bar.stop()

    def __call__(self, event: Tick | EpochEnd) -> None:
        from wml_ray.loop import EpochEnd

        if isinstance(event, EpochEnd):
            self.accuracy = f", ensemble {event.metrics['val/accuracy/ensemble_weighted'] * 100:.1f} %"
            return
        text = f"epoch {event.epoch}/{self.epochs}, loss {event.loss:.3f}{self.accuracy}"
        now_s = time.monotonic()
        if self.first is None:  # the ETA counts from here: a resumed run has not done its first steps just now
            self.first = (now_s, event.step)
            self.bar.reset(self.task, description=text, completed=event.step, total=event.total_steps)
        self.bar.update(self.task, description=text, completed=event.step)
        first_s, first_step = self.first
        if self.plain and now_s - self.last_line_s >= PLAIN_LINE_S and event.step > first_step:
            self.last_line_s = now_s
            left_s = (now_s - first_s) / (event.step - first_step) * (event.total_steps - event.step)
            _print(f"{text}, ETA {int(left_s) // 60}:{int(left_s) % 60:02d}")


def _quieten() -> None:
    """Our warnings on one line, none from the libraries below."""

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
    ) -> None:
        print(f"wml-ray: warning: {message}", file=sys.stderr)

    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=UserWarning, module=r"wml_ray(\..*)?")
    warnings.showwarning = show
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
