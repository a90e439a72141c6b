"""The options of the command line."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from wml_ray.cli.choose import add_evaluate, add_pick
from wml_ray.cli.exit_codes import USER_ERROR
from wml_ray.cli.export import add_export, add_register
from wml_ray.cli.shard import add_shard

if TYPE_CHECKING:
    from wml_ray.config.schema import Config
    from wml_ray.search.settings import CompareConfig, SearchConfig


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line. `key=value` may stand anywhere after the config, also after options.

    `command` is the first word, `verb` is train, tune or compare (`wml-ray submit tune`: submit and tune), `words` is
    the whole line.
    """
    parser = _parser()
    words = sys.argv[1:] if arguments is None else arguments
    options, rest = parser.parse_known_args(words)
    if rest and not (hasattr(options, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    options.words = words
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
    _add_plan(verbs)
    _add_train(verbs)
    _add_tune(verbs)
    _add_compare(verbs)
    text = "tables and pictures of a study, or of the finished runs of an MLflow experiment"
    report = verbs.add_parser("report", help=text, description=text)
    report.add_argument("experiment", metavar="EXPERIMENT", help="name of the study, or run.name in the config")
    report.add_argument("--out", metavar="FOLDER", default="reports", help="folder of the files (reports/)")
    text = "compare the finished runs that differ in this key and in the seed; may be repeated"
    report.add_argument("--group-by", metavar="KEY", action="append", default=[], help=text)
    report.add_argument("--csv", action="store_true", help="print only the table, as CSV with every metric and key")
    report.set_defaults(command="report")
    add_pick(verbs)
    add_evaluate(verbs)
    add_export(verbs)
    add_register(verbs)
    add_shard(verbs)
    _add_submit(verbs)
    _add_jobs(verbs)
    return parser


def _add_config(parser: argparse.ArgumentParser, verb: str) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, see jobs/")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="config keys, such as wml.alpha=0.3")
    parser.set_defaults(command=verb, verb=verb)


def _add_plan(verbs: Any) -> None:
    text = "show the peers, params, MACs, memory, resources and id of a run; trains nothing"
    plan = verbs.add_parser("plan", help=text, description=text)
    _add_config(plan, "plan")
    _add_check_data(plan)
    text = "predict a step of scale.workers=N whose links have this bandwidth; times some steps on this machine"
    plan.add_argument("--bandwidth-gbit", metavar="G", type=float, help=text)


def _add_train(verbs: Any) -> argparse.ArgumentParser:
    text = "train, or resume the same run if it was interrupted"
    train: argparse.ArgumentParser = verbs.add_parser("train", help=text, description=text)
    _add_config(train, "train")
    _add_check_data(train)
    _add_dry_run(train)
    return train


def _add_check_data(parser: argparse.ArgumentParser) -> None:
    text = "first decode every image of data.name=imagefolder, and list all that cannot be decoded"
    parser.add_argument("--check-data", action="store_true", help=text)


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    text = "check the cluster, storage, MLflow and data, report every problem, and start nothing"
    parser.add_argument("--dry-run", action="store_true", help=text)


def _add_tune(verbs: Any) -> argparse.ArgumentParser:
    text = "search config keys: many trials, Ray Tune and Optuna; the same command continues or extends a study"
    tune: argparse.ArgumentParser = verbs.add_parser("tune", help=text, description=text)
    _add_config(tune, "tune")
    tune.add_argument("--space", metavar="FILE", required=True, help="Python file of domains and objectives")
    tune.add_argument(
        "--trials", metavar="N", type=int, required=True, help="trials of the study, earlier ones included"
    )
    tune.add_argument("--study", metavar="NAME", help="its name (run.name and the space's, such as wml-smoke)")
    samplers, schedulers = ("tpe", "gp", "cmaes", "nsga2", "grid", "random"), ("asha", "hyperband", "median", "none")
    tune.add_argument("--sampler", choices=samplers, help="Optuna's sampler (tpe)")
    tune.add_argument("--scheduler", choices=schedulers, help="early stopping of trials (asha)")
    tune.add_argument("--stop-metric", metavar="M", help="metric of early stopping (val/accuracy/method)")
    tune.add_argument(
        "--grace-epochs", metavar="N", type=int, help="epochs before a trial can be stopped (root of all)"
    )
    tune.add_argument("--reduction-factor", metavar="N", type=int, help="keep one trial in N at a rung (3)")
    tune.add_argument("--storage", metavar="URL", help="Optuna storage to share the study ($OPTUNA_STORAGE, or none)")
    tune.add_argument("--concurrent", metavar="N", type=int, help="trials at a time (as many as the cluster holds)")
    tune.add_argument("--keep-stopped", action="store_true", default=None, help="keep checkpoints of stopped trials")
    tune.add_argument("--seed", metavar="N", type=int, help="seed of the sampler (0)")
    tune.add_argument("--start", metavar="FILE", help="YAML list of points to try first, such as [{wml.alpha: 0.3}]")
    tune.add_argument("--warm-start", metavar="STUDY", action="append", default=[], help="learn from an earlier study")
    tune.add_argument("--verbose", action="store_true", help="Ray's own output")
    _add_dry_run(tune)
    return tune


def _add_compare(verbs: Any) -> argparse.ArgumentParser:
    text = "compare methods over seeds; the same command continues a comparison, or adds methods, keys and seeds to it"
    compare: argparse.ArgumentParser = verbs.add_parser("compare", help=text, description=text)
    _add_config(compare, "compare")
    compare.add_argument("--methods", metavar="A,B", required=True, help="methods; differences are those to the first")
    compare.add_argument("--seeds", metavar="N", type=int, help="seeds of each method, from the config's on (3)")
    text = "a further row for each value, such as wml.alpha=0.1,0.3; may be repeated"
    compare.add_argument("--key", metavar="KEY=VALUE", action="append", default=[], help=text)
    text = "first search each row's own small space with N trials, on validation images of another seed"
    compare.add_argument("--tune", metavar="N", type=int, help=text)
    compare.add_argument("--study", metavar="NAME", help="name of the comparison (run.name, such as wml-compare)")
    compare.add_argument("--concurrent", metavar="N", type=int, help="runs at a time (as many as the cluster holds)")
    compare.add_argument("--verbose", action="store_true", help="Ray's own output")
    _add_dry_run(compare)
    return compare


def _add_submit(verbs: Any) -> None:
    text = "train, tune or compare as a job on a Ray cluster, and follow its log; submitted twice, it is one job"
    submit = verbs.add_parser("submit", help=text, description=text)
    works = submit.add_subparsers(metavar="{train,tune,compare}", required=True)
    for parser in (_add_train(works), _add_tune(works), _add_compare(works)):
        parser.description = (
            f"{text}. Sent are wml_ray/, jobs/, tune_spaces/, the config with all overrides, the space, the start "
            "points, and the modules or packages of a backbone, method or teacher of your own; any other file that the "
            "job needs is sent with --include."
        )
        environment = parser.add_mutually_exclusive_group()
        environment.add_argument("--image", metavar="IMAGE", help="run in this image, which holds the repository")
        environment.add_argument("--packages", action="store_true", help="install requirements.lock on the nodes first")
        text = "further file or folder to send, such as modules your own code imports; may be repeated"
        parser.add_argument("--include", metavar="PATH", action="append", default=[], help=text)
        parser.add_argument("--detach", action="store_true", help="do not follow the log")
        _add_address(parser)
        parser.set_defaults(command="submit")


def _add_jobs(verbs: Any) -> None:
    text = "status, log and end of jobs on a Ray cluster"
    jobs = verbs.add_parser("jobs", help=text, description=text)
    actions = jobs.add_subparsers(metavar="{status,stop,logs}", required=True)
    for action, text, count in (
        ("status", "state of one job, or the newest jobs", "?"),
        ("stop", "end a job as Ctrl-C would", None),
        ("logs", "print the log of a job", None),
    ):
        parser = actions.add_parser(action, help=text, description=text)
        parser.add_argument("name", metavar="NAME", nargs=count, help="run id, study, or job id")
        _add_address(parser)
        parser.set_defaults(command="jobs", action=action)
    parser.add_argument("--follow", action="store_true", help="continue until the job ends")


def _add_address(parser: argparse.ArgumentParser) -> None:
    text = "Ray dashboard, such as http://HOST:8265 ($RAY_API_SERVER_ADDRESS, or that of the cluster at $RAY_ADDRESS)"
    parser.add_argument("--address", metavar="URL", help=text)


def search_settings(options: argparse.Namespace, base: Config) -> SearchConfig:
    """The search settings that the options of `wml-ray tune` give.

    Raises:
        UserError: a value outside its range, or an address of a storage with a password.
    """
    from pathlib import Path

    from wml_ray.errors import UserError
    from wml_ray.search.settings import SearchConfig
    from wml_ray.tracking.client import redacted

    if options.storage and redacted(options.storage) != options.storage:
        raise UserError(
            "--storage: an address with a user, a password or a query would appear in `ps` and in Ray's list of jobs; "
            "give it in the environment, in OPTUNA_STORAGE"
        )
    study = options.study or f"{base.run.name}-{Path(options.space).stem}"
    settings = {key: getattr(options, key) for key in SearchConfig.model_fields}
    settings |= {"study": study, "storage": options.storage or os.environ.get("OPTUNA_STORAGE")}
    return SearchConfig(**{key: value for key, value in settings.items() if value is not None})


def compare_settings(options: argparse.Namespace, base: Config) -> CompareConfig:
    """The settings that the options of `wml-ray compare` give.

    The figures of a file `<config>.published.csv` beside the config are part of them.

    Raises:
        UserError: a value outside its range.
    """
    from wml_ray.search.settings import CompareConfig
    from wml_ray.storage.paths import to_path

    config = to_path(options.config)
    published = config.with_name(f"{config.stem}.published.csv")
    settings = {
        "study": options.study or f"{base.run.name}-compare",
        "methods": options.methods.split(","),
        "seeds": options.seeds,
        "keys": options.key,
        "tune": options.tune,
        "concurrent": options.concurrent,
        "published": published.read_text(encoding="utf-8") if published.exists() else "",
    }
    return CompareConfig(**{key: value for key, value in settings.items() if value is not None})
