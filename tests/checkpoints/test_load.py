import errno
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from family import tiny_config

from wml_ray.checkpoints.checkpoint import DamagedCheckpoint
from wml_ray.checkpoints.load import load_peer, load_tree
from wml_ray.checkpoints.store import Checkpoints
from wml_ray.data.load import load_dataset
from wml_ray.errors import UserError
from wml_ray.storage.retry import StorageUnavailable
from wml_ray.training.start import check_checkpoint, initial_checkpoint, load_or_create_checkpoint

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def start():
    return initial_checkpoint(CONFIG, load_dataset(CONFIG))


@pytest.fixture
def saved(start, folder):
    """The folder of a checkpoint, local or remote."""
    checkpoints = Checkpoints(folder, 1)
    checkpoints.save(start)
    checkpoints.wait_for_uploads()
    return checkpoints.path(0)


@pytest.mark.parametrize("folder", ["local", "remote"], indirect=True)
def test_a_loaded_tree_equals_the_saved_one_and_a_peer_its_path_through_the_tree(saved, start):
    tree = load_tree(str(saved), trust=True)
    assert not tree.training
    assert all(torch.equal(tensor, start.model[name]) for name, tensor in tree.state_dict().items())
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        logits_MBK = tree(images)
        for index in range(4):
            peer = load_peer(str(saved), index, trust=True)
            assert not peer.training
            assert torch.equal(peer(images), logits_MBK[index])
    with pytest.raises(UserError, match="no peer 4; give a number from 0 to 3"):
        load_peer(str(saved), 4, trust=True)


@pytest.mark.parametrize(
    ("section", "key"), [("model", "backbone"), ("method", "name"), ("teacher", "function")], ids=str
)
def test_code_that_a_checkpoint_names_runs_only_if_it_is_trusted(start, empty_workplace, monkeypatch, section, key):
    """Modules of the working directory are not even then on the import path."""
    (empty_workplace / "evil.py").write_text("open('ran', 'w').close()")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path or ".").resolve() != Path.cwd()])
    config = tiny_config("model.backbone=resnet20").model_dump(mode="json")
    config[section][key] = "evil:stages"
    checkpoints = Checkpoints(empty_workplace / "checkpoints", 1)
    checkpoints.save(changed(start, "metadata", config=config))
    for load in (load_tree, partial(load_peer, index=0)):
        with pytest.raises(UserError, match=rf"would run evil:stages, its {section}\.{key}; pass trust=True"):
            load(checkpoints.path(0))
        with pytest.raises(UserError):
            load(checkpoints.path(0), trust=True)
    assert not Path("ran").exists()


@pytest.mark.parametrize("folder", ["local"], indirect=True)
def test_a_changed_file_is_refused(saved):
    (saved / "plan.json").write_text(json.dumps({"epoch": 0}))
    with pytest.raises(DamagedCheckpoint, match=r"plan.json does not match its digest"):
        load_tree(saved)
    with pytest.raises(DamagedCheckpoint, match="nowhere"):
        load_tree(saved.parent / "nowhere")


def changed(start, part, **changes):
    values = {**getattr(start, part), **changes}
    return replace(start, **{part: {name: value for name, value in values.items() if value is not None}})


WEIGHT = "stages.stage0.0.0.weight"
MISFITS = {
    "another run": ("metadata", {"run_id": "another"}, "is of another run"),
    "another config": ("metadata", {"config": tiny_config("wml.alpha=0.1").model_dump(mode="json")}, "another run"),
    "a broken config": ("metadata", {"config": {"seed": "no number"}}, r"plan.json: seed"),
    "a key of another type": ("metadata", {"sharing": "1, 2"}, r"plan.json: sharing"),
    "an epoch that is not in the history": ("metadata", {"epoch": 1}, "history does not have the epochs 1 to 1"),
    "an epoch without metrics": (
        "metadata",
        {"epoch": 1, "history": [{"epoch": 1, "timestamp_ms": 0, "metrics": {}}]},
        "history: epoch 1 has no ",
    ),
    "costs of no peer": ("metadata", {"peers": []}, "peers: there are 0, not 4"),
    "another layout": ("metadata", {"trainer_layout": "x"}, "names, shapes or dtypes are not those of plan.json"),
    "no widths": ("metadata", {"channels": None}, r"plan.json: 'channels'"),
    "other widths": ("metadata", {"channels": {}}, r"model.safetensors: .* is \("),
    "a missing tensor": ("model", {WEIGHT: None}, f"{WEIGHT} is missing"),
    "an unknown tensor": ("model", {"more": torch.zeros(1)}, "more is unknown"),
    "another dtype": (
        "model",
        {WEIGHT: torch.zeros(8, 1, 3, 3, dtype=torch.float64)},
        "float64, not",
    ),
    "no weights": ("state", {"method/log_weights_M": None}, "log_weights_M does not fit"),
    "weights of more peers": ("state", {"method/log_weights_M": torch.zeros(5)}, "log_weights_M does not fit"),
    "momentum of nothing": ("state", {"optimizer/momentum_buffer/none": torch.zeros(1)}, "does not fit"),
    "momentum of another shape": ("state", {f"optimizer/momentum_buffer/{WEIGHT}": torch.zeros(1)}, "does not fit"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_checkpoint_that_does_not_belong_to_the_run_is_refused(start, name):
    part, changes, message = MISFITS[name]
    check_checkpoint(CONFIG, start)
    with pytest.raises(DamagedCheckpoint, match=message):
        check_checkpoint(CONFIG, changed(start, part, **changes))


def test_a_full_disk_at_the_first_checkpoint_is_waited_for_as_at_every_other(workplace, monkeypatch):
    """Else it would fail one trial of a study after the other."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("wml_ray.checkpoints.store.write_checkpoint", full)
    monkeypatch.setattr("wml_ray.storage.retry.STORAGE_TIMEOUT_S", 0.0)
    with (
        pytest.warns(UserWarning, match=r"no space left on .*checkpoints; retrying"),
        pytest.raises(StorageUnavailable, match=r"no space left on .*checkpoints; run the same command again"),
    ):
        load_or_create_checkpoint(CONFIG)
