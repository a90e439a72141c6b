"""Runs and studies as Ray jobs: what is sent to a cluster, how it is followed and stopped, and what it does there."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from wml_ray import cli
from wml_ray.config import Config, UserError, load

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
PASSED_ON = (
    *("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("MLFLOW_TRACKING_INSECURE_TLS", "MLFLOW_S3_ENDPOINT_URL", "OPTUNA_STORAGE"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
)
ENVIRONMENT = ".wml_ray-environment.json"
PLACE = "WML_RAY_PLACE"  # HOST:FOLDER a job was submitted from
LEFT_OUT = (
    *(".*", "__pycache__", "*.pyc", "*.egg-info", "node_modules"),
    *("mlruns", "mlartifacts", "*.db", "*.db-*", "*.sqlite*"),
)
LEFT_OUT_AT_TOP = ("results", "data", "outputs", "reports", "tests", "docs", "deploy", "benchmarks", "build")
MAX_BYTES = 50 * 10**6
STOP_S = 30  # Ray kills a job that has not ended this long after it was asked to
ANSWER_S = 8.0
SILENCE_S = 60.0  # how long a follower bears a cluster that does not answer
NAME_KEY, FOLDER_KEY = "wml_ray.job", "wml_ray.folder"


@dataclass(frozen=True)
class Work:
    """A run or a study that a cluster is asked for, checked on this machine."""

    name: str  # run id, or the study's name: the job is called so
    folder: str  # no two jobs may work in it
    verb: str
    config: Config
    words: list[str]  # arguments of the verb, with the names its files have in the package
    files: dict[str, Path]  # those files
    environment: dict[str, str]  # passed on to the job, secrets among it


@dataclass(frozen=True)
class Package:
    """The working directory of a job, as one zip file."""

    path: Path
    files: int
    size_bytes: int


def work_of(verb: str, words: Sequence[str], root: Path = ROOT) -> Work:
    """Raises:
    UserError: a mistake in the config, the space or the settings of the search.
    """
    options = cli._parse([verb, *words])
    config = load(options.config, options.overrides)
    environment = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
    command, files = list(words), {}
    for kind in ("config", "space", "start"):
        if given := getattr(options, kind, None):
            path = Path(given).resolve()
            name = str(path.relative_to(root)) if path.is_relative_to(root) else f"submitted/{kind}/{path.name}"
            files[name] = path
            command = [_replaced(word, given, name) for word in command]
    if verb == "train":
        return Work(config.run_id, str(config.run_folder), verb, config, command, files, environment)
    study = _checked_study(options, config)
    if options.storage:  # a command line is there for all to read, and the address may hold a password
        environment["OPTUNA_STORAGE"] = options.storage
        command = _without_option(command, options.storage)
    if not options.study:
        command += ["--study", study]
    return Work(study, str(Path(config.run.storage_path) / study), verb, config, command, files, environment)


def _checked_study(options: Any, config: Config) -> str:
    """Name of the study, after all that can be checked without a cluster."""
    from wml_ray.space import check_stop_metric, load_space, search_config
    from wml_ray.sweep import start_points

    space = load_space(options.space, config)
    study = options.study or f"{config.run.name}-{Path(options.space).stem}"
    settings = {key: getattr(options, key) for key in cli.SEARCH_OPTIONS}
    settings = {key: value for key, value in settings.items() if value is not None}
    check_stop_metric(search_config(study=study, trials=options.trials, **settings), space)
    if options.start:
        start_points(Path(options.start), space)
    return study


def _replaced(word: str, given: str, name: str) -> str:
    option, equals, value = word.partition("=")
    if word.startswith("--") and equals and value == given:
        return f"{option}={name}"
    return name if word == given else word


def _without_option(words: Sequence[str], value: str) -> list[str]:
    """`words` without the option that has this value, in one word or in two."""
    kept: list[str] = []
    for word in words:
        if word == value and kept and kept[-1].startswith("--"):
            kept.pop()
        elif not (word.startswith("--") and word.endswith(f"={value}")):
            kept.append(word)
    return kept


def pack(work: Work, target: Path, exclude: Sequence[str] = (), root: Path = ROOT) -> Package:
    """Write the job's working directory to the zip file `target`: the code and the files of the work, nothing else.

    The same content gives the same bytes, so that Ray uploads it once.

    Raises:
        UserError: it is larger than a job's working directory should be.
    """
    outputs = {Path(work.config.run.storage_path).resolve(), Path(work.config.data.root).resolve()}
    files = {str(path.relative_to(root)): path for path in _code(root, outputs, exclude)} | work.files
    size_bytes = sum(path.stat().st_size for path in files.values())
    if size_bytes > MAX_BYTES:
        largest, its_bytes = _largest(files)
        raise UserError(
            f"{root} has {size_bytes / 1e6:.0f} MB to send to the cluster, most of it in {largest} "
            f"({its_bytes / 1e6:.0f} MB); at most {MAX_BYTES / 1e6:.0f} MB are sent: move it elsewhere, or leave it "
            f"out with --exclude {largest}"
        )
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in sorted(files.items()):
            _add(archive, name, path.read_bytes(), 0o755 if os.access(path, os.X_OK) else 0o644)
        if work.environment:
            _add(archive, ENVIRONMENT, json.dumps(work.environment, sort_keys=True).encode(), 0o600)
    return Package(target, len(files), target.stat().st_size)


def _add(archive: zipfile.ZipFile, name: str, content: bytes, mode: int) -> None:
    entry = zipfile.ZipInfo(name)  # dated 1980, whenever it is packed
    entry.external_attr = mode << 16
    archive.writestr(entry, content, zipfile.ZIP_DEFLATED)


def _code(root: Path, outputs: set[Path], exclude: Sequence[str]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        patterns = (*LEFT_OUT, *exclude, *(LEFT_OUT_AT_TOP if here == root else ()))

        def kept(name: str, here: Path = here, patterns: tuple[str, ...] = patterns) -> bool:
            return not any(fnmatch(name, pattern) for pattern in patterns) and (here / name).resolve() not in outputs

        folders[:] = [name for name in folders if kept(name) and not _is_environment(here / name)]
        yield from (here / name for name in names if kept(name) and (here / name).is_file())


def _is_environment(folder: Path) -> bool:
    return (folder / "pyvenv.cfg").exists() or (folder / "conda-meta").exists()


def _largest(files: Mapping[str, Path]) -> tuple[str, int]:
    """The folder at the top, or the file, that weighs most."""
    sizes: Counter[str] = Counter()
    for name, path in files.items():
        sizes[Path(name).parts[0]] += path.stat().st_size
    return sizes.most_common(1)[0]


def check_image(work: Work) -> None:
    """Raises:
    UserError: the work would miss its files in a container, or leave its results there.
    """
    outside = [str(path) for name, path in work.files.items() if name.startswith("submitted/")]
    if outside:
        raise UserError(f"--image: {outside[0]} is not in the image; move it into the repository, and build it anew")
    if "://" not in work.config.run.storage_path:
        raise UserError(
            f"--image: run.storage_path = {work.config.run.storage_path} would vanish with the container; give an "
            "address such as s3://BUCKET/FOLDER, or start the nodes themselves from the image (KubeRay does)"
        )


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the cluster's job server: at `address`, or where Ray's own variables say, or on this machine.

    Raises:
        UserError: no such address, nobody answers there, or the cluster does not accept our token.
    """
    logging.disable(logging.WARNING)  # Ray's remarks on addresses and tokens: what matters becomes a sentence
    where = address or next((os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)), DASHBOARD)
    where = DASHBOARD if where == "auto" else where
    if "://" not in where:
        raise UserError(
            f"'{where}' is no address of a Ray dashboard; give --address http://HOST:8265 (jobs do not go to the port "
            "that nodes join)"
        )
    os.environ[ADDRESS_VARIABLES[0]] = where  # it would win over an address that the client is given
    _check_answers(where)
    with _cluster_errors(where):
        try:
            return JobSubmissionClient(where)
        except AuthenticationError:
            token, _ = _token()
            if not token:
                raise
            return JobSubmissionClient(where, headers={"Authorization": f"Bearer {token}"})


