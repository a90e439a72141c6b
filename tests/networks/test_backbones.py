import copy
import json
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock

from wml_ray.config.load import parse_config
from wml_ray.config.schema import PruningConfig
from wml_ray.data.load import load_dataset
from wml_ray.errors import UserError
from wml_ray.networks.backbones import BACKBONES, build_stages
from wml_ray.networks.costs import (
    CONV,
    WEIGHTED,
    count_macs,
    count_params,
    layer_costs,
    peer_costs,
    removed_shares,
    width,
)
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec
from wml_ray.pruning.budget import PeerBudget
from wml_ray.pruning.channels import channel_groups
from wml_ray.pruning.criteria import CRITERIA, score_groups
from wml_ray.pruning.prune import head_names, prune
from wml_ray.pruning.widths import apply_channel_widths
from wml_ray.training.start import initial_checkpoint

CIFAR = ImageSpec(3, 32, 10)
TINY = ImageSpec(2, 8, 5)
FAMILIES = ("resnet20", "resnet18", "mobilenet_v2", "vgg16_bn", "densenet_bc40", "wrn_16_4")


ROUNDING = 1e-9


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def batch(spec, images=4):  # two images a BatchNorm makes +1 and -1 whatever they are, and gradients vanish
    return torch.randn(images, *spec.shape), torch.randint(spec.num_classes, (images,))


def macs_by_pytorch(network, spec):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, *spec.shape))
    return counter.get_total_flops() / 2


def run_in_evaluation(network, inputs):
    with torch.no_grad():
        return network.eval()(inputs)


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

    plan = prune(tree, PruningConfig(ratios=ratios, unit="macs"), CIFAR, [batch(CIFAR)])

    inputs, _ = batch(CIFAR)
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
from wml_ray.backbones import ImageSpec, build
from wml_ray.pruning import apply_plan
from wml_ray.tree import PeerTree
torch.set_num_threads({threads})
tree = PeerTree(lambda: build("mobilenet_v2", ImageSpec(3, 32, 10)), {sharing})
apply_plan(tree, json.load(open("plan.json")))
tree.load_state_dict(load_file("model.safetensors"))
with torch.no_grad():
    save_file({{"logits": tree.eval()(load_file("inputs.safetensors")["inputs"])}}, "logits.safetensors")
