"""Submit a run or a study to a Ray cluster, follow it, stop it, ask after it.

python jobs/submit.py train jobs/quickstart.yaml scale.workers=2
python jobs/submit.py tune jobs/search.yaml --space tune_spaces/pareto.py --trials 20 --detach
python jobs/submit.py status wml-pareto
python jobs/submit.py stop wml-pareto
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wml_ray.cli.output import reader_has_left
from wml_ray.errors import UserError
from wml_ray.submit.client import connect
from wml_ray.submit.jobs import follow, how_to_go_on, list_jobs, status, stop, submit
from wml_ray.submit.package import work_of


def main(arguments: list[str] | None = None) -> int:
    options, words = _parser().parse_known_args(arguments)
    try:
        if options.verb in ("stop", "status"):
            if words:
                raise UserError(f"unrecognized arguments: {' '.join(words)}; see jobs/submit.py {options.verb} --help")
            client = connect(options.address)
            if options.job is None:
                return list_jobs(client)
            return (stop if options.verb == "stop" else status)(client, options.job)
        return _submit(options, words)
    except UserError as error:
        print(f"submit: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if not reader_has_left():
            raise
        return 1


def _submit(options: argparse.Namespace, words: list[str]) -> int:
    work = work_of(options.verb, words)
    client = connect(options.address)
    job_id = submit(client, work, options.image, options.packages, options.exclude)
    try:
        if not options.detach:
            return follow(client, job_id)
    except KeyboardInterrupt:
        print(f"\nno longer following; {job_id} goes on", file=sys.stderr)
    print("\n".join(how_to_go_on(job_id, options.address)))
    return 0 if options.detach else 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog.partition(' ')[0]} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jobs/submit.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", metavar="{train,tune,stop,status}", required=True)
    for verb in ("train", "tune"):
        one = verbs.add_parser(
            verb, help=f"as wml-ray {verb}, on a cluster", allow_abbrev=False, usage="%(prog)s CONFIG ... [options]"
        )
        one.description = f"CONFIG and all else as for wml-ray {verb}; submitted twice, it is one job."
        environment = one.add_mutually_exclusive_group()
        environment.add_argument("--image", metavar="IMAGE", help="run in this image, which holds the repository")
        environment.add_argument("--packages", action="store_true", help="install requirements.lock on the nodes first")
        one.add_argument("--exclude", metavar="NAME", action="append", default=[], help="file or folder not to send")
        one.add_argument("--detach", action="store_true", help="do not follow the log")
    text = "end a job as Ctrl-C would"
    verbs.add_parser("stop", help=text, description=text).add_argument("job", help="run id, study, or job id")
    text = "say how a job is doing, or list the newest jobs"
    status = verbs.add_parser("status", help=text, description=text)
    status.add_argument("job", nargs="?", help="run id, study, or job id (all, if none is given)")
    for one in verbs.choices.values():
        one.add_argument("--address", metavar="URL", help="Ray dashboard ($RAY_API_SERVER_ADDRESS, $RAY_ADDRESS)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
