import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from family import checkpoint

from wml_ray.checkpoints.store import Checkpoints, stored_epochs
from wml_ray.storage.lease import LEASE_FILE, LeaseLost, exclusive_access
from wml_ray.storage.paths import to_path


def save(checkpoints, epoch):
    checkpoints.save(checkpoint(epoch))
    checkpoints.wait_for_uploads()


def uploads_done(store, saved):
    """Wait until the store has this checkpoint, without closing its queue as `wait_for_uploads` does."""
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s:
        newest = store.latest()
        if newest and torch.equal(newest.model["layer.weight"], saved.model["layer.weight"]):
            return
    raise TimeoutError


@pytest.fixture
def uploaded(bucket):
    store = Checkpoints(to_path(bucket) / "checkpoints", 2)
    for epoch in range(1, 4):
        save(store, epoch)
    return store


def test_a_remote_checkpoint_equals_the_saved_one(uploaded):
    saved = checkpoint(4)
    uploaded.save(saved)
    uploaded.wait_for_uploads()
    loaded = uploaded.load(4)
    assert loaded.metadata == saved.metadata
    assert all(torch.equal(loaded.model[name], tensor) for name, tensor in saved.model.items())


def test_an_upload_that_was_cut_off_is_no_checkpoint_and_is_removed(uploaded):
    (uploaded.path(3) / "SHA256SUMS").unlink()
    assert uploaded.latest().epoch == 2
    save(uploaded, 4)
    assert not uploaded.path(3).exists()
    assert uploaded.latest().epoch == 4


def test_a_damaged_remote_checkpoint_is_passed_over_and_moved_aside(uploaded):
    (uploaded.path(3) / "plan.json").write_text("{}")
    with pytest.warns(UserWarning, match="epoch-0003 is damaged"):
        assert uploaded.latest().epoch == 2
    save(uploaded, 3)
    assert uploaded.latest().epoch == 3
    (aside,) = (uploaded.folder / "damaged").iterdir()
    assert aside.name.startswith("epoch-0003")
    assert (aside / "plan.json").read_text() == "{}"
    assert (aside / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:checkpoint .* is damaged")
def test_each_save_of_the_same_epoch_is_uploaded(bucket):
    store = Checkpoints(to_path(bucket) / "partial", 1, keep_damaged=False)
    for saved in (checkpoint(3), checkpoint(3)):
        store.save(saved)
        uploads_done(store, saved)
    store.close()
    assert [path.name for path in store.folder.iterdir()] == ["epoch-0003"]


def test_checkpoints_can_be_listed_while_the_only_one_is_replaced(bucket):
    folder = to_path(bucket) / "checkpoints"
    digests = folder / "epoch-0001" / "SHA256SUMS"
    stop = threading.Event()

    def replace_it():
        while not stop.is_set():
            digests.write_text("")
            digests.unlink()

    with ThreadPoolExecutor(1) as pool:
        replacing = pool.submit(replace_it)
        try:
            listed = [stored_epochs(folder) for _ in range(200)]
        finally:
            stop.set()
        replacing.result()
    assert {tuple(epochs) for epochs in listed} == {(), (1,)}


@pytest.mark.parametrize("folder", ["local", "remote"], indirect=True)
def test_a_process_that_lost_its_lease_writes_no_checkpoint(folder):
    with exclusive_access(folder) as lease:
        checkpoints = Checkpoints(folder / "checkpoints", 2, lease)
        save(checkpoints, 1)
        (folder / LEASE_FILE).write_text('{"token": "another", "host": "another-host", "pid": 7}')
        with pytest.raises(LeaseLost, match="taken over by process 7 on another-host"):
            save(checkpoints, 2)
    assert checkpoints.epochs() == [1]


def test_the_end_of_a_run_that_lost_its_lease_does_not_hide_its_error(bucket, monkeypatch):
    monkeypatch.setattr("wml_ray.checkpoints.store.INTERRUPTED_UPLOAD_S", 30.0)
    folder = to_path(bucket)
    with exclusive_access(folder) as lease:
        checkpoints = Checkpoints(folder / "checkpoints", 2, lease)
        (folder / LEASE_FILE).write_text('{"token": "another"}')
        checkpoints.save(checkpoint(1))
        checkpoints.close()
    assert checkpoints.epochs() == []


@pytest.mark.filterwarnings("ignore:no checkpoint can be uploaded")
def test_the_checkpoints_that_wait_for_the_storage_are_bounded(bucket, object_store, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = Checkpoints(to_path(bucket) / "checkpoints", 2)
    object_store.refuse_writes()
    for epoch in range(1, 7):
        store.save(checkpoint(epoch))
    waiting = [path.name for path in sorted(Path(tmp_path).glob("wml_ray-*/epoch-*"))]
    assert waiting == ["epoch-0004", "epoch-0005", "epoch-0006"]  # the best and the newest two
    object_store.accept_writes()
    store.wait_for_uploads()
    assert store.epochs() == [4, 5, 6]