def _check_answers(address: str) -> None:
    """An address that swallows packets would hold up Ray's client for minutes."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https"):
        return
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=ANSWER_S).close()
    except (OSError, ValueError) as error:
        raise _unreachable(address, error) from None


def _unreachable(address: str, error: Exception) -> UserError:
    return UserError(
        f"no Ray cluster answers at {address} ({_first_line(error)}); start one with `ray start --head`, or give "
        "--address http://HOST:8265 of its dashboard (through an SSH tunnel or kubectl port-forward, if need be)"
    )


@contextmanager
def _cluster_errors(address: str) -> Iterator[None]:
    """What Ray's client raises, as a sentence with the mend."""
    try:
        yield
    except AuthenticationError:
        raise UserError(_token_sentence(address)) from None
    except (OSError, aiohttp.ClientError) as error:  # what `requests` raises is an OSError
        raise _unreachable(address, error) from None
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"the cluster at {address} refused: {_last_line(error)}") from None


def _token_sentence(address: str) -> str:
    token, source = _token()
    said = f"does not accept the token of {source}" if token else "asks for a token, and there is none here"
    return (
        f"the Ray cluster at {address} {said}; `ray get-auth-token` on its head node prints the right one: put it into "
        "~/.ray/auth_token or RAY_AUTH_TOKEN here"
    )