print("torch_pruning" in sys.modules)
"""


def test_a_pruned_tree_reloads_in_a_fresh_process_without_the_pruner(tmp_path):
    sharing = half_shared("mobilenet_v2", CIFAR)
    tree = PeerTree(lambda: build_stages("mobilenet_v2", CIFAR), sharing)
    plan = prune(tree, PruningConfig(ratios=[0.2, 0.5]), CIFAR, [batch(CIFAR)])
    inputs, _ = batch(CIFAR)
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
    inputs, targets = batch(spec)
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
    prune(tree, PruningConfig(ratios=[0.25, 0.5]), TINY, [batch(TINY)])
    achieved = [peer["channels_drop"] for peer in removed_shares(full, peer_costs(tree, TINY))]
    assert 0.25 - ROUNDING <= achieved[0] < 0.3
    assert 0.5 - ROUNDING <= achieved[1] < 0.55
    assert tree(batch(TINY)[0]).shape == (2, 4, TINY.num_classes)


@pytest.mark.parametrize("function", ["nothing", "number"])
def test_a_users_function_that_is_missing_or_returns_something_else_is_named(own_package, function):
    with pytest.raises(UserError, match=f"{own_package}:{function}"):
        build_stages(f"{own_package}:{function}", TINY)


def test_a_backbone_that_does_not_end_in_the_classes_cannot_be_pruned(own_package):
    tree = PeerTree(lambda: build_stages(f"{own_package}:no_head", TINY), [1])
    with pytest.raises(UserError, match=r"one output a class \(5\)"):
        prune(tree, PruningConfig(ratios=[0.1]), TINY, [(torch.randn(2, *TINY.shape), torch.tensor([0, 1]))])


# pruning, on a tree with a plain layer, a residual stream and several inputs of the head a channel


def tiny_stages():
    return {
        "stem": nn.Sequential(nn.Conv2d(2, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        "block": BasicBlock(16, 16),
        "wide": nn.Sequential(nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
        "head": nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, TINY.num_classes)),
    }


def tiny_tree(*sharing):
    return PeerTree(tiny_stages, sharing)


def pruned(tree, batches=None, **pruning):
    return prune(tree, PruningConfig(**pruning), TINY, batches or [batch(TINY, 8)])


def widths(tree, names=None):
    layers = {name: m for name, m in tree.named_modules() if isinstance(m, WEIGHTED)}
    return {name: width(layer, "out") for name, layer in layers.items() if names is None or name.startswith(names)}


@pytest.mark.parametrize("unit", ["channels", "params", "macs"])
def test_each_peer_loses_its_ratio_in_the_unit_asked_for(unit):
    tree, ratios = tiny_tree(1, 3, 3, 3), [0.1, 0.2, 0.3]
    full = peer_costs(tree, TINY)
    pruned(tree, ratios=ratios, unit=unit)
    achieved = [peer[f"{unit}_drop"] for peer in removed_shares(full, peer_costs(tree, TINY))]
    assert all(-ROUNDING <= got - asked < 0.06 for got, asked in zip(achieved, ratios, strict=True))


def test_ratio_zero_leaves_a_peer_whole():
    tree = tiny_tree(1, 2, 2, 2)
    before = copy.deepcopy(tree.peer(0).state_dict())
    full = peer_costs(tree, TINY)
    pruned(tree, ratios=[0.0, 0.3])
    after = tree.peer(0).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert peer_costs(tree, TINY)[1]["channels"] < full[1]["channels"]


def test_ratios_of_zero_change_nothing():
    tree = tiny_tree(1, 2, 2, 2)
    assert pruned(tree, ratios=[0.0, 0.0]) == {}
    assert set(widths(tree).values()) == {16, 32, TINY.num_classes}


def test_a_shared_copy_keeps_what_its_widest_peer_keeps():
    start, batches = tiny_tree(1, 2, 4, 4), [batch(TINY, 8)]

    def shared_widths(*ratios):
        tree = copy.deepcopy(start)
        pruned(tree, batches, ratios=ratios)
        return widths(tree, "stages.stem.0"), widths(tree, "stages.block.0"), widths(tree, "stages.block.1")

    alone = shared_widths(0.2, 0.2, 0.2, 0.2)
    stem, left, right = shared_widths(0.2, 0.25, 0.3, 0.4)
    assert (stem, left) == alone[:2]
    assert shared_widths(0.25, 0.2, 0.3, 0.4)[0] == stem
    whole = shared_widths(0.3, 0.3, 0.3, 0.0)
    assert set(whole[0].values()) == set(whole[2].values()) == {16}
    assert sum(right.values()) < sum(alone[2].values())


def test_a_less_important_layer_loses_a_larger_share():
    tree = PeerTree(lambda: {"body": _chain(), "head": nn.Linear(40, TINY.num_classes)}, [1, 1])
    costs = layer_costs(tree, TINY)
    heads = head_names(tree, costs, TINY)
    groups = channel_groups(tree, heads, TINY)
    assert len(groups) == 4
    importance = {"0": 4.0, "1": 0.5, "2": 2.0, "3": 1.0}
    uniform = {f"stages.body.0.{layer}.weight": torch.ones(40, 1) * value for layer, value in importance.items()}
    score_groups(groups, uniform)
    PeerBudget(tree, 0, groups, costs, heads, PruningConfig(ratios=[0.4], unit="channels")).fit()
    kept = {group.members[0][0].split(".")[3]: group.kept for group in groups}
    assert kept["1"] < kept["3"] < kept["2"] < kept["0"] < 40
    assert sum(kept.values()) == pytest.approx(0.6 * 160, abs=1)


def _chain():
    """Four convolutions of one width, so that only importance tells them apart."""
    convs = [nn.Conv2d(TINY.channels if not index else 40, 40, 1) for index in range(4)]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(("min_channels", "round_to"), [(4, 1), (11, 1), (1, 4), (6, 8)])
def test_every_layer_keeps_its_least_and_round_widths(min_channels, round_to):
    tree = tiny_tree(2, 2, 2, 2)
    pruned(tree, ratios=[0.2, 0.3], unit="channels", min_channels=min_channels, round_to=round_to)
    hidden = [n for name, n in widths(tree).items() if ".head." not in name]
    assert min(hidden) >= min_channels
    assert all(n % round_to == 0 for n in hidden)
    assert sum(hidden) < 2 * (16 * 3 + 32) * 0.75 + 1


def test_a_layer_narrower_than_its_least_stays_whole():
    tree = tiny_tree(1, 1, 1, 1)
    pruned(tree, ratios=[0.1], min_channels=20)
    assert {n for name, n in widths(tree).items() if ".wide." not in name} == {16, TINY.num_classes}


@pytest.mark.parametrize("unit", ["channels", "params", "macs"])
@pytest.mark.parametrize(
    ("sharing", "ratios", "settings"),
    [
        ([1, 1, 1, 2], [0.0, 0.5], {}),
        ([1, 1, 2, 2], [0.1, 0.9], {}),
        ([1, 1, 1, 1], [0.99], {"min_channels": 8}),
        ([1, 1, 1, 1], [0.8], {"round_to": 16}),
    ],
)
def test_a_ratio_out_of_reach_is_refused_with_one_that_is_in_reach(unit, sharing, ratios, settings):
    tree, batches = tiny_tree(*sharing), [batch(TINY, 8)]
    before = copy.deepcopy(tree.state_dict())
    with pytest.raises(UserError) as caught:
        pruned(tree, batches, ratios=ratios, unit=unit, **settings)
    message = str(caught.value)
    assert f"pruning.ratios.{len(ratios) - 1} = {ratios[-1]} is out of reach" in message
    assert all(torch.equal(before[name], tensor) for name, tensor in tree.state_dict().items())

    reachable = float(re.search(r"at most ([\d.]+)", message)[1])
    assert reachable < ratios[-1]
    full = peer_costs(tree, TINY)
    pruned(tree, batches, ratios=[*ratios[:-1], reachable], unit=unit, **settings)
    achieved = removed_shares(full, peer_costs(tree, TINY))[-1][f"{unit}_drop"]
    assert reachable - ROUNDING <= achieved < reachable + 0.002


def test_one_seed_gives_one_plan_and_another_seed_another_start():
    def start(seed):
        config = parse_config({"seed": seed, "model": {"sharing": [1, 1, 1, 2, 2]}, "pruning": {"ratios": [0.2, 0.3]}})
        checkpoint = initial_checkpoint(config, load_dataset(config))
        return checkpoint.model, checkpoint.metadata["channels"]

    (model, plan), (again, plan_again), (other, _) = start(0), start(0), start(1)
    assert plan
    assert plan == plan_again
    assert all(torch.equal(model[name], again[name]) for name in model)
    assert not torch.equal(model["stages.head.0.2.bias"], other["stages.head.0.2.bias"])


def snip(tree, batches):
    """|w * dL/dw| by plain autograd, L the mean over the batches of the peers' summed cross-entropy."""
    tree = copy.deepcopy(tree).train()
    for inputs, targets in batches:
        sum(F.cross_entropy(logits, targets) for logits in tree.logits(inputs)).div(len(batches)).backward()
    return {name: (p * p.grad).abs().detach() for name, p in tree.named_parameters()}


