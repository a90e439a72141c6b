"""ONE, OKDDip, PCL, FFL, FFSD and BOC-KD: a property of each, the losses of public code, and trees that they refuse."""

import json
import math
from pathlib import Path

import pytest
import torch
from family import SPEC, at_rate, batch, enumerate_names, exits_of_one_network, pruned_tree, stages
from torch import nn
from torch.nn.functional import cross_entropy

from wml_ray.config.schema import Config
from wml_ray.errors import UserError
from wml_ray.methods.attention import Decoder, attention, with_shift
from wml_ray.methods.base import StepContext
from wml_ray.methods.ffl import fusion
from wml_ray.methods.registry import build
from wml_ray.networks.features import mean_over_positions
from wml_ray.networks.peer_tree import PeerTree

PUBLISHED = json.loads((Path(__file__).parent / "published_losses.json").read_text())
FIRST_STEP = at_rate(0.1)


def method_of(name, tree=None, **changed):
    settings = getattr(Config(), name)
    return build(name, tree or pruned_tree(), settings.model_copy(update=changed), SPEC, seed=0).double()


def tree_of(sharing):
    torch.manual_seed(0)
    return PeerTree(lambda: dict(enumerate_names(stages(SPEC))), sharing)


def test_the_mean_over_positions_keeps_the_channels_of_maps_and_of_tokens():
    maps = torch.randn(2, 5, 3, 4)
    assert mean_over_positions(maps).allclose(maps.mean((2, 3)))
    assert mean_over_positions(maps.flatten(2).transpose(1, 2)).allclose(maps.mean((2, 3)))


def test_the_gate_of_one_is_on_the_simplex_and_learns_from_its_own_labels_alone():
    method, (inputs, targets) = method_of("one"), batch(6)
    outputs = method(inputs)
    torch.testing.assert_close(outputs["gate_BM"].sum(1), torch.ones(6, dtype=torch.float64))
    assert (outputs["gate_BM"] >= 0).all()
    terms, gate = method.losses(outputs, targets, FIRST_STEP), list(method.gate.parameters())
    for name in ("labels", "mutual"):
        gradients = torch.autograd.grad(terms[name], gate, retain_graph=True, allow_unused=True)
        assert all(gradient is None or not gradient.any() for gradient in gradients)
    assert torch.autograd.grad(terms["gate"], gate[0])[0].any()


def test_the_leader_of_okddip_teaches_nobody_and_attention_rows_are_on_the_simplex():
    method, (inputs, targets) = method_of("okddip"), batch(6)
    outputs = method(inputs)
    rows = method.attention(outputs["pooled_BC"]).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    logits = outputs["logits_MBK"].detach().requires_grad_()
    terms = method.losses({**outputs, "logits_MBK": logits}, targets, FIRST_STEP)
    of_peers = torch.autograd.grad(terms["mutual"], logits, retain_graph=True)[0]
    assert not of_peers[method.leader].any()
    assert of_peers[: method.leader].any()


def test_the_teachers_of_okddip_can_be_detached():
    logits = method_of("okddip")(batch(6)[0])["logits_MBK"].detach().requires_grad_()
    for stop, taught in ((False, True), (True, False)):
        method = method_of("okddip", stop_gradient_teacher=stop)
        outputs = {**method(batch(6)[0]), "logits_MBK": logits}
        leader = method.losses(outputs, batch(6)[1], FIRST_STEP)["leader"]
        assert bool(torch.autograd.grad(leader, logits)[0][0].any()) == taught


def test_the_averages_of_pcl_follow_their_recursion_and_keep_statistics_of_their_own():
    """A plain mean of the parameters after each step while that decays faster, then the exponential average."""
    method, (views, targets) = method_of("pcl", decay=0.6), batch(4 * 6)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1)
    history, expected = [], None
    for step in range(5):
        terms = method.losses(method(views), targets[:6], StepContext(step, 0, 1, 0.1))
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        method.after_step(StepContext(step, 0, 1, 0.1), (views, targets[:6]), None)
        history.append([p.detach().clone() for p in method.tree.parameters()])
        if step < 2:  # 1 - 1 / (t + 1) is above 0.6 from t = 2 on
            expected = [sum(tensors) / len(tensors) for tensors in zip(*history, strict=True)]
        else:
            expected = [0.6 * old + 0.4 * new for old, new in zip(expected, history[-1], strict=True)]
        torch.testing.assert_close(list(method.average.parameters()), expected, rtol=1e-10, atol=1e-14)
    statistics = [(name, b) for name, b in method.average.named_buffers() if "running" in name]
    of_tree = dict(method.tree.named_buffers())
    assert all(b.std() > 0 and not torch.allclose(b, of_tree[name]) for name, b in statistics)


