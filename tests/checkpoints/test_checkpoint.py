import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from family import SCORES, checkpoint

from wml_ray.checkpoints import checkpoint as checkpoint_module
from wml_ray.checkpoints.checkpoint import DamagedCheckpoint, best_epoch, read_checkpoint
from wml_ray.checkpoints.store import Checkpoints
from wml_ray.storage.retry import StorageUnavailable


@pytest.fixture
def store(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for epoch in range(len(SCORES) + 1):
        checkpoints.save(checkpoint(epoch))
    return checkpoints


def test_the_newest_and_the_best_are_kept(store):
    assert store.epochs() == [4, 5, 6]
    assert best_epoch(checkpoint(6).metadata["history"]) == 4


def test_a_loaded_checkpoint_equals_the_saved_one(tmp_path):
    store, saved = Checkpoints(tmp_path, keep=1), checkpoint(3)
    store.save(saved)
    loaded = store.load(3)
    assert loaded.metadata == saved.metadata
    assert all(torch.equal(loaded.model[name], tensor) for name, tensor in saved.model.items())


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.safetensors", "plan.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["cut", "flip", "delete", "pipe", "folder", "link"])
def test_a_damaged_checkpoint_is_found_and_the_one_before_is_used(store, name, damage):
    path = store.path(6) / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage == "folder":
        path.mkdir()
    elif damage == "link":
        path.symlink_to(store.path(5) / name)
    with pytest.raises(DamagedCheckpoint, match="epoch-0006 is damaged"):
        store.load(6)
    with pytest.warns(UserWarning, match="epoch-0006 is damaged"):
        assert store.latest().epoch == 5


def test_a_checkpoint_in_the_folder_of_another_epoch_is_damaged(store):
    shutil.rmtree(store.path(6))
    shutil.copytree(store.path(5), store.path(6))
    with pytest.raises(DamagedCheckpoint, match=r"epoch-0006 is damaged .it is of epoch 5"):
        store.load(6)


def failing_first(errors, call):
    """`call`, which raises one of `errors` instead for as long as there are some."""

    def failing(path):
        if errors:
            raise errors.pop()
        return call(path)

    return failing


def test_a_read_error_is_retried_and_is_no_damage(store, monkeypatch):
    monkeypatch.setattr("wml_ray.storage.retry.RETRY_S", 0.001)
    errors = [OSError(5, "Input/output error"), OSError(116, "Stale file handle")]
    monkeypatch.setattr(checkpoint_module, "load_file", failing_first(errors, checkpoint_module.load_file))
    with pytest.warns(UserWarning, match="the storage fails .Stale file handle"):
        assert store.latest().epoch == 6
    monkeypatch.setattr("wml_ray.storage.retry.STORAGE_TIMEOUT_S", 0.0)
    for lasting in (OSError(5, "Input/output error"), PermissionError(13, "Permission denied")):
        errors.append(lasting)
        with pytest.raises(StorageUnavailable, match=rf"{lasting.strerror}.*run the same command again"):
            store.load(6)
        errors.clear()


def test_a_local_folder_that_fails_is_listed_again(store, monkeypatch):
    monkeypatch.setattr("wml_ray.storage.retry.RETRY_S", 0.001)
    monkeypatch.setattr(Path, "iterdir", failing_first([OSError(116, "Stale file handle")], Path.iterdir))
    with pytest.warns(UserWarning, match="the storage fails .Stale file handle"):
        assert store.epochs() == [4, 5, 6]


def test_a_damaged_epoch_is_moved_aside_when_it_is_saved_again(store):
    (store.path(6) / "plan.json").write_text("{}")
    store.save(checkpoint(6))
    assert store.latest().epoch == 6
    (aside,) = (store.folder / "damaged").iterdir()
    assert aside.name.startswith("epoch-0006")
    assert (aside / "plan.json").read_text() == "{}"


def test_a_checkpoint_that_is_no_damage_is_replaced_by_one_of_its_epoch(tmp_path):
    store = Checkpoints(tmp_path / "partial", keep=1, keep_damaged=False)
    for saved in (checkpoint(3), checkpoint(3)):
        store.save(saved)
    assert torch.equal(store.load(3).model["layer.weight"], saved.model["layer.weight"])
    assert [path.name for path in store.folder.iterdir()] == ["epoch-0003"]


def test_a_link_in_place_of_a_checkpoint_is_read_but_not_followed_for_removal(store, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    store.path(5).rename(elsewhere)
    store.path(5).symlink_to(elsewhere)
    assert store.load(5).epoch == 5
    for epoch in (7, 8, 5):  # it is outdated, then it is replaced
        store.save(checkpoint(epoch))
        assert read_checkpoint(elsewhere).epoch == 5


@pytest.mark.parametrize("keep", [1, 2])
def test_a_resumed_run_keeps_its_checkpoints_before_those_of_later_damaged_epochs(tmp_path, keep):
    store = Checkpoints(tmp_path, keep)
    for epoch in range(7):
        store.save(checkpoint(epoch))
    for epoch in store.epochs()[-keep:]:
        (store.path(epoch) / "plan.json").write_text("{}")
    with pytest.warns(UserWarning, match="damaged"):
        start = store.latest()
    store.save(checkpoint(start.epoch + 1))
    assert store.load(start.epoch + 1).epoch == store.epochs()[-1]


def test_a_write_cut_off_by_a_kill_is_invisible_and_cleaned_up(store):
    unfinished = store.folder / ".epoch-0007-abc.writing"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    assert store.latest().epoch == 6
    store.save(checkpoint(6))
    assert not unfinished.exists()


def test_the_digests_can_be_checked_by_hand(store):
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=store.path(6), check=True)


def test_the_metadata_is_a_json_file(store):
    assert json.loads((store.path(6) / "plan.json").read_text())["epoch"] == 6
