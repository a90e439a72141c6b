import math

import pytest
import reference
import torch
import workers
from family import SPEC, at_rate, batch, eq_1, pruned_tree, stages
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from wml_ray.methods.base import StepContext
from wml_ray.methods.hypergradient import log_mirror_descent, weight_gradient
from wml_ray.methods.losses import ensemble_loss, peer_losses
from wml_ray.networks.peer_tree import PeerTree, functional_forward
from wml_ray.networks.sync_batchnorm import convert_sync_batchnorm
from wml_ray.networks.trunk_gradient import divide_shared_gradients

OMEGA = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
EXACT, SAME_POINT = eq_1(alpha=0.4, unroll="exact"), eq_1(alpha=0.4, unroll="same_point")
OPTIONS = [
    {},
    {"temperature": 2.0, "kl_direction": "student_to_teacher"},
    {"stop_gradient_teacher": True},
    {"stop_gradient_teacher": True, "kl_direction": "student_to_teacher"},
    {"balance": "peer"},
    {"balance": "peer", "weigh_labels": False},
    {"weigh_labels": False, "stop_gradient_teacher": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_exact_gradient_equals_autograd_through_the_sgd_step(options):
    tree, inner, outer = pruned_tree(), batch(8, 1), batch(6, 2)
    ours = weight_gradient(tree, inner, outer, OMEGA, EXACT.model_copy(update=options), at_rate(0.3))
    twin = reference.unrolled_gradient(tree, [inner], [outer], OMEGA, 0.4, 0.3, **options)
    torch.testing.assert_close(ours, twin, rtol=1e-10, atol=1e-12)


def test_exact_gradient_on_own_views_equals_autograd_through_the_sgd_step():
    """The SGD step is taken on a view for each peer; the outer loss is that of the ensemble on one view."""
    tree, (views, _), (_, targets), outer = pruned_tree(), batch(24, 1), batch(6, 3), batch(6, 2)
    settings = EXACT.model_copy(update={"own_views": True})
    ours = weight_gradient(tree, (views, targets), outer, OMEGA, settings, at_rate(0.3))
    inner = views.unflatten(0, (4, 6)), targets
    twin = reference.unrolled_gradient(reference.OnOwnViews(tree), [inner], [outer], OMEGA, 0.4, 0.3)
    torch.testing.assert_close(ours, twin, rtol=1e-10, atol=1e-12)


def test_same_point_gradient_is_equation_5_by_backward_passes():
    tree, (x, y), (outer_x, outer_y) = pruned_tree(), batch(8, 1), batch(6, 2)
    parameters, omega = dict(tree.named_parameters()), OMEGA.clone().requires_grad_()
    outer = ensemble_loss(functional_forward(tree, parameters, outer_x), outer_y, omega)
    direct, *v = torch.autograd.grad(outer, [omega, *parameters.values()])
    expected = []
    for i, loss in enumerate(peer_losses(functional_forward(tree, parameters, x), y, SAME_POINT)):
        slopes = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, materialize_grads=True)
        expected.append(direct[i] - 0.3 * sum((a * b).sum() for a, b in zip(v, slopes, strict=True)))
    ours = weight_gradient(tree, (x, y), (outer_x, outer_y), OMEGA, SAME_POINT, at_rate(0.3))
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-11, atol=1e-13)


def test_divided_trunk_gradients_divide_the_step_and_the_inner_products():
    tree, inner, outer = pruned_tree(), batch(8, 1), batch(6, 2)
    scales = {name: 1 / len(tree.peers_through(name)) for name, _ in tree.named_parameters()}
    twin = reference.unrolled_gradient(tree, [inner], [outer], OMEGA, 0.4, 0.3, scales)
    divide_shared_gradients(tree)
    ours = weight_gradient(tree, inner, outer, OMEGA, EXACT, at_rate(0.3))
    torch.testing.assert_close(ours, twin, rtol=1e-10, atol=1e-12)


