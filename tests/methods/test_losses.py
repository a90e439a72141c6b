import itertools

import pytest
import reference
import torch
from family import eq_1
from hypothesis import given
from hypothesis import strategies as st

from wml_ray.methods.losses import divergences_from_others, ensemble_loss, inner_loss, peer_losses

OPTIONS = [
    {"temperature": tau, "kl_direction": direction, "stop_gradient_teacher": stop}
    for tau, direction, stop in itertools.product(
        (1.0, 3.0), ("teacher_to_student", "student_to_teacher"), (False, True)
    )
]


BALANCES = [{"balance": balance, "weigh_labels": weigh} for balance in ("paper", "peer") for weigh in (True, False)]


def family(num_peers=4, images=6, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_peers, images, classes, dtype=torch.float64, generator=generator)
    weights = torch.rand(num_peers, dtype=torch.float64, generator=generator).softmax(0)
    return logits.requires_grad_(), torch.randint(classes, (images,), generator=generator), weights.requires_grad_()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_inner_loss_and_its_gradients_equal_the_pairwise_twin(alpha, options):
    logits, targets, weights = family()
    ours = inner_loss(logits, targets, weights, eq_1(alpha=alpha, **options))
    twin = reference.inner_loss(logits, targets, weights, alpha, **options)
    torch.testing.assert_close(ours, twin, rtol=1e-12, atol=1e-13)
    for one, other in zip(
        torch.autograd.grad(ours, (logits, weights)), torch.autograd.grad(twin, (logits, weights)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_peer_losses_are_the_derivative_of_the_inner_loss_by_omega(options):
    logits, targets, weights = family()
    derivative = torch.autograd.grad(reference.inner_loss(logits, targets, weights, 0.4, **options), weights)[0]
    torch.testing.assert_close(
        peer_losses(logits, targets, eq_1(alpha=0.4, **options)), derivative, rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("options", BALANCES, ids=str)
def test_balanced_losses_and_their_derivative_by_omega_equal_the_twin(options):
    logits, targets, weights = family()
    settings = eq_1(alpha=0.3, **options)
    twin = reference.inner_loss(logits, targets, weights, 0.3, kl_share=0.4, **options)
    torch.testing.assert_close(inner_loss(logits, targets, weights, settings, 0.4), twin, rtol=1e-12, atol=1e-13)
    derivative = torch.autograd.grad(twin, weights)[0]
    torch.testing.assert_close(peer_losses(logits, targets, settings, 0.4), derivative, rtol=1e-11, atol=1e-12)


def test_the_balanced_loss_is_equation_1_at_another_alpha_times_a_constant():
    logits, targets, weights = family()
    alpha, peers = 0.3, len(logits)
    factor = alpha + peers * (1 - alpha)
    balanced = inner_loss(logits, targets, weights, eq_1(alpha=alpha, balance="peer"))
    paper = inner_loss(logits, targets, weights, eq_1(alpha=alpha / factor, balance="paper"))
    torch.testing.assert_close(balanced, factor * paper, rtol=1e-12, atol=1e-13)


def test_ensemble_loss_equals_its_twin():
    logits, targets, weights = family()
    torch.testing.assert_close(
        ensemble_loss(logits, targets, weights), reference.ensemble_loss(logits, targets, weights)
    )


def test_equal_peers_have_no_divergence_between_them():
    logits, targets, _ = family()
    same = logits[:1].expand(4, -1, -1)
    torch.testing.assert_close(
        peer_losses(same, targets, eq_1(alpha=1.0)), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_a_stopped_teacher_gets_no_gradient():
    logits, targets, _ = family(num_peers=2)
    only_peer_0_teaches = torch.tensor([1.0, 0.0], dtype=torch.float64)
    options = eq_1(alpha=1.0, stop_gradient_teacher=True)
    inner_loss(logits, targets, only_peer_0_teaches, options).backward()
    assert logits.grad[0].abs().max() < 1e-15
    assert logits.grad[1].abs().max() > 1e-3


def test_tokens_of_a_language_model_count_like_images():
    logits, targets, weights = family(images=6)
    as_tokens = logits.view(4, 2, 3, 5), targets.view(2, 3)
    assert inner_loss(*as_tokens, weights, eq_1(alpha=0.3)).equal(inner_loss(logits, targets, weights, eq_1(alpha=0.3)))
    assert ensemble_loss(*as_tokens, weights).equal(ensemble_loss(logits, targets, weights))


@pytest.mark.parametrize("weigh_labels", [True, False])
def test_half_precision_logits_are_scored_in_float32(weigh_labels):
    logits, targets, weights = family()
    half, settings = logits.detach().bfloat16(), eq_1(alpha=0.3, weigh_labels=weigh_labels)
    assert inner_loss(half, targets, weights, settings).equal(inner_loss(half.float(), targets, weights, settings))


def test_confident_peers_stay_finite():
    logits = torch.tensor([[[1e4, -1e4]], [[-1e4, 1e4]]])
    assert peer_losses(logits, torch.tensor([0]), eq_1()).isfinite().all()


@given(st.integers(1, 6), st.integers(1, 5), st.integers(2, 7), st.integers(0, 10**6))
def test_permuting_peers_permutes_their_losses(num_peers, images, classes, seed):
    logits, targets, weights = family(num_peers, images, classes, seed)
    order = torch.randperm(num_peers, generator=torch.Generator().manual_seed(seed))
    options = eq_1()
    losses = peer_losses(logits, targets, options)
    torch.testing.assert_close(peer_losses(logits[order], targets, options), losses[order], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        inner_loss(logits[order], targets, weights[order], options), inner_loss(logits, targets, weights, options)
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergences_from_others_equal_the_pairwise_twin(temperature):
    logits, _, _ = family()
    ours = divergences_from_others(logits, temperature)
    twin = reference.divergences_from_others(logits, temperature)
    torch.testing.assert_close(ours, torch.stack(twin), rtol=1e-11, atol=1e-13)
    for peer in range(len(logits)):  # each peer's own, so that a gradient into a teacher would be seen
        one = torch.autograd.grad(ours[peer], logits, retain_graph=True)[0]
        other = torch.autograd.grad(twin[peer], logits, retain_graph=True)[0]
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("option", "value"), [("alpha", 1.5), ("temperature", 0.0), ("kl_direction", "sideways")])
def test_an_option_out_of_range_is_named(option, value):
    with pytest.raises(ValueError, match=option):
        eq_1(**{option: value})


def test_targets_that_do_not_fit_are_named():
    logits, _, _ = family()
    with pytest.raises(ValueError, match="targets_B"):
        peer_losses(logits, torch.zeros(7, dtype=torch.long), eq_1())