def test_what_pcl_evaluates_are_its_averages():
    method, inputs = method_of("pcl").eval(), batch(6)[0]
    with torch.no_grad():
        for parameter in method.average.parameters():
            parameter.mul_(1.5)
        assert method(inputs)["logits_MBK"].equal(method.average(inputs))
    assert {name: t.data_ptr() for name, t in method.deployed_state().items()} == {
        name: t.data_ptr() for name, t in method.average.state_dict().items()
    }


def test_the_fused_classifier_of_ffl_learns_from_the_mean_and_teaches_detached():
    method, (inputs, targets) = method_of("ffl"), batch(6)
    outputs = {name: tensor.detach().requires_grad_() for name, tensor in method(inputs).items()}
    terms = method.losses(outputs, targets, FIRST_STEP)
    for name, learner in (("mutual", "logits_MBK"), ("fused", "fused_BK")):
        for leaf in ("logits_MBK", "fused_BK"):
            (gradient,) = torch.autograd.grad(terms[name], outputs[leaf], retain_graph=True, allow_unused=True)
            assert (gradient is not None and bool(gradient.any())) == (leaf == learner)


def test_each_term_of_ffsd_trains_its_learner_and_none_of_its_teachers():
    """No gradient of the leader's terms flows into fusion, decoders or students; no other term trains the leader."""
    method, (inputs, targets) = method_of("ffsd", tree_of([4, 4, 4, 4])), batch(6)
    terms, learners = method.losses(method(inputs), targets, FIRST_STEP), {}
    for term, loss in terms.items():
        gradients = torch.autograd.grad(loss, list(method.parameters()), retain_graph=True, allow_unused=True)
        named = zip(method.named_parameters(), gradients, strict=True)
        learning = [name for (name, _), gradient in named if gradient is not None and gradient.any()]
        peers = [method.tree.peers_through(name.removeprefix("tree.")) for name in learning if name.startswith("tree.")]
        learners[term] = set().union(*peers) | {name.partition(".")[0] for name in learning} - {"tree"}
    assert learners == {
        "labels": {0, 1, 2, 3},
        "fused_labels": {"fusion", "classifier"},
        "mutual": {0, 1, 2},
        "fused": {"fusion", "classifier"},
        "leader": {3},
        "diversity": {1, 2},
        "maps": {3, "expansion"},
        "decoders": {"decoders"},
    }


def test_the_maps_of_the_whole_network_teach_and_learn_nothing_from_boc_kd():
    method, (inputs, targets) = method_of("boc_kd"), batch(6)
    whole = {name for name, _ in method.tree.named_parameters() if 0 in method.tree.peers_through(name)}
    own = [
        p for name, p in method.tree.named_parameters() if name in whole and len(method.tree.peers_through(name)) == 1
    ]
    loss = method.losses(method(inputs), targets, FIRST_STEP)["maps"]
    assert all(gradient is None for gradient in torch.autograd.grad(loss, own, allow_unused=True, retain_graph=True))
    for name, adapter in method.adapters.items():
        stage, copy = map(int, name.split("_"))
        maps = method.shapes(method.tree, SPEC).maps[stage]
        assert (adapter.in_channels, adapter.out_channels) == (maps[copy].shape[1], maps[0].shape[1])
    assert len({adapter.in_channels for adapter in method.adapters.values()}) > 1