def test_the_ramp_of_the_kl_term_enters_the_gradient():
    tree, inner, outer = pruned_tree(), batch(8, 1), batch(6, 2)
    early = StepContext(step=3, epoch=1, total_epochs=10, learning_rate=0.3)
    ours = weight_gradient(tree, inner, outer, OMEGA, EXACT.model_copy(update={"ramp": 0.4}), early)
    share = math.exp(-5 * (1 - 1 / 4) ** 2)
    twin = reference.unrolled_gradient(tree, [inner], [outer], OMEGA, 0.4, 0.3, kl_share=share)
    torch.testing.assert_close(ours, twin, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_buffers_gradients_parameters_and_mode(training):
    tree = pruned_tree().train(training)
    before = {name: tensor.clone() for name, tensor in tree.state_dict().items()}
    weight_gradient(tree, batch(8, 1), batch(6, 2), OMEGA, EXACT, at_rate(0.3))
    assert all(tensor.equal(before[name]) for name, tensor in tree.state_dict().items())
    assert all(p.grad is None for p in tree.parameters())
    assert tree.training is training


def test_dropout_draws_the_same_masks_in_both_inner_passes():
    """With a different mask in each, the gradient would not be the derivative of any one function."""
    torch.manual_seed(0)
    stages_of = {"body": nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.Tanh()), "head": nn.Linear(30, 10)}
    tree = PeerTree(lambda: stages_of, [1, 1]).double()
    tree.stages["body"][0].append(nn.Dropout(0.5))
    omega = torch.ones(1, dtype=torch.float64)
    inner, outer = batch(8, 1), batch(6, 2)
    torch.manual_seed(7)
    ours = weight_gradient(tree, inner, outer, omega, eq_1(alpha=0.0, unroll="exact"), at_rate(0.3))
    torch.manual_seed(7)
    twin = reference.unrolled_gradient(tree, [inner], [outer], omega, 0.0, 0.3)
    torch.testing.assert_close(ours, twin, rtol=1e-10, atol=1e-12)


def test_a_list_of_logits_serves_as_well_as_a_stack():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.peers = nn.ModuleList(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2))

        def forward(self, inputs):
            return [peer(inputs) for peer in self.peers]

    torch.manual_seed(0)
    pair, omega = Pair().double(), torch.tensor([0.3, 0.7], dtype=torch.float64)
    ours = weight_gradient(pair, batch(8, 1), batch(6, 2), omega, eq_1(unroll="exact"), at_rate(0.1))
    twin = reference.unrolled_gradient(pair, [batch(8, 1)], [batch(6, 2)], omega, 0.5, 0.1)
    torch.testing.assert_close(ours, twin, rtol=1e-11, atol=1e-13)


