import json
import subprocess
import sys

import pytest
import torch
from family import random_batch, run_in_evaluation
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from wml_ray.config.schema import PruningConfig
from wml_ray.errors import UserError
from wml_ray.networks.backbones import BACKBONES, build_stages
from wml_ray.networks.costs import (
    count_macs,
    count_params,
    peer_costs,
    removed_shares,
)
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec
from wml_ray.pruning.prune import prune
from wml_ray.pruning.widths import apply_channel_widths

CIFAR = ImageSpec(3, 32, 10)
TINY = ImageSpec(2, 8, 5)
FAMILIES = ("resnet20", "resnet18", "mobilenet_v2", "vgg16_bn", "densenet_bc40", "wrn_16_4")


ROUNDING = 1e-9
pytestmark = pytest.mark.usefixtures("seeded")


def macs_by_pytorch(network, spec):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, *spec.shape))
    return counter.get_total_flops() / 2


def half_shared(name, spec, peers=2):
    with torch.device("meta"):  # shapes without memory
        stages = len(build_stages(name, spec))
    return [1] * (stages // 2) + [peers] * (stages - stages // 2)


# every backbone


@pytest.mark.parametrize(
    "name", [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.nightly) for name in BACKBONES]
)
def test_every_backbone_is_pruned_to_its_ratios_and_reloads_from_its_plan(name, tmp_path):
    ratios = (0.2, 0.35)
    sharing = half_shared(name, CIFAR)
    tree = PeerTree(lambda: build_stages(name, CIFAR), sharing)
    full = macs_by_pytorch(tree.peer(0), CIFAR)

    plan = prune(tree, PruningConfig(ratios=ratios, unit="macs"), CIFAR, [random_batch(CIFAR)])

    inputs, _ = random_batch(CIFAR)
    with torch.no_grad():
        tree.train()(inputs)  # so that BatchNorm's running statistics are worth comparing
    logits_MBK = run_in_evaluation(tree, inputs)
    assert logits_MBK.isfinite().all()
    assert logits_MBK.std() > 0
    for index, ratio in enumerate(ratios):
        peer = tree.peer(index)
        assert ratio - ROUNDING <= 1 - macs_by_pytorch(peer, CIFAR) / full <= ratio + 0.02
        assert torch.equal(run_in_evaluation(peer, inputs), logits_MBK[index])

    save_file(tree.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    del tree, peer
    again = PeerTree(lambda: build_stages(name, CIFAR), sharing)
    apply_channel_widths(again, json.loads((tmp_path / "plan.json").read_text()))
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(run_in_evaluation(again, inputs), logits_MBK)


REBUILD = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from wml_ray.networks.backbones import build_stages
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec
from wml_ray.pruning.widths import apply_channel_widths
torch.set_num_threads({threads})
tree = PeerTree(lambda: build_stages("mobilenet_v2", ImageSpec(3, 32, 10)), {sharing})
apply_channel_widths(tree, json.load(open("plan.json")))
tree.load_state_dict(load_file("model.safetensors"))
with torch.no_grad():
    save_file({{"logits": tree.eval()(load_file("inputs.safetensors")["inputs"])}}, "logits.safetensors")
print("torch_pruning" in sys.modules)
"""


def test_a_pruned_tree_reloads_in_a_fresh_process_without_the_pruner(tmp_path):
    sharing = half_shared("mobilenet_v2", CIFAR)
    tree = PeerTree(lambda: build_stages("mobilenet_v2", CIFAR), sharing)
    plan = prune(tree, PruningConfig(ratios=[0.2, 0.5]), CIFAR, [random_batch(CIFAR)])
    inputs, _ = random_batch(CIFAR)
    save_file(tree.state_dict(), tmp_path / "model.safetensors")
    save_file({"inputs": inputs}, tmp_path / "inputs.safetensors")
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    script = REBUILD.format(threads=torch.get_num_threads(), sharing=sharing)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], run_in_evaluation(tree, inputs))
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("resolution", [8, 28])
@pytest.mark.parametrize("name", FAMILIES)
def test_channels_resolution_and_classes_follow_the_data(name, resolution):
    spec = ImageSpec(1, resolution, 7)
    inputs, targets = random_batch(spec)
    tree = PeerTree(lambda: build_stages(name, spec), half_shared(name, spec))
    logits_MBK = tree.train()(inputs)
    assert logits_MBK.shape == (2, 4, 7)
    assert prune(tree, PruningConfig(ratios=[0.1, 0.2]), spec, [(inputs, targets)])
    assert tree.train()(inputs).shape == (2, 4, 7)


@pytest.mark.parametrize(
    ("name", "spec", "millions", "tolerance"),
    [
        ("resnet20", CIFAR, 0.27, 0.01),  # all three were published without shortcut convolutions
        ("resnet56", CIFAR, 0.85, 0.01),
        ("resnet110", CIFAR, 1.73, 0.01),
        ("densenet_bc100", CIFAR, 0.77, 0.005),
        ("wrn_28_10", CIFAR, 36.5, 0.05),
        ("resnet18", ImageSpec(3, 224, 1000), 11.69, 0.005),
        ("resnet50", ImageSpec(3, 224, 1000), 25.56, 0.005),
        ("mobilenet_v2", ImageSpec(3, 224, 1000), 3.50, 0.005),
        ("vgg16_bn", ImageSpec(3, 224, 1000), 138.37, 0.01),  # published with biases before BatchNorm
    ],
)
def test_well_known_networks_have_their_published_size(name, spec, millions, tolerance):
    with torch.device("meta"):
        network = nn.Sequential(*build_stages(name, spec).values())
        assert network(torch.empty(2, *spec.shape)).shape == (2, spec.num_classes)
    assert count_params(network) / 1e6 == pytest.approx(millions, abs=tolerance)


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "densenet_bc40", "wrn_16_4"])
def test_macs_are_those_pytorch_counts(name):
    network = nn.Sequential(*build_stages(name, CIFAR).values())
    assert count_macs(network, CIFAR) == macs_by_pytorch(network, CIFAR)


# a user's own backbone

OWN = """
from torch import nn

def stages(spec):
    stem = nn.Sequential(nn.Conv2d(spec.channels, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
    body = nn.Sequential(nn.Conv2d(12, 24, 3, stride=2), nn.GELU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24 * 4, spec.num_classes))
    return [stem, body, head]

def number(spec):
    return 3

def no_head(spec):
    return [nn.Conv2d(spec.channels, spec.num_classes + 1, 3)]
"""


@pytest.fixture
def own_package(tmp_path, monkeypatch):
    package = tmp_path / "own_package_of_a_test"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_package_of_a_test.nets"


def test_a_users_own_stages_are_pruned_like_any(own_package):
    tree = PeerTree(lambda: build_stages(f"{own_package}:stages", TINY), [1, 2, 2])
    full = peer_costs(tree, TINY)
    prune(tree, PruningConfig(ratios=[0.25, 0.5]), TINY, [random_batch(TINY)])
    achieved = [peer["channels_drop"] for peer in removed_shares(full, peer_costs(tree, TINY))]
    assert 0.25 - ROUNDING <= achieved[0] < 0.3
    assert 0.5 - ROUNDING <= achieved[1] < 0.55
    assert tree(random_batch(TINY)[0]).shape == (2, 4, TINY.num_classes)


@pytest.mark.parametrize("function", ["nothing", "number"])
def test_a_users_function_that_is_missing_or_returns_something_else_is_named(own_package, function):
    with pytest.raises(UserError, match=f"{own_package}:{function}"):
        build_stages(f"{own_package}:{function}", TINY)


def test_a_backbone_that_does_not_end_in_the_classes_cannot_be_pruned(own_package):
    tree = PeerTree(lambda: build_stages(f"{own_package}:no_head", TINY), [1])
    with pytest.raises(UserError, match=r"one output a class \(5\)"):
        prune(tree, PruningConfig(ratios=[0.1]), TINY, [(torch.randn(2, *TINY.shape), torch.tensor([0, 1]))])