def test_the_last_exit_learns_from_its_labels_alone():
    method, targets = method_of("self_distillation", exits_of_one_network(), feature_weight=1.0), batch(5)[1]
    logits = torch.randn(4, 5, 10, dtype=torch.float64, requires_grad=True)
    *early, last = torch.randn(4, 5, 12, dtype=torch.float64, requires_grad=True).unbind()
    outputs = {"logits_MBK": logits, **{f"adapted{i}": feature for i, feature in enumerate(early)}, "last_BD": last}
    loss = sum(method.losses(outputs, targets, FIRST_STEP).values())
    ours, feature = torch.autograd.grad(loss, [logits, last], allow_unused=True)
    labels = torch.autograd.grad(cross_entropy(logits[-1], targets), logits)[0]
    torch.testing.assert_close(ours[-1], labels[-1], rtol=1e-12, atol=1e-14)
    assert feature is None
    assert ours[:-1].abs().amin() > 0


@pytest.mark.parametrize(
    ("name", "tree", "mend"),
    [
        ("one", lambda: tree_of([4, 4, 4, 4]), "model.sharing"),
        ("okddip", lambda: tree_of([1, 1, 1, 2]), "model.sharing"),
        ("ffsd", lambda: tree_of([1, 1, 1, 2]), "model.sharing"),
        ("boc_kd", lambda: pruned_tree((0.4, 0.2, 0.3, 0.0)), "pruning.ratios"),
    ],
    ids=["one", "okddip", "ffsd", "boc_kd"],
)
def test_a_tree_that_does_not_fit_is_refused_with_the_key_to_change(name, tree, mend):
    with pytest.raises(UserError, match=mend):
        method_of(name, tree())


@pytest.mark.parametrize("name", ["okddip", "ffsd"])
def test_a_leader_that_is_no_peer_is_refused(name):
    with pytest.raises(UserError, match=rf"{name}.leader = 4: the peers are 0 to 3"):
        method_of(name, leader=4)


def published(name):
    return [case for case in PUBLISHED["cases"] if case["method"] == name]


def given(name):
    return torch.tensor(PUBLISHED["inputs"][name], dtype=torch.float64)