def test_saliency_is_snip_and_leaves_the_tree_as_it_was():
    tree, batches = tiny_tree(1, 2, 2, 2), [batch(TINY, 8), batch(TINY, 8)]
    before = copy.deepcopy(tree.state_dict())
    found, expected = CRITERIA["snip"](tree, batches), snip(tree, batches)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)
    assert all(torch.equal(before[name], tensor) for name, tensor in tree.state_dict().items())
    assert all(p.grad is None for p in tree.parameters())


def test_the_filters_that_went_are_those_of_the_smallest_saliency():
    tree, batches = tiny_tree(1, 1, 1, 1), [batch(TINY, 8), batch(TINY, 8)]
    whole = copy.deepcopy(tree).state_dict()
    filters = {
        name.removesuffix(".weight"): values.flatten(1).sum(1)
        for name, values in snip(tree, batches).items()
        if values.dim() > 1
    }
    pruned(tree, batches, ratios=[0.4])
    left = tree.state_dict()

    def strongest(importance, conv):
        return importance.topk(len(left[f"{conv}.weight"])).indices.sort().values

    stem, conv1, conv2, wide = "stages.stem.0.0", "stages.block.0.conv1", "stages.block.0.conv2", "stages.wide.0.0"
    stream = strongest((filters[stem] + filters[conv2]) / 2, stem)  # the sum of the block ties the two
    inside, wide_kept = strongest(filters[conv1], conv1), strongest(filters[wide], wide)
    assert len(stream) < 16
    assert len(inside) < 16
    assert len(wide_kept) < 32
    assert torch.equal(left[f"{stem}.weight"], whole[f"{stem}.weight"][stream])
    assert torch.equal(left[f"{conv1}.weight"], whole[f"{conv1}.weight"][inside][:, stream])
    assert torch.equal(left[f"{conv2}.weight"], whole[f"{conv2}.weight"][stream][:, inside])
    assert torch.equal(left[f"{wide}.weight"], whole[f"{wide}.weight"][wide_kept][:, stream])
    assert torch.equal(left[f"{wide}.bias"], whole[f"{wide}.bias"][wide_kept])
    head = whole["stages.head.0.2.weight"].unflatten(1, (32, 4))[:, wide_kept].flatten(1)
    assert torch.equal(left["stages.head.0.2.weight"], head)
    assert left["stages.wide.0.1.running_var"].shape == wide_kept.shape


