"""One property of each method that needs nothing but logits."""

import pytest
import torch
import torch.nn.functional as F
from family import SPEC, at_rate, batch, enumerate_names, pruned_tree, stages

from wml_ray.config.schema import Config
from wml_ray.methods.losses import inner_loss
from wml_ray.methods.registry import build
from wml_ray.methods.settings import WmlConfig
from wml_ray.networks.peer_tree import PeerTree

FIRST_STEP = at_rate(0.1)


def method_of(name, tree=None):
    return build(name, tree or pruned_tree(), getattr(Config(), name), SPEC, seed=0)


def random_logits(num_peers=4):
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(num_peers, 5, 10, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), batch(5)[1]


def test_independent_peers_have_the_gradients_of_their_own_cross_entropies():
    method, (inputs, targets) = method_of("independent"), batch(5)
    heads = [list(method.tree.get_submodule(method.tree.path(peer)[-1]).parameters()) for peer in range(4)]
    logits_MBK = method(inputs)["logits_MBK"]
    loss = method.losses({"logits_MBK": logits_MBK}, targets, FIRST_STEP)["labels"]
    for logits, head in zip(logits_MBK, heads, strict=True):
        ours = torch.autograd.grad(loss, head, retain_graph=True)
        alone = torch.autograd.grad(F.cross_entropy(logits, targets), head, retain_graph=True)
        torch.testing.assert_close(ours, alone, rtol=1e-12, atol=1e-14)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, factor):
        ctx.factor = factor
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def scaled_at_forks(tree, inputs):
    """Logits of all peers, where the gradient into a copy is divided by the number of copies that it feeds."""
    outputs = [inputs]
    for copies in tree.stages.values():
        children = len(copies) // len(outputs)
        forked = [_Scaled.apply(tensor, 1 / children) for tensor in outputs for _ in range(children)]
        outputs = [copy(tensor) for copy, tensor in zip(copies, forked, strict=True)]
    return torch.stack(outputs)


@pytest.mark.parametrize("registered_before", [False, True])
def test_the_gradients_of_cl_ilr_are_those_of_scaled_forks(registered_before):
    """Also after a move to another type, and where another switch has asked for the division already."""
    twin, tree, (inputs, targets) = pruned_tree(), pruned_tree().float(), batch(5)
    method = method_of("cl_ilr", method_of("cl_ilr", tree).tree if registered_before else tree).double()
    sum(method.losses(method(inputs), targets, FIRST_STEP).values()).backward()
    twin.load_state_dict(tree.state_dict())
    twin_outputs = {"logits_MBK": scaled_at_forks(twin, inputs)}
    sum(method.losses(twin_outputs, targets, FIRST_STEP).values()).backward()
    for (name, ours), theirs in zip(tree.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", ["cl_ilr", "kdcl"])
def test_no_gradient_flows_into_a_mean_of_peers(name):
    """With a constant target t, the gradient of a T^2 KL by a student's logits is a T (q_i - t) / B, and no more.

    For `kdcl` this holds without `detach` too, as the gradients by the mean of all logits add up to zero.
    """
    method, (logits, targets) = method_of(name), random_logits()
    settings = method.settings
    mutual = method.losses({"logits_MBK": logits}, targets, FIRST_STEP)["mutual"]
    ours = torch.autograd.grad(mutual, logits)[0]
    everyone = logits.detach()
    means = {"kdcl": everyone.mean(0).expand(4, -1, -1), "cl_ilr": (everyone.sum(0) - everyone) / 3}[name]
    target, own = ((z / settings.temperature).softmax(-1) for z in (means, everyone))
    torch.testing.assert_close(ours, settings.alpha * settings.temperature * (own - target) / 5)


def test_each_peer_of_kdcl_is_trained_on_its_own_view():
    """Nothing is shared here: another view of peer 2 changes the logits of peer 2 alone."""
    tree = PeerTree(lambda: dict(enumerate_names(stages(SPEC))), [4, 4, 4, 4]).double().train()
    method, views = method_of("kdcl", tree), batch(4 * 5)[0]
    before = method(views)["logits_MBK"]
    views[10:15] = batch(5, seed=1)[0]
    changed = (method(views)["logits_MBK"] - before).abs().amax((1, 2)) > 1e-6
    assert changed.tolist() == [False, False, True, False]


def test_the_teacher_of_peer_to_peer_learns_from_the_labels_alone():
    method, (logits, targets) = method_of("peer_to_peer"), random_logits()
    terms = method.losses({"logits_MBK": logits}, targets, FIRST_STEP)
    ours = torch.autograd.grad(sum(terms.values()), logits, retain_graph=True)[0]
    labels = torch.autograd.grad(F.cross_entropy(logits[0], targets), logits)[0]
    torch.testing.assert_close(ours[0], labels[0], rtol=1e-12, atol=1e-14)
    for term in ("teacher", "mutual"):
        students = torch.autograd.grad(terms[term], logits, retain_graph=True)[0][1:]
        assert (students.abs().amax((1, 2)) > 1e-3).all()


def test_mutual_learning_of_two_peers_is_four_times_wml_at_fixed_weights_and_alpha_a_half():
    logits, targets = random_logits(num_peers=2)
    dml = method_of("dml")
    wml = WmlConfig(balance="paper", weigh_labels=True, alpha=0.5, temperature=dml.settings.temperature)
    losses = [
        sum(dml.losses({"logits_MBK": logits}, targets, FIRST_STEP).values()),
        4 * inner_loss(logits, targets, torch.full((2,), 0.5, dtype=torch.float64), wml),
    ]
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["independent", "dml", "cl_ilr", "kdcl", "peer_to_peer"])
def test_a_single_peer_learns_from_the_labels_alone(name):
    method, (logits, targets) = method_of(name), random_logits(num_peers=1)
    gradient = torch.autograd.grad(sum(method.losses({"logits_MBK": logits}, targets, FIRST_STEP).values()), logits)[0]
    labels = torch.autograd.grad(F.cross_entropy(logits[0], targets), logits)[0]
    share = 1 - getattr(method.settings, "alpha", 0.0)
    torch.testing.assert_close(gradient, share * labels, rtol=1e-12, atol=1e-14)
