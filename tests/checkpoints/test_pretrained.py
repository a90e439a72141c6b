"""A state dict of the user's in every copy of a tree, before the pruning."""

import re
import shutil

import pytest
import torch
from family import SPEC, enumerate_names, stages, tiny_config
from safetensors.torch import save_file
from small_sets import one_line
from torch import nn

from wml_ray.checkpoints.pretrained import describe_pretrained, load_pretrained
from wml_ray.config.load import parse_config, with_values
from wml_ray.config.model import ModelConfig
from wml_ray.data.load import load_dataset
from wml_ray.errors import UserError
from wml_ray.networks.backbones import build_stages
from wml_ray.networks.libraries import library_network
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec
from wml_ray.training.start import check_checkpoint, initial_checkpoint

SMALL = "torchvision:mobilenet_v3_small"
pytestmark = pytest.mark.usefixtures("seeded")


def write(tensors, path):
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return str(path)


def tiny_state(classes=SPEC.num_classes, prefix="stage"):
    """The state dict of the tiny backbone, as a network that holds its stages under their names has it."""
    torch.manual_seed(7)
    network = nn.ModuleDict(dict(enumerate_names(stages(ImageSpec(1, 8, classes)))))
    return {name.replace("stage", prefix, 1): tensor for name, tensor in network.state_dict().items()}


def tiny_tree():
    return PeerTree(lambda: dict(enumerate_names(stages(SPEC))), [1, 2, 4, 4])


def loaded(tensors, path, tree=None):
    tree = tree or tiny_tree()
    model = ModelConfig(backbone="family:stages", sharing=(1, 2, 4, 4), pretrained=write(tensors, path))
    return tree, load_pretrained(tree, model, SPEC)


@pytest.mark.parametrize("file", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("prefix", ["stage", "module.stage", ""])
def test_every_copy_is_equal_to_the_file(tmp_path, file, prefix):
    expected = tiny_state()
    tree, record = loaded(tiny_state(prefix=prefix), tmp_path / file)
    for name, tensor in tree.state_dict().items():
        _, stage, _, inner = name.split(".", 3)
        assert tensor.equal(expected[f"{stage}.{inner}"]), name
    assert (record["tensors"], record["new"]) == (len(expected), [])


def test_a_library_network_is_loaded_under_its_own_names_and_its_head_replaced(tmp_path):
    network = library_network(SMALL, ImageSpec(3, 32, 9))
    path = write({"model": network.state_dict(), "epoch": 3}, tmp_path / "weights.pth")
    spec = ImageSpec(3, 32, 4)
    tree = PeerTree(lambda: build_stages(SMALL, spec), [1, 1, 2, 2, 2, 2])
    fresh = [tree.peer(peer)[-1].state_dict()["classifier.3.weight"] for peer in (0, 1)]
    record = load_pretrained(tree, ModelConfig(backbone=SMALL, sharing=(2,), pretrained=path), spec)
    for peer in (0, 1):
        tensors = {name: t for stage in tree.peer(peer) for name, t in stage.state_dict().items()}
        assert tensors.pop("classifier.3.weight").equal(fresh[peer])
        assert tensors.pop("classifier.3.bias").shape == (4,)
        assert all(tensor.equal(network.state_dict()[name]) for name, tensor in tensors.items())
    assert record["new"] == ["classifier.3.bias", "classifier.3.weight"]
    assert "weights.pth (sha256 " in describe_pretrained(record)
    assert "new for these classes: classifier.3.bias, classifier.3.weight" in describe_pretrained(record)


def test_batchnorm_counters_may_be_missing_and_are_counted(tmp_path):
    tensors = {name: tensor for name, tensor in tiny_state().items() if "num_batches" not in name}
    tree, record = loaded(tensors, tmp_path / "a.pth")
    assert record["counters_from_zero"] == len(tiny_state()) - len(tensors) > 0
    assert tree.state_dict()["stages.stage0.0.0.weight"].equal(tensors["stage0.0.weight"])


def test_missing_surplus_and_misshapen_tensors_are_all_listed_and_nothing_is_loaded(tmp_path):
    tensors = tiny_state()
    del tensors["stage0.1.running_mean"]
    tensors |= {"extra.weight": torch.zeros(1), "stage2.0.bias": torch.zeros(5)}
    tree = tiny_tree()
    before = {name: tensor.clone() for name, tensor in tree.state_dict().items()}
    with pytest.raises(UserError) as caught:
        loaded(tensors, tmp_path / "a.safetensors", tree)
    message = one_line(caught)
    assert "1 missing (stage0.1.running_mean); 1 surplus (extra.weight)" in message
    assert "1 of another shape (stage2.0.bias (5,) for (12,))" in message
    assert all(tensor.equal(before[name]) for name, tensor in tree.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"none", nn.Linear(2, 2), {"a": 1}])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_holds_no_tensors_is_one_line_and_runs_no_code(tmp_path, content, suffix):
    path = tmp_path / f"a{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    model = ModelConfig(backbone="family:stages", sharing=(1, 2, 4, 4), pretrained=str(path))
    with pytest.raises(UserError, match=r"^model.pretrained = ") as caught:
        load_pretrained(tiny_tree(), model, SPEC)
    one_line(caught)


@pytest.mark.parametrize("path", ["s3://bucket/a.pth", "https://x.org/a.safetensors", "a.ckpt"])
def test_an_address_or_another_kind_of_file_is_refused(path):
    with pytest.raises(UserError, match=r"^model.pretrained: ") as caught:
        parse_config({"model": {"pretrained": path}})
    one_line(caught)


def test_the_run_id_follows_the_content_of_the_file_and_not_its_place(tmp_path):
    first, second = tmp_path / "a.pth", tmp_path / "b.pth"
    write(tiny_state(), first)
    shutil.copy(first, second)
    run_ids = [tiny_config(f"model.pretrained={path}").run_id for path in (first, second)]
    assert run_ids[0] == run_ids[1] != tiny_config().run_id
    second.write_bytes(second.read_bytes() + b"\0")
    assert tiny_config(f"model.pretrained={second}").run_id != run_ids[0]
    first.unlink()
    with pytest.raises(UserError, match=r"a.pth' cannot be read \(No such file") as caught:
        tiny_config(f"model.pretrained={first}").run_id  # noqa: B018
    one_line(caught)


def test_the_saliency_that_prunes_is_that_of_the_pretrained_weights(tmp_path):
    tensors = tiny_state()
    tensors["stage2.0.weight"][[1, 4, 6, 7]] = 0  # and so their saliency
    path = write(tensors, tmp_path / "a.pth")
    config = tiny_config(f"model.pretrained={path}", "pruning.ratios=[0.2,0.2,0.2,0.2]", "pruning.unit=params")
    start = initial_checkpoint(config, load_dataset(config))
    kept = start.model["stages.stage2.3.0.bias"]
    removed = [index for index, bias in enumerate(tensors["stage2.0.bias"]) if bias not in kept]
    assert set(removed) <= {1, 4, 6, 7}
    assert removed
    assert re.fullmatch(r"[0-9a-f]{64}", start.metadata["pretrained"]["sha256"])
    moved = tmp_path / "moved.pth"
    shutil.move(path, moved)
    check_checkpoint(with_values(config, {"model.pretrained": str(moved)}), start)