def _token() -> tuple[str, str]:
    """Ray's token on this machine and where it is from, in Ray's order; found also without RAY_AUTH_MODE=token."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(given) if given else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text().strip(), str(path)
    except OSError:
        return "", str(path)


def runtime_env(work: Work, package: Package | None, image: str | None, packages: bool) -> dict[str, Any]:
    """What the job's processes start in. Ray logs `env_vars` on every node, so no secret is among them."""
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S), PLACE: f"{socket.gethostname()}:{Path.cwd()}"}
    if image:
        return {"image_uri": image, "env_vars": variables}
    settings: dict[str, Any] = {"working_dir": str(package.path) if package else None, "env_vars": variables}
    if work.environment:
        settings["worker_process_setup_hook"] = "wml_ray.submission.take_environment"
    if packages:
        lock = "-r ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/requirements.lock"  # too long for the variable Ray puts it in
        settings["pip"] = {"packages": [lock], "pip_check": False}
    return settings


def submit(
    client: JobSubmissionClient,
    work: Work,
    image: str | None = None,
    packages: bool = False,
    exclude: Sequence[str] = (),
) -> str:
    """Submit the work, or find the job that is at it; returns the job's id.

    Raises:
        UserError: the package is too large, the image will not do, or the cluster refuses the job.
    """
    entrypoint = shlex.join(["python", f"jobs/{work.verb}.py", *work.words])
    if image:
        check_image(work)
    with tempfile.TemporaryDirectory() as folder, _cluster_errors(client.get_address()):
        package = None
        while True:
            jobs = _jobs(client)
            if active := [job for job in jobs if _is_same(job, work) and not job.status.is_terminal()]:
                _say_attached(active[0], entrypoint)
                return str(active[0].submission_id)
            if not image and package is None:
                package = pack(work, Path(folder) / "package.zip", exclude)
            job_id = _free_id(work.name, jobs)
            if _submitted(client, job_id, entrypoint, work, runtime_env(work, package, image, packages)):
                _say_submitted(client, job_id, work, package)
                return job_id