def assert_equals_the_public_code(method, outputs, case, **leaves):
    """The loss, and every gradient of the fixture: each is of one of the `leaves`."""
    context = StepContext(step=0, epoch=case["epoch"], total_epochs=case["total_epochs"], learning_rate=0.1)
    loss = sum(method.losses(outputs, torch.tensor(PUBLISHED["inputs"]["targets_B"]), context).values())
    assert math.isclose(loss.item(), case["loss"], rel_tol=1e-10)
    names = [name.removeprefix("gradient_") for name in case if name.startswith("gradient_")]
    gradients = torch.autograd.grad(loss, [leaves[name] for name in names]) if names else ()
    for name, ours in zip(names, gradients, strict=True):
        theirs = torch.tensor(case[f"gradient_{name}"], dtype=torch.float64)
        torch.testing.assert_close(ours.view_as(theirs), theirs, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("case", published("one"), ids=lambda case: f"epoch {case['epoch']}")
def test_one_equals_the_code_of_its_authors(case):
    method, logits = method_of("one", tree_of([1, 3, 3, 3]), **case["settings"]), given("logits_MBK")[:3]
    method.gate[0] = nn.Linear(6, 3).double()
    method.gate[0].load_state_dict({"weight": given("gate_weight"), "bias": given("gate_bias")})
    logits.requires_grad_()
    outputs = {"logits_MBK": logits, "gate_BM": method.gate(given("trunk_mean_BC"))}
    gate = {"gate_weight": method.gate[0].weight, "gate_bias": method.gate[0].bias}
    assert_equals_the_public_code(method, outputs, case, logits_MBK=logits, **gate)


@pytest.mark.parametrize("case", published("okddip"), ids=lambda case: f"epoch {case['epoch']}")
def test_okddip_equals_the_code_of_its_authors(case):
    method, logits = method_of("okddip", tree_of([4, 4, 4, 4]), **case["settings"]), given("logits_MBK")
    method.widths = [16] * 3
    for maps, weight in ((method.query, "query_weight"), (method.key, "key_weight")):
        maps["16"] = nn.Linear(16, 2, bias=False).double()
        maps["16"].load_state_dict({"weight": given(weight)})
    pooled = given("pooled_MBC").requires_grad_()
    leaves = {"logits_MBK": logits.requires_grad_(), "pooled_MBC": pooled}
    leaves |= {"query_weight": method.query["16"].weight, "key_weight": method.key["16"].weight}
    outputs = {"logits_MBK": logits, "pooled_BC": torch.cat(list(pooled[:3]), dim=1)}
    assert_equals_the_public_code(method, outputs, case, **leaves)


@pytest.mark.parametrize("case", published("ffl"), ids=lambda case: f"epoch {case['epoch']}")
def test_ffl_equals_the_code_of_its_authors(case):
    method, logits = method_of("ffl", tree_of([2, 2, 2, 2]), **case["settings"]), given("logits_MBK")[:2]
    fused = fusion([2, 2], 5).double()
    fused[0].weight.data.copy_(given("depthwise_weight"))
    fused[3].weight.data.copy_(given("pointwise_weight"))
    fused[-1].load_state_dict({"weight": given("classifier_weight"), "bias": given("classifier_bias")})
    maps = given("last_maps_MBCHW").requires_grad_()
    leaves = {"logits_MBK": logits.requires_grad_(), "last_maps_MBCHW": maps, "depthwise_weight": fused[0].weight}
    leaves |= {"pointwise_weight": fused[3].weight}
    leaves |= {"classifier_weight": fused[-1].weight, "classifier_bias": fused[-1].bias}
    outputs = {"logits_MBK": logits, "fused_BK": fused(torch.cat(list(maps), dim=1))}
    assert_equals_the_public_code(method, outputs, case, **leaves)


@pytest.mark.parametrize("case", published("pcl"), ids=lambda case: f"epoch {case['epoch']}")
def test_pcl_equals_public_code(case):
    method, logits = method_of("pcl", tree_of([3, 3, 3, 3]), **case["settings"]), given("logits_MBK").requires_grad_()
    outputs = {"logits_MBK": logits[:3], "classifier_BK": logits[3], "average_MBK": given("ema_logits_MBK")}
    assert_equals_the_public_code(method, outputs, case, logits_MBK=logits)


@pytest.mark.parametrize("case", published("ffsd"), ids=lambda case: f"epoch {case['epoch']}")
def test_ffsd_equals_the_code_of_its_authors(case):
    """But for the map that the decoder of student 1 reads, which is that of student 0 there."""
    method, logits = method_of("ffsd", tree_of([3, 3, 3, 3]), **case["settings"]), given("logits_MBK")[:3]
    fused = fusion([2, 2], 5).double()
    fused[0].weight.data.copy_(given("depthwise_weight"))
    fused[3].weight.data.copy_(given("pointwise_weight"))
    fused[-1].load_state_dict({"weight": given("classifier_weight"), "bias": given("classifier_bias")})
    decoders = [Decoder([(2, 2, 2), (1, 4, 4)]).double() for _ in range(2)]
    for decoder, weight in zip(decoders, given("decoder_weights"), strict=True):
        decoder.steps[0].convolution.weight.data.copy_(weight)
    last, leader, shallow, expanded = (
        given(name).requires_grad_()
        for name in ("last_maps_MBCHW", "leader_map_BCHW", "shallow_maps_MBCHW", "trans_fusion_BCHW")
    )
    logits.requires_grad_()
    fused_map = fused[:6](torch.cat(list(last.detach()), dim=1))
    outputs = {"logits_MBK": logits, "fused_BK": fused[6:](fused_map), "fused_map": fused_map, "expanded_map": expanded}
    outputs |= {"map2_0": last[0], "map2_1": last[1], "map2_2": leader, "map1_1": shallow[0], "map1_2": shallow[1]}
    reads = (with_shift(last[0], attention(last[0])), fused_map)
    for peer, decoder, read, own in zip((1, 2), decoders, reads, (last[1], leader), strict=True):
        (outputs[f"target{peer}_1"],) = decoder(read, frozen=True)
        (outputs[f"decoded{peer}_1"],) = decoder(own.detach())
    leaves = {"logits_MBK": logits, "last_maps_MBCHW": last, "leader_map_BCHW": leader}
    leaves |= {"shallow_maps_MBCHW": shallow, "trans_fusion_BCHW": expanded}
    assert_equals_the_public_code(method, outputs, case, **leaves)
