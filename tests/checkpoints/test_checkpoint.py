import json
import subprocess

import pytest
from family import SCORES, checkpoint

from wml_ray.checkpoints.checkpoint import Checkpoints, DamagedCheckpoint, best_epoch


@pytest.fixture
def store(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for epoch in range(len(SCORES) + 1):
        checkpoints.save(checkpoint(epoch))
    return checkpoints


def test_the_newest_and_the_best_are_kept(store):
    assert store.epochs() == [4, 5, 6]
    assert best_epoch(checkpoint(6).plan["history"]) == 4


def test_what_is_loaded_is_what_was_saved(tmp_path):
    store, saved = Checkpoints(tmp_path, keep=1), checkpoint(3)
    store.save(saved)
    loaded = store.load(3)
    assert loaded.plan == saved.plan
    assert all(loaded.model[name].equal(tensor) for name, tensor in saved.model.items())


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.safetensors", "plan.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damage_is_detected_and_the_one_before_is_used(store, name, damage):
    path = store.folder / "epoch-0006" / name
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(DamagedCheckpoint, match="epoch-0006"):
        store.load(6)
    with pytest.warns(UserWarning, match="epoch-0006 is damaged"):
        assert store.latest().epoch == 5


def test_a_damaged_epoch_is_replaced_when_it_is_reached_again(store):
    (store.folder / "epoch-0006" / "plan.json").write_text("{}")
    store.save(checkpoint(6))
    assert store.latest().epoch == 6


@pytest.mark.parametrize("keep", [1, 2])
def test_what_a_resumed_run_saves_is_kept_besides_damaged_later_epochs(tmp_path, keep):
    store = Checkpoints(tmp_path, keep)
    for epoch in range(7):
        store.save(checkpoint(epoch))
    for epoch in store.epochs()[-keep:]:
        (store.folder / f"epoch-{epoch:04d}" / "plan.json").write_text("{}")
    with pytest.warns(UserWarning, match="damaged"):
        start = store.latest()
    resumed = start.epoch if start else -1
    store.save(checkpoint(resumed + 1))
    assert store.load(resumed + 1).epoch == store.epochs()[-1]


def test_a_write_cut_off_by_a_kill_is_invisible_and_cleaned_up(store):
    unfinished = store.folder / ".epoch-0007-abc.writing"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    assert store.latest().epoch == 6
    store.save(checkpoint(6))
    assert not unfinished.exists()


def test_digests_are_checkable_by_hand(store):
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=store.folder / "epoch-0006", check=True)


def test_the_plan_is_json_for_people(store):
    assert json.loads((store.folder / "epoch-0006" / "plan.json").read_text())["epoch"] == 6
