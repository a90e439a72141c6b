"""The command line. Heavy imports live inside the verbs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from pathlib import Path

    from wml_ray.config import Config
    from wml_ray.preflight import Finding
    from wml_ray.run import Outcome
    from wml_ray.space import SearchConfig
    from wml_ray.study import Study

OK, FAILED, USER_ERROR = 0, 1, 2
SEARCH_OPTIONS = (
    *("sampler", "scheduler", "stop_metric", "grace_epochs", "reduction_factor", "concurrent", "keep_stopped"),
    "seed",
)


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; 0 done, 2 the user's input is wrong, 1 anything else."""
    options = parse_arguments(arguments)
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
    except BrokenPipeError:
        if not reader_has_left():
            raise
        return FAILED
    except RuntimeError as error:
        from wml_ray.loop import Diverged

        if not isinstance(error, Diverged):
            raise
        print(f"wml-ray: {error}", file=sys.stderr)
        return FAILED


def reader_has_left() -> bool:
    """Whether what we print is a pipe that nobody reads any more (`| head`); if so, the rest is not kept for it."""
    import select

    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """`key=value` may stand anywhere behind the config, also behind options."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(options, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


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
        _add_config(one)
        one.set_defaults(verb=verb)
    _add_dry_run(one)
    _add_tune(verbs)
    text = "tables and pictures of a study, or of the finished runs of an MLflow experiment"
    report = verbs.add_parser("report", help=text, description=text)
    report.add_argument("experiment", metavar="EXPERIMENT", help="name of the study, or run.name in the config")
    report.add_argument("--out", metavar="FOLDER", default="reports", help="where the files go (reports/)")
    report.add_argument("--csv", action="store_true", help="print the table as CSV, every metric and key, and no more")
    report.set_defaults(verb=_report)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, see jobs/")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="config keys, such as wml.alpha=0.3")


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    text = "look at the cluster, storage, MLflow and data, say what would stop it, and do no more"
    parser.add_argument("--dry-run", action="store_true", help=text)


def _add_tune(verbs: Any) -> None:
    text = "search config keys: many trials, Ray Tune and Optuna; the same command continues or extends a study"
    tune = verbs.add_parser("tune", help=text, description=text)
    _add_config(tune)
    tune.add_argument("--space", metavar="FILE", required=True, help="Python file of domains and objectives")
    tune.add_argument("--trials", metavar="N", type=int, required=True, help="trials the study is to have in all")
    tune.add_argument("--study", metavar="NAME", help="its name (run.name and the space's, such as wml-smoke)")
    tune.add_argument("--sampler", choices=("tpe", "nsga2", "random"), help="Optuna's sampler (tpe)")
    tune.add_argument("--scheduler", choices=("asha", "median", "none"), help="who stops trials early (asha)")
    tune.add_argument("--stop-metric", metavar="M", help="metric that decides (val/accuracy/ensemble_weighted)")
    tune.add_argument("--grace-epochs", metavar="N", type=int, help="epochs a trial is given first (root of all)")
    tune.add_argument("--reduction-factor", metavar="N", type=int, help="ASHA keeps one trial in N at a rung (3)")
    tune.add_argument(
        "--storage", metavar="URL", help="Optuna storage for others to look on ($OPTUNA_STORAGE, or none)"
    )
    tune.add_argument("--concurrent", metavar="N", type=int, help="trials at a time (as many as the cluster holds)")
    tune.add_argument("--keep-stopped", action="store_true", default=None, help="keep checkpoints of stopped trials")
    tune.add_argument("--seed", metavar="N", type=int, help="seed of the sampler (0)")
    tune.add_argument("--start", metavar="FILE", help="YAML list of points to try first, such as [{wml.alpha: 0.3}]")
    tune.add_argument("--warm-start", metavar="STUDY", action="append", default=[], help="learn from an earlier study")
    tune.add_argument("--verbose", action="store_true", help="Ray's own output")
    _add_dry_run(tune)
    tune.set_defaults(verb=_tune)


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
    if options.dry_run:
        from wml_ray.preflight import look

        return _show_findings(look(config))
    _print(f"run {config.run_id}: {config.num_peers} peers of {config.model.backbone} on {config.data.name}")
    from wml_ray.progress import TrainingProgress
    from wml_ray.run import train

    with TrainingProgress(config) as progress:
        outcome = train(config, progress)
    _show(outcome)
    return OK if outcome.undelivered == 0 else FAILED


def search_of(options: argparse.Namespace, base: Config) -> SearchConfig:
    """How `wml-ray tune` is to search, from its options.

    Raises:
        UserError: a value outside its range.
    """
    from pathlib import Path

    from wml_ray.space import search_config

    study = options.study or f"{base.run.name}-{Path(options.space).stem}"
    settings = {"study": study, "trials": options.trials}
    settings["storage"] = options.storage or os.environ.get("OPTUNA_STORAGE")
    settings |= {key: getattr(options, key) for key in SEARCH_OPTIONS}
    return search_config(**{key: value for key, value in settings.items() if value is not None})


def _tune(options: argparse.Namespace) -> int:
    from pathlib import Path

    from wml_ray.config import load
    from wml_ray.space import load_space

    base = load(options.config, options.overrides)
    space = load_space(options.space, base)
    search = search_of(options, base)
    if options.dry_run:
        from wml_ray.tune import dry_run

        return _show_findings(dry_run(space, search))
    keys, epochs = len(space.searched), base.optim.epochs
    _print(f"study {search.study}: {search.trials} trials of {epochs} epochs, {keys} keys searched")
    from wml_ray.progress import StudyProgress
    from wml_ray.sweep import start_points
    from wml_ray.tune import tune

    start = start_points(Path(options.start), space) if options.start else []
    with nullcontext() if options.verbose else StudyProgress() as progress:
        outcome = tune(space, search, progress, start, options.warm_start, options.verbose)
    if outcome.study is None:
        _say_undelivered(outcome.folder)
        return FAILED
    if not outcome.trained_now:
        _print("this study has finished before; here is its result (a larger --trials adds the difference)")
    _show_study(outcome.study)
    for path in outcome.files:
        _print(f"wrote {path}")
    _print(f"MLflow      {outcome.tracked.command}")
    if (outcome.folder / "config.yaml") not in outcome.files:
        print("wml-ray: no trial reached its full budget; why is in the report", file=sys.stderr)
        return FAILED
    _print(f"best        wml-ray train {outcome.folder / 'config.yaml'}")
    return OK


def _report(options: argparse.Namespace) -> int:
    from pathlib import Path

    from rich.console import Console

    from wml_ray import records
    from wml_ray.report import runs_table, write_comparison

    folder = Path(options.out) / options.experiment
    study = records.study(options.experiment) if records.is_study(options.experiment) else None
    runs = study.trials if study else records.finished_runs(options.experiment)
    if options.csv:
        runs.drop(columns="peers").to_csv(sys.stdout, index=False)
        return OK
    if study:
        from wml_ray.study_report import write_study

        _show_study(study)
        files = write_study(study, folder)
        records.attach_report(options.experiment, files)
    else:
        Console().print(runs_table(runs))
        files = write_comparison(runs, folder)
    for path in files:
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
        _say_undelivered(folder / "result.json")


def _show_findings(findings: Iterable[Finding]) -> int:
    wrong = 0
    for finding in findings:  # as they come: a node may take a while to answer
        wrong += not finding.fine
        _print(f"{finding.subject:<11} {'ok' if finding.fine else 'NO'}  {finding.text}")
    _print(f"{wrong} to mend" if wrong else "ready; nothing was started")
    return USER_ERROR if wrong else OK


def _show_study(study: Study) -> None:
    from rich.console import Console

    from wml_ray.study_tables import front_table, trials_summary

    console = Console()
    _print(trials_summary(study))
    console.print(front_table(study, console.width))


def _say_undelivered(place: Path) -> None:
    print(
        f"wml-ray: MLflow does not answer; every metric is in {place}: run the same command again when it is back, and "
        "they are delivered",
        file=sys.stderr,
    )


def _print(line: str) -> None:
    print(line, flush=True)


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
