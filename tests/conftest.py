import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # reference, workers and tiny are modules of the tests

torch.set_num_threads(1)  # small networks gain nothing from a second thread, and lose much on a busy machine
os.environ.pop("MLFLOW_TRACKING_URI", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One xdist group a file, so that its servers start once, and one for all users of the shared Ray cluster.

    Groups with slow tests come first: at the end both processes have short ones left.
    """
    slow = set()
    for item in items:
        group = "ray_cluster" if "ray_cluster" in getattr(item, "fixturenames", ()) else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
        if any(item.get_closest_marker(tier) for tier in ("core", "slow", "nightly")):
            slow.add(group)
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args[0] not in slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def ray_cluster():
    """One local cluster for all tests: Ray takes seconds to start."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
