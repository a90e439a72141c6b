"""The files and the description of a job, as they are sent to a cluster."""

import json
import os
import socket
from pathlib import Path

import pytest

from wml_ray.cli.job import job_from_options
from wml_ray.cli.options import parse_arguments
from wml_ray.cli.submit import shown_command
from wml_ray.config.load import load_config, parse_config
from wml_ray.errors import UserError
from wml_ray.submit.entry import ENVIRONMENT_FILE, SUBMITTED_FROM, leave_ray_working_dir
from wml_ray.submit.job import Job
from wml_ray.submit.jobs import runtime_env, submit
from wml_ray.submit.package import write_package

ROOT = Path(__file__).parents[2]
TUNE = ["tune", str(ROOT / "jobs" / "search.yaml"), "--space", str(ROOT / "tune_spaces" / "smoke.py"), "--trials", "2"]
SECRET = "unlikely-word-4711"


def files(package):
    return {str(path.relative_to(package.folder)) for path in package.folder.rglob("*") if path.is_file()}


@pytest.fixture
def repository(workplace):
    """A small one, with files that must not be sent."""
    for name in (
        *(
            ".git/config",
            ".venv/bin/python",
            "data/digits.bin",
            "results/wml/model.bin",
            "mlflow.db",
            "tests/test_run.py",
        ),
        *("jobs/mlflow.db", "jobs/results/model.bin", "wml_ray/__pycache__/run.pyc", "mine/weights.bin"),
        *("wml_ray/run.py", "wml_ray/data/sets.py", "jobs/submit.py", "jobs/run.yaml", "tune_spaces/wide.py"),
    ):
        (workplace / name).parent.mkdir(parents=True, exist_ok=True)
        (workplace / name).write_text("")
    return workplace


CODE = {"wml_ray/run.py", "wml_ray/data/sets.py", "jobs/submit.py", "jobs/run.yaml", "tune_spaces/wide.py", "job.json"}


def test_the_package_has_the_code_and_the_job_and_neither_data_nor_results(repository, tmp_path_factory):
    package = write_package(Job("train", parse_config({})), tmp_path_factory.mktemp("package"), root=repository)
    assert files(package) == CODE
    assert package.num_files == len(CODE)


def test_included_files_keep_their_path_below_the_current_directory(repository, tmp_path_factory):
    (repository / "mine" / ".cache").mkdir()
    (repository / "mine" / ".cache" / "old").write_text("")
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "helpers.py"
    elsewhere.write_text("")
    package = write_package(
        Job("train", parse_config({})), tmp_path_factory.mktemp("package"), ["mine", str(elsewhere)], repository
    )
    assert files(package) == CODE | {"mine/weights.bin", "helpers.py"}
    with pytest.raises(UserError, match="nowhere cannot be sent to the cluster: No such file"):
        write_package(Job("train", parse_config({})), tmp_path_factory.mktemp("other"), ["nowhere"], repository)


@pytest.mark.parametrize(
    ("name", "backbone", "sent"),
    [
        ("beside_config.py", "beside_config", "beside_config.py"),
        ("own/net/__init__.py", "own.net", "own/net/__init__.py"),
    ],
)
def test_a_backbone_of_the_users_own_is_sent_as_it_is_imported(
    repository, tmp_path_factory, name, backbone, sent, monkeypatch
):
    monkeypatch.syspath_prepend(repository)  # restores sys.path
    folder = tmp_path_factory.mktemp("work")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("def stages(spec): ...\n")
    (folder / "config.yaml").write_text(
        f"model: {{backbone: '{backbone}:stages', sharing: [1]}}\npruning: {{ratios: [0]}}"
    )
    job = Job("train", load_config(folder / "config.yaml"))
    package = write_package(job, tmp_path_factory.mktemp("package"), root=repository)
    assert files(package) == CODE | {sent}


def test_a_teacher_of_the_users_own_is_sent(repository, tmp_path_factory, monkeypatch):
    monkeypatch.syspath_prepend(repository)
    folder = tmp_path_factory.mktemp("work")
    (folder / "own_teacher.py").write_text("def network(spec): ...\n")
    (folder / "config.yaml").write_text("teacher: {function: 'own_teacher:network'}")
    job = Job("train", load_config(folder / "config.yaml", ["method.name=kd"]))
    package = write_package(job, tmp_path_factory.mktemp("package"), root=repository)
    assert files(package) == CODE | {"own_teacher.py"}