def test_removing_dead_filters_changes_no_logits():
    tree = tiny_tree(1, 1, 1, 1)
    dead = torch.arange(0, 32, 2)
    with torch.no_grad():
        conv, norm = tree.stages["wide"][0][:2]
        for tensor in (conv.weight, conv.bias, norm.weight, norm.bias):
            tensor[dead] = 0
    inputs, _ = batch(TINY)
    before = run_in_evaluation(tree, inputs)
    pruned(tree, ratios=[0.2], min_channels=16)
    assert widths(tree)["stages.wide.0.0"] == 16
    torch.testing.assert_close(run_in_evaluation(tree, inputs), before)


@pytest.mark.parametrize(
    "plan", [{"stages.stem.0.0": [17, 2]}, {"stages.nowhere.0": [4, 4]}, {"stages.stem.0.2": [4, 4]}]
)
def test_a_plan_of_another_network_is_refused(plan):
    with pytest.raises(ValueError, match="cannot have"):
        apply_channel_widths(tiny_tree(1, 1, 1, 1), plan)


def test_depthwise_convolutions_stay_depthwise():
    tree = PeerTree(lambda: build_stages("mobilenet_v2", CIFAR), half_shared("mobilenet_v2", CIFAR))
    prune(tree, PruningConfig(ratios=[0.2, 0.4], round_to=8, min_channels=8), CIFAR, [batch(CIFAR)])
    depthwise = [m for m in tree.modules() if isinstance(m, CONV) and m.groups > 1]
    assert len(depthwise) == 6 + 2 * 11  # of which the first six are shared
    assert all(conv.groups == conv.in_channels == conv.out_channels for conv in depthwise)
    assert all(conv.out_channels % 8 == 0 for conv in depthwise)
