import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

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