def test_a_package_too_large_names_its_largest_part(repository, tmp_path_factory):
    with (repository / "mine" / "cat.mp4").open("wb") as file:
        file.truncate(60 * 10**6)
    with pytest.raises(UserError, match=r"60 MB to send .* in mine \(60 MB\); at most 50 MB .*--include less"):
        write_package(Job("train", parse_config({})), tmp_path_factory.mktemp("package"), ["mine"], repository)


def test_this_repository_is_small_to_send(tmp_path):
    package = write_package(Job("train", parse_config({})), tmp_path)
    assert {"wml_ray/cli/job.py", "jobs/quickstart.yaml", "requirements.lock", "job.json"} <= files(package)
    assert package.size_bytes < 2e6


def test_a_job_is_read_back_as_it_was_described(workplace, monkeypatch):
    monkeypatch.setenv("OPTUNA_STORAGE", "sqlite:///optuna.db")
    (workplace / "start.yaml").write_text("[{wml.alpha: 0.3}]")
    words = [
        *TUNE,
        "--start",
        "start.yaml",
        "--warm-start",
        "earlier",
        "--grace-epochs",
        "2",
        "optim.epochs=4",
        "seed=7",
    ]
    for arguments in (words, ["train", TUNE[1], "seed=7", "--dry-run", "--check-data"]):
        job = job_from_options(parse_arguments(arguments))
        again = Job.from_json(job.to_json())
        assert again.config == job.config
        assert (again.search, again.dry_run, again.check_data) == (job.search, job.dry_run, job.check_data)
        assert (again.name, again.folder) == (job.name, job.folder)
        assert list(again.start) == list(job.start)
        assert list(again.warm_start) == list(job.warm_start)
        assert (again.space is None) == (job.space is None)
        assert again.space is None or again.space.describe() == job.space.describe()


def test_a_password_in_the_storage_address_is_only_in_a_file_for_the_owner(monkeypatch, tmp_path):
    url = f"postgresql+psycopg://user:{SECRET}@host/database"
    monkeypatch.setenv("OPTUNA_STORAGE", url)
    options = parse_arguments(["submit", *TUNE, "seed=1"])
    job = job_from_options(options)
    assert job.search.storage == url
    package = write_package(job, tmp_path)
    assert SECRET not in job.to_json()
    assert shown_command(options).endswith("seed=1")
    for image in (None, "image"):
        assert SECRET not in json.dumps(runtime_env(package, image, False))
    file = package.folder / ENVIRONMENT_FILE
    assert json.loads(file.read_text())["OPTUNA_STORAGE"] == url
    assert file.stat().st_mode & 0o077 == 0
    assert not [name for name in files(package) - {ENVIRONMENT_FILE} if SECRET in (package.folder / name).read_text()]


def test_a_config_at_an_address_is_read_here(tmp_path):
    (tmp_path / "best.yaml").write_text("data: {batch_size: 32}\n")
    job = job_from_options(parse_arguments(["submit", "train", f"local://{tmp_path}/best.yaml", "optim.epochs=1"]))
    described = json.loads(job.to_json())["config"]
    assert (described["data"]["batch_size"], described["optim"]["epochs"]) == (32, 1)


def test_results_inside_the_container_of_an_image_are_refused():
    with pytest.raises(UserError, match=r"run\.storage_path = results would be lost with the container"):
        submit(None, Job("train", parse_config({})), "wml-ray submit", "image", False, [])


def test_files_that_an_image_cannot_be_given_are_refused(workplace, monkeypatch):
    monkeypatch.syspath_prepend(workplace)
    (workplace / "own_net.py").write_text("def stages(spec): ...\n")
    for backbone, include, named in (("resnet20", ["mine"], "mine"), ("own_net:stages", [], "own_net:stages")):
        job = Job("train", parse_config({"model": {"backbone": backbone}}))
        with pytest.raises(UserError, match=f"--image: {named} cannot be sent with an image"):
            submit(None, job, "wml-ray submit", "image", False, include)


def test_relative_folders_of_a_job_outlive_the_working_directory_that_ray_made(workplace, monkeypatch, capsys):
    made, origin = workplace / "working_dir_files" / "_ray_pkg_0", workplace / "origin"
    made.mkdir(parents=True)
    origin.mkdir()
    monkeypatch.setenv("HOME", str(workplace / "home"))
    for host, expected in ((socket.gethostname(), origin), ("another", workplace / "home" / "wml_ray_jobs")):
        monkeypatch.chdir(made)
        monkeypatch.setenv(SUBMITTED_FROM, f"{host}:{origin}")
        leave_ray_working_dir()
        assert os.getcwd() == str(expected)
        assert str(expected) in capsys.readouterr().out
