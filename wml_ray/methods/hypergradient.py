"""How WML learns omega: the gradient of Eq. 5 by one forward-mode pass, and mirror descent (Eq. 7)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wml_ray.distributed import mean_over_workers, means_in_rank_order
from wml_ray.methods.base import Batch, StepContext
from wml_ray.methods.losses import ensemble_loss, inner_loss, peer_losses
from wml_ray.methods.settings import WmlConfig
from wml_ray.networks.forward_mode import FusedBatchNormTangents
from wml_ray.networks.peer_tree import functional_forward
from wml_ray.networks.trunk_gradient import gradient_scales


def weight_gradient(
    model: nn.Module,
    inner_batch: Batch,
    outer_batch: Batch,
    weights_M: Tensor,
    settings: WmlConfig,
    context: StepContext,
) -> Tensor:
    """g of Eq. 5, shape (M,): g_i = dL2/domega_i - gamma <dL2/dtheta, dL_a,i/dtheta> over all parameters.

    `model` gives M logits, (M, B, K) or M times (B, K); the batches are (inputs, targets) pairs, on a worker its own
    share of them. If `settings.own_views`, inner inputs are (M * B, ...), as in training; outer inputs never are.
    gamma is `settings.unroll_learning_rate`, or the current learning rate where that is None; it is divided by the
    number of peers of a copy where gradients are (`trunk_gradient`). dL2/dtheta is taken at theta - gamma dL1/dtheta if
    `settings.unroll` is "exact": g is then the derivative of omega -> L2(omega, theta - gamma dL1/dtheta). "same_point"
    takes it at theta, which saves one forward and backward pass.
    All M inner products are the tangent of L_a along gamma v, v = dL2/dtheta, one forward-mode pass. Where
    `context.precision` is bfloat16 all passes are under autocast; a float16 run takes them in float32, as no loss is
    scaled here. When torch.distributed is initialised, v is averaged over the workers, weighted by their numbers of
    images; then 2M numbers are reduced, and every worker returns the same bits. The model keeps its parameters,
    gradients, mode and buffers.

    Raises:
        ValueError: shapes do not fit.
    """
    (inner_inputs, inner_targets), (outer_inputs, outer_targets) = inner_batch, outer_batch
    gamma = context.learning_rate if settings.unroll_learning_rate is None else settings.unroll_learning_rate
    kl_share = context.ramp(settings.ramp)
    theta = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    step_sizes = {name: gamma * scale for name, scale in gradient_scales(model, theta).items()}

    def logits_MBK(parameters: dict[str, Tensor], inputs: Tensor, own_views: bool = False) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=context.precision == "bfloat16"):
            return functional_forward(model, parameters, inputs, own_views)

    with torch.random.fork_rng([inner_inputs.device] if inner_inputs.is_cuda else []):
        outer_theta = theta
        if settings.unroll == "exact":
            leaves = _leaves(theta)
            logits = logits_MBK(leaves, inner_inputs, settings.own_views)
            loss = inner_loss(logits, inner_targets, weights_M, settings, kl_share)
            descent = mean_over_workers(_gradient_sum(loss, inner_targets, list(leaves.values())), inner_targets)
            outer_theta = {name: theta[name] - step_sizes[name] * g for name, g in zip(theta, descent, strict=True)}
        leaves = _leaves(outer_theta)
        omega_M = weights_M.detach().clone().requires_grad_()
        loss = ensemble_loss(logits_MBK(leaves, outer_inputs), outer_targets, omega_M)
        direct_sum_M, *v = _gradient_sum(loss, outer_targets, [omega_M, *leaves.values()])
        v = mean_over_workers(v, outer_targets)

    def losses_M(parameters: dict[str, Tensor]) -> Tensor:
        logits = logits_MBK(parameters, inner_inputs, settings.own_views)
        return peer_losses(logits, inner_targets, settings, kl_share)

    # Outside the fork the random state is that of the start of the inner pass: dropout draws the same masks again.
    tangent_M = _tangent(losses_M, theta, {name: step_sizes[name] * t for name, t in zip(theta, v, strict=True)})
    tangent_sum_M = tangent_M.to(direct_sum_M) * len(inner_targets)
    direct_M, tangent_M = means_in_rank_order((direct_sum_M, outer_targets), (tangent_sum_M, inner_targets))
    return direct_M - tangent_M


def log_mirror_descent(log_weights_M: Tensor, gradient_M: Tensor, step_size: float) -> Tensor:
    """Eq. 7 from log omega to log omega, shape (M,): omega_i exp(-eta g_i) / sum_k omega_k exp(-eta g_k).

    Computed on logarithms: no weight underflows, no gradient overflows, and a constant added to every g_i changes
    nothing.
    """
    centred_M = gradient_M - gradient_M.mean()
    return torch.log_softmax(log_weights_M - step_size * centred_M.to(log_weights_M), dim=0)


def _leaves(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().requires_grad_() for name, p in parameters.items()}


def _tangent(
    function: Callable[[dict[str, Tensor]], Tensor], parameters: dict[str, Tensor], direction: dict[str, Tensor]
) -> Tensor:
    """The derivative of `function` at `parameters` along `direction`, by one forward-mode pass."""
    # Attention's other kernels have no forward mode.
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), FusedBatchNormTangents():
        duals = {name: forward_ad.make_dual(p, direction[name]) for name, p in parameters.items()}
        values, tangent = forward_ad.unpack_dual(function(duals))
    return torch.zeros_like(values) if tangent is None else tangent  # None: no parameter reaches the values


def _gradient_sum(loss: Tensor, targets: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradient of the loss summed over this worker's images.

    Sums, because statistics over all workers carry gradient from one worker's loss to another's parameters, and a mean
    would weight them by the wrong number of images.
    """
    return list(torch.autograd.grad(loss * len(targets), leaves, allow_unused=True, materialize_grads=True))
