"""Errors of a worker, without Ray's processes."""

from types import SimpleNamespace

import pytest
import ray.train
from family import tiny_config

from wml_ray.checkpoints.checkpoint import DamagedCheckpoint
from wml_ray.cluster import train
from wml_ray.cluster.connect import WorkerEnvironment
from wml_ray.errors import Diverged, UserError
from wml_ray.storage.files import read_json
from wml_ray.storage.retry import StorageUnavailable


class BadImage(UserError):
    pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [(Diverged, "Diverged"), (BadImage, "UserError"), (DamagedCheckpoint, None), (StorageUnavailable, None)],
)
def test_the_status_file_holds_those_errors_that_a_retry_cannot_mend(workplace, monkeypatch, error, kind):
    def fail(*_):
        raise error("its message")

    config = tiny_config()
    monkeypatch.setattr(train, "run_worker", fail)
    rank_0_of_1 = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: rank_0_of_1)
    settings = {
        "config": config.dump(),
        "threads": 1,
        "worker_environment": WorkerEnvironment.capture(config.run_folder, config.data, None),
    }
    with pytest.raises(error, match="its message"):
        train.train_loop_per_worker(settings)
    written = kind and {"kind": kind, "error": "its message"}
    assert read_json(config.run_folder / train.STATUS_FILE, "") == written
