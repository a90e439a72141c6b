"""The options of the command line."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any, NoReturn

from wml_ray.cli.output import USER_ERROR

if TYPE_CHECKING:
    from wml_ray.config.schema import Config
    from wml_ray.search.settings import SearchConfig


SEARCH_OPTIONS = (
    *("sampler", "scheduler", "stop_metric", "grace_epochs", "reduction_factor", "concurrent", "keep_stopped"),
    "seed",
)


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
    for name, text in (
        ("plan", "show what a run would be: peers, params, MACs, memory, resources, run id; trains nothing"),
        ("train", "train, or resume the same run if it was interrupted"),
    ):
        one = verbs.add_parser(name, help=text, description=text)
        _add_config(one)
        text = "decode every image of data.name=imagefolder first, and list all that cannot be decoded"
        one.add_argument("--check-data", action="store_true", help=text)
        one.set_defaults(verb=name)
    _add_dry_run(one)
    _add_tune(verbs)
    text = "tables and pictures of a study, or of the finished runs of an MLflow experiment"
    report = verbs.add_parser("report", help=text, description=text)
    report.add_argument("experiment", metavar="EXPERIMENT", help="name of the study, or run.name in the config")
    report.add_argument("--out", metavar="FOLDER", default="reports", help="where the files go (reports/)")
    report.add_argument("--csv", action="store_true", help="print the table as CSV, every metric and key, and no more")
    report.set_defaults(verb="report")
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
    tune.add_argument("--stop-metric", metavar="M", help="metric that decides (val/accuracy/method)")
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
    tune.set_defaults(verb="tune")


def search_settings(options: argparse.Namespace, base: Config) -> SearchConfig:
    """How `wml-ray tune` is to search, from its options.

    Raises:
        UserError: a value outside its range.
    """
    from pathlib import Path

    from wml_ray.search.settings import search_config

    study = options.study or f"{base.run.name}-{Path(options.space).stem}"
    settings = {"study": study, "trials": options.trials}
    settings["storage"] = options.storage or os.environ.get("OPTUNA_STORAGE")
    settings |= {key: getattr(options, key) for key in SEARCH_OPTIONS}
    return search_config(**{key: value for key, value in settings.items() if value is not None})
