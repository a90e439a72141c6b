"""Exits of one network as peers."""

import pytest
import reference
import torch
from family import EXITS, SPEC, at_rate, batch, chain_stages, exits_of_one_network, pruned_tree, tiny_config

from wml_ray.checkpoints.checkpoint import epoch_folder, write_checkpoint
from wml_ray.checkpoints.load import load_peer, load_tree
from wml_ray.config.schema import Config
from wml_ray.data.load import load_dataset
from wml_ray.errors import UserError
from wml_ray.export.network import load_standalone, network_of
from wml_ray.export.standalone import write_standalone
from wml_ray.methods.registry import build
from wml_ray.networks.costs import count_macs, count_params, peer_costs
from wml_ray.networks.trunk_gradient import divide_shared_gradients
from wml_ray.training.start import initial_checkpoint

ONE_STAGE = ["model.backbone=family:chain_stages", "pruning.ratios=[0,0]", "model.sharing=[1,1,1,1,2]"]


def test_an_exit_stands_alone_with_the_logits_and_costs_that_it_has_in_the_tree():
    tree, (inputs, _) = exits_of_one_network().eval(), batch(4)
    logits_MBK, costs = tree(inputs), peer_costs(tree, SPEC)
    assert tree.features(inputs).logits_MBK.equal(logits_MBK)
    for index, own in enumerate(costs):
        peer = tree.peer(index)
        assert peer(inputs).equal(logits_MBK[index])
        assert (own["params"], own["macs"]) == (count_params(peer), count_macs(peer, SPEC))
        assert len(peer) == index + 2
    for name, _ in tree.named_modules():
        if name.count(".") == 2:
            assert tree.peers_through(name) == {peer for peer in range(4) if name in tree.path(peer)}


def test_pruned_exits_lose_their_ratio_and_the_stages_they_share_keep_what_the_smallest_leaves():
    tree, whole = exits_of_one_network(), [stage[0].out_channels for stage in chain_stages(SPEC)[:-1]]
    for stage, width in zip(list(tree.stages.values())[:-1], whole, strict=True):
        assert stage[0][0].out_channels >= 0.5 * width
    assert tree.stages["stage4"][0][3].out_channels < 12


def test_each_exit_sees_its_own_view_and_each_copy_runs_once():
    tree, (views, _) = exits_of_one_network(), batch(5 * 4)
    twin = reference.OnOwnViews(tree)(views.unflatten(0, (-1, 5)))
    torch.testing.assert_close(tree(views, own_views=True), twin, rtol=1e-12, atol=1e-12)
    maps = tree.features(views, own_views=True).maps
    assert [len(tensor) for (tensor,) in maps] == [20, 15, 10, 5]


def test_the_gradients_of_a_stage_are_divided_by_the_exits_after_it():
    tree, (inputs, _) = exits_of_one_network(), batch(4)
    tree(inputs).square().sum().backward()
    sums = {name: parameter.grad.clone() for name, parameter in tree.named_parameters()}
    tree.zero_grad()
    divide_shared_gradients(tree)
    tree(inputs).square().sum().backward()
    for name, count in (("stages.stage0.0.0.weight", 4), ("stages.stage2.0.0.weight", 2)):
        torch.testing.assert_close(tree.get_parameter(name).grad, sums[name] / count)


def test_a_checkpoint_of_exits_gives_its_tree_its_peers_and_a_standalone_network(tmp_path):
    config = tiny_config(*EXITS)
    start = initial_checkpoint(config, load_dataset(config))
    start.metadata["history"] = [{"epoch": 0, "metrics": {"val/accuracy/method": 0.5}}]
    write_checkpoint(start, tmp_path, keep=1)
    folder, (inputs, _) = epoch_folder(tmp_path, 0), batch(4, dtype=torch.float32)
    tree = load_tree(folder, trust=True)
    for peer in (1, 3):
        expected = tree(inputs)[peer]
        assert load_peer(folder, peer, trust=True)(inputs).equal(expected)
        alone = tmp_path / f"alone{peer}"
        alone.mkdir()
        write_standalone(network_of(start, "start", peer), alone)
        assert load_standalone(alone, trust=True).tree.eval()(inputs)[0].equal(expected)


@pytest.mark.parametrize("method", ["wml", "independent", "dml"])
def test_methods_for_trees_train_exits_too(method):
    tree, (inputs, targets) = exits_of_one_network(), batch(32)
    method = build(method, tree, getattr(Config(), method), SPEC, seed=0).double()
    optimizer, losses = torch.optim.SGD(method.parameters(), lr=0.02, momentum=0.9), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = sum(method.losses(method(inputs), targets, at_rate(0.02)).values())
        loss.backward()
        assert all(parameter.grad.any() for parameter in method.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("model.exits=[2]", r"set model.sharing = \[1, 1, 1, 1, 1\]"),
        ("model.exits=[3,2]", r"must increase, from 1 to at most 4"),
        ("model.exits=[2,5]", r"such as \[3, 4\]"),
    ],
)
def test_exits_that_do_not_fit_are_refused_with_the_key_to_change(override, error):
    with pytest.raises(UserError, match=error):
        tiny_config(*ONE_STAGE, override)


def test_exits_of_a_tree_with_several_copies_are_refused():
    with pytest.raises(UserError, match=r"stages of one copy each, but model.sharing = \[1, 1, 2, 4, 4\]; set"):
        tiny_config(*EXITS, "model.sharing=[1,1,2,4,4]")


def test_exits_enter_the_run_id():
    ids = {tiny_config(*ONE_STAGE, f"model.exits={exits}").run_id for exits in ("[]", "[1,4]", "[2,4]")}
    assert len(ids) == 3


@pytest.mark.parametrize(
    ("method", "tree", "mend"),
    [
        ("ffl", exits_of_one_network, r"model.exits = \[1, 2, 3, 4\]; set it to \[\]"),
        ("self_distillation", pruned_tree, "with model.exits"),
    ],
)
def test_a_method_refuses_exits_or_their_absence(method, tree, mend):
    with pytest.raises(UserError, match=mend):
        build(method, tree(), getattr(Config(), method), SPEC, seed=0)