def test_float32_is_close_to_float64():
    tree, inner, outer = pruned_tree(), batch(32, 1), batch(32, 2)
    exact = weight_gradient(tree, inner, outer, OMEGA, EXACT, at_rate(0.3))
    single_batches = (inner[0].float(), inner[1]), (outer[0].float(), outer[1])
    single = weight_gradient(tree.float(), *single_batches, OMEGA, EXACT, at_rate(0.3))
    torch.testing.assert_close(single, exact, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_the_gradient_is_that_of_float32_rounded():
    tree, (x, y), (outer_x, outer_y) = pruned_tree().float(), batch(32, 1), batch(32, 2)
    batches = (x.float(), y), (outer_x.float(), outer_y)
    single, half = (
        weight_gradient(tree, *batches, OMEGA, SAME_POINT, at_rate(0.3)._replace(precision=precision))
        for precision in ("float32", "bfloat16")
    )
    assert 0 < (half - single).norm() < 0.02 * single.norm()


def test_equal_peers_keep_equal_weights_to_the_bit():
    torch.manual_seed(0)
    networks = stages(SPEC)
    tree = PeerTree(lambda: {str(i): s for i, s in enumerate(networks)}, [1, 2, 4, 4]).double()
    for copies in tree.stages.values():
        for twin in copies[1:]:
            twin.load_state_dict(copies[0].state_dict())
    omega = torch.full((4,), 0.25, dtype=torch.float64)
    gradient = weight_gradient(tree, batch(8, 1), batch(6, 2), omega, eq_1(unroll="exact"), at_rate(0.1))
    updated = log_mirror_descent(omega.log(), gradient, 1.0)
    assert updated.eq(updated[0]).all()


def _shards(rank):
    """Shares of different sizes: 5 and 3 images inside, 4 and 2 outside."""
    inner, outer = batch(8, 1), batch(6, 2)
    ranges = ((slice(0, 5), slice(0, 4)), (slice(5, 8), slice(4, 6)))[rank]
    return tuple(tuple(part[where] for part in pair) for pair, where in zip((inner, outer), ranges, strict=True))


def _gradients(rank):
    inner, outer = _shards(rank)
    return [
        weight_gradient(pruned_tree(), inner, outer, OMEGA, settings, at_rate(0.3)) for settings in (EXACT, SAME_POINT)
    ]


def test_two_workers_agree_to_the_bit_and_with_autograd_over_both_shares(tmp_path):
    (exact, same_point), other = workers.run(_gradients, tmp_path)
    assert exact.equal(other[0])
    assert same_point.equal(other[1])
    (inner_0, outer_0), (inner_1, outer_1) = _shards(0), _shards(1)
    twin = reference.unrolled_gradient(pruned_tree(), [inner_0, inner_1], [outer_0, outer_1], OMEGA, 0.4, 0.3)
    torch.testing.assert_close(exact, twin, rtol=1e-10, atol=1e-12)


def _synchronised_gradient(rank):
    tree = pruned_tree()
    convert_sync_batchnorm(tree)
    inner, outer = _shards(rank)
    gradient = weight_gradient(tree, inner, outer, OMEGA, EXACT, at_rate(0.3))
    tree(inner[0])
    return gradient, dict(tree.named_buffers())


def test_synchronised_batchnorm_makes_two_workers_one(tmp_path):
    """Gradient, backward and tangent go through statistics of all images, and running statistics follow them."""
    (gradient, buffers), _ = workers.run(_synchronised_gradient, tmp_path)
    tree, inner, outer = pruned_tree(), batch(8, 1), batch(6, 2)
    twin = reference.unrolled_gradient(tree, [inner], [outer], OMEGA, 0.4, 0.3)
    torch.testing.assert_close(gradient, twin, rtol=1e-9, atol=1e-11)
    tree(inner[0])
    for name, buffer in tree.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-10, atol=1e-12)


vectors = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(1e-3, 1.0), min_size=n, max_size=n),
        st.lists(st.floats(-1e6, 1e6), min_size=n, max_size=n),
    )
)


@given(vectors, st.floats(0, 10))
def test_mirror_descent_stays_on_the_simplex(pair, step_size):
    weights = torch.tensor(pair[0], dtype=torch.float64)
    gradient = torch.tensor(pair[1], dtype=torch.float64)
    updated = log_mirror_descent((weights / weights.sum()).log(), gradient, step_size).exp()
    assert (updated >= 0).all()
    assert math.isclose(float(updated.sum()), 1.0, rel_tol=1e-9)


@given(vectors, st.floats(-1e3, 1e3))
def test_a_constant_added_to_the_gradient_changes_nothing(pair, constant):
    weights = torch.tensor(pair[0], dtype=torch.float64)
    log_weights = (weights / weights.sum()).log()
    gradient = torch.tensor(pair[1], dtype=torch.float64) / 1e5
    moved = log_mirror_descent(log_weights, gradient + constant, 0.7).exp()
    torch.testing.assert_close(moved, log_mirror_descent(log_weights, gradient, 0.7).exp(), rtol=1e-8, atol=1e-12)


def test_mirror_descent_is_equation_7():
    weights, gradient = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([1.0, -2.0, 0.5])
    unnormalised = weights * torch.exp(-0.4 * gradient)
    updated = log_mirror_descent(weights.log(), gradient, 0.4).exp()
    torch.testing.assert_close(updated, unnormalised / unnormalised.sum())


def test_a_weight_that_underflowed_recovers_in_log_space():
    log_weights = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    away = torch.tensor([0.0, 2000.0], dtype=torch.float64)
    far = log_mirror_descent(log_weights, away, 1.0)
    assert far.exp()[1] == 0
    torch.testing.assert_close(log_mirror_descent(far, -away, 1.0).exp(), log_weights.exp())