def _submitted(client: Any, job_id: str, entrypoint: str, work: Work, environment: dict[str, Any]) -> bool:
    """False where somebody else was quicker: Ray gives an id once."""
    metadata = {NAME_KEY: work.name, FOLDER_KEY: work.folder}
    try:
        client.submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env=environment, metadata=metadata)
    except RuntimeError as error:
        if "already exists" not in str(error):
            raise
        return False
    return True


def _jobs(client: Any) -> list[JobDetails]:
    """Submitted jobs, the newest first."""
    jobs = [job for job in client.list_jobs() if job.submission_id]
    return sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)


def _is_same(job: JobDetails, work: Work) -> bool:
    return bool((job.metadata or {}).get(FOLDER_KEY) == work.folder)


def _free_id(name: str, jobs: Sequence[JobDetails]) -> str:
    taken = {job.submission_id for job in jobs}
    return next(job_id for job_id in _ids(name) if job_id not in taken)


def _ids(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{number}" for number in count(2))


def _say_attached(job: JobDetails, entrypoint: str) -> None:
    _print(f"job         {job.submission_id} is {job.status} already; nothing was submitted")
    if job.entrypoint != entrypoint:
        _print(f"its command {job.entrypoint}")


def _say_submitted(client: Any, job_id: str, work: Work, package: Package | None) -> None:
    _print(f"job         {job_id} on {client.get_address()}")
    if package:
        _print(f"package     {package.files} files, {package.size_bytes / 1e6:.1f} MB")
    if work.environment:
        what = "passed on  " if package else "NOT passed on, as Ray would log it: set it in the image or on the nodes:"
        _print(f"{what} {', '.join(sorted(work.environment))}")
    if work.verb == "train" and work.config.scale.workers == 0:
        _print("note        scale.workers = 0 trains on the head node, and reserves nothing there; see scale.workers=1")


def follow(client: JobSubmissionClient, job_id: str) -> int:
    """Show the job's log until it has ended; 0 if it succeeded, else 1.

    Raises:
        UserError: the cluster is gone.
    """
    printed, answered_s = 0, time.monotonic()
    while True:
        try:
            printed = asyncio.run(_tail(client, job_id, printed))
            job = client.get_job_info(job_id)
            answered_s = time.monotonic()
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            if time.monotonic() - answered_s > SILENCE_S:
                raise _unreachable(client.get_address(), error) from None
        else:
            if job.status.is_terminal():
                return _say_ended(job)
        time.sleep(1)


async def _tail(client: Any, job_id: str, printed: int) -> int:
    """Print what comes behind the first `printed` characters of the log; returns how many it has now."""
    seen = 0
    async for text in client.tail_job_logs(job_id):
        fresh = text[max(0, printed - seen) :]
        seen += len(text)
        if fresh:
            print(fresh, end="", flush=True)
    return max(seen, printed)


def _say_ended(job: JobDetails) -> int:
    _print(f"job         {job.submission_id} {job.status}")
    if job.driver_exit_code == 127:
        _print("            the head node has no `python`: activate the environment there before `ray start --head`")
    elif job.status == JobStatus.FAILED and job.driver_exit_code is None:
        _print(f"            {_last_line(job.message or '')}")
    return cli.OK if job.status == JobStatus.SUCCEEDED else cli.FAILED


def find(client: JobSubmissionClient, name: str) -> JobDetails:
    """The newest job of a run id or study, or the job of exactly this id.

    Raises:
        UserError: there is none.
    """
    with _cluster_errors(client.get_address()):
        jobs = _jobs(client)
    named = [job for job in jobs if (job.metadata or {}).get(NAME_KEY) == name]
    found = [job for job in named if not job.status.is_terminal()] + named
    found += [job for job in jobs if job.submission_id == name]
    if not found:
        known = ", ".join(str(job.submission_id) for job in jobs[:5]) or "none"
        raise UserError(f"no job '{name}' on {client.get_address()}; the newest jobs there: {known}")
    return found[0]


def stop(client: JobSubmissionClient, name: str) -> int:
    """Ask a job to end as Ctrl-C would, and wait until it has."""
    job = find(client, name)
    with _cluster_errors(client.get_address()):
        client.stop_job(job.submission_id)
        deadline_s = time.monotonic() + STOP_S + 15
        while not job.status.is_terminal() and time.monotonic() < deadline_s:
            time.sleep(0.2)
            job = client.get_job_info(job.submission_id)
    _print(f"job         {job.submission_id} {job.status}")
    return cli.OK if job.status.is_terminal() else cli.FAILED


def status(client: JobSubmissionClient, name: str) -> int:
    """Say how a job is doing."""
    job = find(client, name)
    end_s = (job.end_time or time.time() * 1000) / 1000
    start_s = (job.start_time or end_s * 1000) / 1000
    _print(f"job         {job.submission_id} {job.status}")
    _print(f"started     {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(start_s))}, {end_s - start_s:.0f} s")
    _print(f"command     {job.entrypoint}")
    if job.status == JobStatus.PENDING and job.message:
        _print(f"            {_last_line(job.message)}")
    return cli.OK


def how_to_go_on(job_id: str, address: str | None) -> list[str]:
    """Lines for somebody who does not follow the job (any more)."""
    behind = f" --address {address}" if address else ""
    return [
        "follow      the same command again (without --detach)",
        f"status      python jobs/submit.py status {job_id}{behind}",
        f"stop        python jobs/submit.py stop {job_id}{behind}",
    ]


def on_cluster(verb: str, words: Sequence[str]) -> int:
    """The verb as a job's command: `words` as for `wml-ray`, from a working directory that Ray may have made."""
    try:
        take_environment()
        words = _move_to_place(words)
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
            from wml_ray.ray_train import join_cluster

            join_cluster("--verbose" in words)  # ray.init puts a SIGTERM handler of its own in place of ours
        _end_as_by_ctrl_c()
        return cli.main([verb, *words])
    except UserError as error:
        print(f"wml-ray: {error}", file=sys.stderr)
        return cli.USER_ERROR
    except ModuleNotFoundError as error:
        print(
            f"wml-ray: this cluster's Python has no package '{error.name}'; start its nodes from an environment or "
            "image with requirements.lock installed, or submit with --packages",
            file=sys.stderr,
        )
        return cli.USER_ERROR
    except KeyboardInterrupt:
        return cli.FAILED


def take_environment() -> None:
    """Set what the submitter passed on. Ray calls this in every worker of a job, `on_cluster` in its driver."""
    path = Path(__file__).resolve().parent.parent / ENVIRONMENT
    if path.exists():
        os.environ.update(json.loads(path.read_text()))


def _move_to_place(words: Sequence[str]) -> list[str]:
    """Leave a working directory that Ray made and will delete, so that relative folders and mlflow.db outlive the job.

    They are taken from the folder the job was submitted from, if that is on this machine, else from ~/wml_ray_jobs.
    """
    if "working_dir_files" not in Path.cwd().parts:
        return list(words)
    words = [_with_whole_path(word) for word in words]
    host, _, folder = os.environ.get(PLACE, "").partition(":")
    here = host == socket.gethostname() and os.access(folder, os.W_OK)
    place = Path(folder) if here else Path.home() / "wml_ray_jobs"
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)
    _print(f"relative folders are in {place}")
    return words


def _with_whole_path(word: str) -> str:
    """The word, with the whole path of the file that it names, alone or behind `--option=`."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{Path(value).resolve()}" if value and Path(value).is_file() else word


def _end_as_by_ctrl_c() -> None:
    """`ray job stop` sends SIGTERM; what Ctrl-C leaves behind (KILLED in MLflow, a checkpoint) is right for it too.

    Ray Train's own handler of Ctrl-C is passed by: it takes longer than the 3 s that Ray gives a job by default, and
    the actors of a job end with its driver.
    """

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _last_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]


def _print(line: str) -> None:
    print(line, flush=True)
