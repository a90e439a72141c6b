import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from servers import ObjectStore

sys.path.insert(0, str(Path(__file__).parent))  # reference, workers and tiny are modules of the tests

torch.set_num_threads(1)  # small networks gain nothing from a second thread, and lose much on a busy machine
os.environ.pop("MLFLOW_TRACKING_URI", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


@pytest.fixture
def empty_workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def migrated_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty mlflow.db with MLflow's tables: creating them takes seconds."""
    from wml_ray.tracking.client import client_of

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    client_of(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def workplace(empty_workplace: Path, migrated_store: Path) -> Path:
    """A working directory that holds a migrated mlflow.db and nothing else."""
    shutil.copy(migrated_store, empty_workplace)
    return empty_workplace


@pytest.fixture(scope="session")
def ray_cluster():
    """One local cluster for all tests: Ray takes seconds to start."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator["ObjectStore"]:
    """An S3 server in a process of its own, shared by all tests."""
    from servers import ObjectStore

    store = ObjectStore(tmp_path_factory.mktemp("s3"))
    store.start()
    store.wait()
    yield store
    store.kill()


@pytest.fixture
def bucket(object_store: "ObjectStore", workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty folder of that server, in an empty working directory."""
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the retries of the client are not what is tested
    for module in ("storage.retry", "checkpoints.store"):
        monkeypatch.setattr(f"wml_ray.{module}.STORAGE_TIMEOUT_S", 30.0)
    monkeypatch.setattr("wml_ray.checkpoints.store.INTERRUPTED_UPLOAD_S", 0.0)  # upload only what a run waits for
    yield f"s3://runs/{workplace.name}"
    object_store.resume()
    object_store.accept_writes()


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that does not exist, local or remote by the parameter."""
    from wml_ray.storage.paths import to_path

    if request.param == "remote":
        return to_path(request.getfixturevalue("bucket"))
    return tmp_path / "shared"


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the tiny family, trained independently for one epoch."""
    from family import tiny_config

    from wml_ray.training.worker import WorkerContext, run_worker

    storage = tmp_path_factory.mktemp("teachers")
    config = tiny_config("method.name=independent", "optim.epochs=1", f"run.storage_path={storage}")
    run_worker(config, WorkerContext())
    return config.run_folder


@pytest.fixture(scope="session")
def trained_place(tmp_path_factory: pytest.TempPathFactory, migrated_store: Path) -> Path:
    """A working directory in which the tiny family was trained for two epochs; see `trained`."""
    from family import tiny_config

    import wml_ray

    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(migrated_store, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        wml_ray.train(tiny_config("optim.epochs=2"), lambda event: None)
    return folder


@pytest.fixture
def trained(trained_place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of that finished run, below the working directory. Tests only read it."""
    monkeypatch.chdir(trained_place)
    (folder,) = Path("results/wml").iterdir()
    return folder


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)
