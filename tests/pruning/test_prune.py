"""Pruning, on a tree with a plain layer, a residual stream and several head inputs a channel."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from family import random_batch, run_in_evaluation
from torch import nn
from torchvision.models.resnet import BasicBlock

from wml_ray.config.load import parse_config
from wml_ray.config.schema import PruningConfig
from wml_ray.data.load import load_dataset
from wml_ray.errors import UserError
from wml_ray.networks.backbones import build_stages
from wml_ray.networks.costs import (
    CONV,
    WEIGHTED,
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

CIFAR, TINY = ImageSpec(3, 32, 10), ImageSpec(2, 8, 5)
ROUNDING = 1e-9
pytestmark = pytest.mark.usefixtures("seeded")


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
    return prune(tree, PruningConfig(**pruning), TINY, batches or [random_batch(TINY, 8)])


def widths(tree, names=None):
    layers = {name: m for name, m in tree.named_modules() if isinstance(m, WEIGHTED)}
    return {name: width(layer, "out") for name, layer in layers.items() if names is None or name.startswith(names)}


@pytest.mark.parametrize("unit", ["channels", "params", "macs"])
def test_each_peer_loses_its_ratio_in_the_configured_unit(unit):
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
    start, batches = tiny_tree(1, 2, 4, 4), [random_batch(TINY, 8)]

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
def test_every_layer_keeps_the_minimum_and_round_widths(min_channels, round_to):
    tree = tiny_tree(2, 2, 2, 2)
    pruned(tree, ratios=[0.2, 0.3], unit="channels", min_channels=min_channels, round_to=round_to)
    hidden = [n for name, n in widths(tree).items() if ".head." not in name]
    assert min(hidden) >= min_channels
    assert all(n % round_to == 0 for n in hidden)
    assert sum(hidden) < 2 * (16 * 3 + 32) * 0.75 + 1


@pytest.mark.parametrize("ratios", [[0.1, 0.3], [0.5, 0.6]])
def test_auto_keeps_multiples_of_16_and_any_number_below_16(ratios):
    """Ratios stay in reach where all layers have 16 channels, as in a CIFAR ResNet's first stage."""
    tree = tiny_tree(1, 2, 2, 2)
    full = peer_costs(tree, TINY)
    pruned(tree, ratios=ratios, round_to="auto")
    hidden = {n for name, n in widths(tree).items() if ".head." not in name}
    assert all(n < 16 or n % 16 == 0 for n in hidden)
    assert any(n < 16 for n in hidden)
    achieved = [peer["channels_drop"] for peer in removed_shares(full, peer_costs(tree, TINY))]
    assert all(got >= asked - ROUNDING for got, asked in zip(achieved, ratios, strict=True))


def test_a_layer_narrower_than_the_minimum_stays_whole():
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
    tree, batches = tiny_tree(*sharing), [random_batch(TINY, 8)]
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


def test_widths_and_initial_tensors_follow_from_the_seed():
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


def test_snip_leaves_the_tree_unchanged_and_equals_its_twin():
    tree, batches = tiny_tree(1, 2, 2, 2), [random_batch(TINY, 8), random_batch(TINY, 8)]
    before = copy.deepcopy(tree.state_dict())
    found, expected = CRITERIA["snip"](tree, batches), snip(tree, batches)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)
    assert all(torch.equal(before[name], tensor) for name, tensor in tree.state_dict().items())
    assert all(p.grad is None for p in tree.parameters())


def test_the_removed_filters_have_the_smallest_saliency():
    tree, batches = tiny_tree(1, 1, 1, 1), [random_batch(TINY, 8), random_batch(TINY, 8)]
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
    inputs, _ = random_batch(TINY)
    before = run_in_evaluation(tree, inputs)
    pruned(tree, ratios=[0.2], min_channels=16)
    assert widths(tree)["stages.wide.0.0"] == 16
    torch.testing.assert_close(run_in_evaluation(tree, inputs), before)


@pytest.mark.parametrize(
    "plan", [{"stages.stem.0.0": [17, 2]}, {"stages.nowhere.0": [4, 4]}, {"stages.stem.0.2": [4, 4]}]
)
def test_widths_of_another_network_are_refused(plan):
    with pytest.raises(ValueError, match="cannot have"):
        apply_channel_widths(tiny_tree(1, 1, 1, 1), plan)


def test_depthwise_convolutions_stay_depthwise():
    tree = PeerTree(lambda: build_stages("mobilenet_v2", CIFAR), [1, 1, 1, 2, 2, 2])
    prune(tree, PruningConfig(ratios=[0.2, 0.4], round_to=8, min_channels=8), CIFAR, [random_batch(CIFAR)])
    depthwise = [m for m in tree.modules() if isinstance(m, CONV) and m.groups > 1]
    assert len(depthwise) == 6 + 2 * 11  # of which the first six are shared
    assert all(conv.groups == conv.in_channels == conv.out_channels for conv in depthwise)
    assert all(conv.out_channels % 8 == 0 for conv in depthwise)
