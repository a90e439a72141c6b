"""Networks of timm and torchvision as backbones: stages, pruning, training and export."""

import copy

import pytest
import torch
import torch.distributed as dist
from family import random_batch, run_in_evaluation
from small_sets import make_image_folder
from torch import nn

from wml_ray.checkpoints.store import Checkpoints
from wml_ray.config.load import parse_config
from wml_ray.config.schema import PruningConfig
from wml_ray.errors import UserError
from wml_ray.networks.backbones import build_stages
from wml_ray.networks.libraries import library_network
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec
from wml_ray.networks.sync_batchnorm import convert_sync_batchnorm
from wml_ray.pruning.prune import prune
from wml_ray.training.worker import WorkerContext, run_worker

SMALL = ImageSpec(3, 32, 5)
FAST = ("torchvision:mobilenet_v3_small", "timm:mobilenetv3_small_100")
CONVOLUTIONAL = (
    *(f"torchvision:{name}" for name in ("efficientnet_b0", "mobilenet_v3_small", "mobilenet_v3_large")),
    *("torchvision:convnext_tiny", "torchvision:regnet_y_400mf"),
    *(f"timm:{name}" for name in ("efficientnet_b0", "mobilenetv3_small_100", "mobilenetv3_large_100")),
    *("timm:convnext_tiny", "timm:regnety_004", "timm:efficientnetv2_rw_t"),
)
LIBRARY = (*CONVOLUTIONAL, "timm:vit_tiny_patch16_224", "timm:deit_tiny_patch16_224")
pytestmark = pytest.mark.usefixtures("seeded")


def by_original_name(stages):
    return {name: tensor for stage in stages.values() for name, tensor in stage.state_dict().items()}


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LIBRARY]
)
def test_the_stages_of_a_library_network_are_that_network_under_its_own_names(name):
    stages = build_stages(name, SMALL)
    assert next(iter(stages)) == "stem"
    assert [*stages][1:-1] == [f"layer{index + 1}" for index in range(len(stages) - 2)]
    assert [*stages][-1] == "head"
    network = library_network(name, SMALL)
    inputs, _ = random_batch(SMALL)
    with torch.no_grad():
        network.train()(inputs)  # so that its running statistics differ from those of the stages
    tensors = by_original_name(stages)
    assert tensors.keys() == network.state_dict().keys()
    for own, theirs in zip(tensors.values(), (network.state_dict()[key] for key in tensors), strict=True):
        own.copy_(theirs)
    outputs = run_in_evaluation(nn.Sequential(*stages.values()), inputs)
    torch.testing.assert_close(outputs, run_in_evaluation(network, inputs))


def test_the_first_convolution_follows_the_channels_of_the_data():
    for name in FAST:
        spec = ImageSpec(1, 32, 5)
        assert nn.Sequential(*build_stages(name, spec).values()).eval()(random_batch(spec)[0]).shape == (4, 5)


def test_stages_follow_from_the_seed_whether_or_not_they_were_found_before():
    def built():
        torch.manual_seed(0)
        build_stages("torchvision:mobilenet_v3_small", ImageSpec(2, 32, 3))  # those of another peer
        return by_original_name(build_stages("torchvision:mobilenet_v3_small", ImageSpec(2, 32, 3)))

    first, second = built(), built()
    assert all(tensor.equal(second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:mobilenet_v3_small", "timm has no such network; near are .*mobilenetv3_small"),
        ("torchvision:nothing_like_it", "torchvision has no such network"),
        ("torchvision:googlenet", "cannot be cut into stages: aux1 has parameters and does not run"),
        ("timm:hrnet_w18_small", "cannot be cut into stages: transition1 "),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_network_that_cannot_be_staged_is_refused_with_the_layer_in_the_way(name, message):
    with pytest.raises(UserError, match=message) as raised:
        build_stages(name, SMALL)
    assert "\n" not in str(raised.value)


def test_batchnorm_with_an_activation_inside_keeps_it_over_workers():
    stem = build_stages("timm:mobilenetv3_small_100", SMALL)["stem"]
    network, (inputs, _) = copy.deepcopy(stem), random_batch(SMALL)
    stem.train()(inputs)  # as the network below has when it is evaluated: two passes in training mode
    stem(inputs)
    evaluated = run_in_evaluation(stem, inputs)
    expected = network(inputs)
    convert_sync_batchnorm(network)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.testing.assert_close(network(inputs), expected, rtol=1e-3, atol=1e-4)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(run_in_evaluation(network, inputs), evaluated, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARY)
def test_a_library_network_is_pruned_trained_and_exported(name, tmp_path, monkeypatch):
    from wml_ray.export.network import network_of
    from wml_ray.verbs.export import export_network

    monkeypatch.chdir(tmp_path)
    stages = len(build_stages(name, SMALL))

    raw = {
        "data": {"name": "imagefolder", "root": str(make_image_folder(tmp_path / "images")), "resolution": 32},
        "model": {"backbone": name, "sharing": [1] * (stages // 2) + [2] * (stages - stages // 2)},
        "pruning": {"ratios": [0.1, 0.3], "unit": "macs", "saliency_images": 8},
        "wml": {"update_every": 1},
        "optim": {"epochs": 1, "learning_rate": 0.001, "gradient_clip": 0.1},
    }
    config = parse_config(raw, ["data.batch_size=8", "data.loader_workers=0"])
    result = run_worker(config, WorkerContext())
    for peer, ratio in zip(result["peers"], (0.1, 0.3), strict=True):
        assert ratio <= peer["macs_drop"] < ratio + 0.03
    checkpoint = Checkpoints(config.run_folder / "checkpoints", 1).load(1)
    exported = export_network(network_of(checkpoint, "checkpoint", 1), "onnx", tmp_path / "out")
    assert exported.verification.logit_difference < 1e-4
    assert exported.verification.equal_predictions == 1


def test_a_pruned_library_network_reloads_from_its_widths(tmp_path):
    from wml_ray.pruning.widths import apply_channel_widths

    for name in FAST:
        sharing = [1, 1, 1, 2, 2, 2]
        tree = PeerTree(lambda name=name: build_stages(name, SMALL), sharing)
        widths = prune(tree, PruningConfig(ratios=(0.1, 0.4), unit="macs"), SMALL, [random_batch(SMALL)])
        again = PeerTree(lambda name=name: build_stages(name, SMALL), sharing)
        apply_channel_widths(again, widths)
        again.load_state_dict(tree.state_dict())
        inputs, _ = random_batch(SMALL)
        assert run_in_evaluation(again, inputs).equal(run_in_evaluation(tree, inputs))
