"""Losses on logits: Eqs. 1 and 3 of WML, and divergences between peers. Pure functions; no pair of peers is formed.

Shape letters: M peers, B images, K classes. B may stand for several dimensions, as in the (B, tokens) of a language
model. KL_T(s <- t) is T^2 KL(softmax(t / T) || softmax(s / T)), summed over classes and averaged over B.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wml_ray.methods.settings import WmlConfig


def peer_losses(logits_MBK: Tensor, targets_B: Tensor, settings: WmlConfig, kl_share: float = 1.0) -> Tensor:
    """L_a of Eq. 5, shape (M,), in nats a sample: dL1/domega_i = lambda CE(z_i, y) + alpha r sum_j KL(z_j, z_i).

    Peer i is the teacher of every peer j. KL is summed over classes, averaged over B, taken of outputs softened by
    the temperature and multiplied by its square. lambda is `label_weight`, or 0 if omega does not weigh the labels; r
    is `kl_share`.

    Raises:
        ValueError: shapes do not fit.
    """
    _check_shapes(logits_MBK, targets_B)
    logits_MBK = at_least_float32(logits_MBK)
    losses_M = logits_MBK.new_zeros(len(logits_MBK))
    if settings.alpha < 1.0 and settings.weigh_labels:
        losses_M = label_weight(settings, len(logits_MBK)) * cross_entropies(logits_MBK, targets_B)
    if settings.alpha > 0.0 and kl_share > 0.0:
        losses_M = losses_M + kl_share * settings.alpha * _teaching_losses(logits_MBK, settings)
    return losses_M


def inner_loss(
    logits_MBK: Tensor, targets_B: Tensor, weights_M: Tensor, settings: WmlConfig, kl_share: float = 1.0
) -> Tensor:
    """L1, shape (), in nats a sample: lambda sum_i omega_i CE(z_i, y) + alpha r sum_ij omega_j KL(z_i, z_j).

    With `balance = paper` and r = `kl_share` = 1 this is Eq. 1, lambda = 1 - alpha. `balance = peer` takes lambda =
    M (1 - alpha): it is Eq. 1 at alpha / c, times c = M (1 - alpha) + alpha. Without `weigh_labels` each label term
    counts 1 / M instead of omega_i. L1 is affine in omega, with slope L_a. The KL term costs O(M B K).

    Raises:
        ValueError: shapes do not fit.
    """
    losses_M = peer_losses(logits_MBK, targets_B, settings, kl_share)
    loss = torch.dot(_weights_like(weights_M, losses_M), losses_M)
    if settings.alpha < 1.0 and not settings.weigh_labels:
        labels_M = cross_entropies(at_least_float32(logits_MBK), targets_B)
        loss = loss + label_weight(settings, len(logits_MBK)) * labels_M.mean()
    return loss


def label_weight(settings: WmlConfig, num_peers: int) -> float:
    """lambda, the weight of the label terms: 1 - alpha as in Eq. 1, or M times that with `balance = peer`."""
    return (1.0 - settings.alpha) * (num_peers if settings.balance == "peer" else 1)


def ensemble_loss(logits_MBK: Tensor, targets_B: Tensor, weights_M: Tensor) -> Tensor:
    """L2 of Eq. 3, shape (), in nats a sample: CE(sum_i omega_i z_i, y).

    Raises:
        ValueError: shapes do not fit.
    """
    _check_shapes(logits_MBK, targets_B)
    logits_MBK = at_least_float32(logits_MBK)
    ensemble_BK = weighted_ensemble(logits_MBK, _weights_like(weights_M, logits_MBK))
    return F.cross_entropy(ensemble_BK.flatten(0, -2), targets_B.flatten())


def weighted_ensemble(logits_MBK: Tensor, weights_M: Tensor) -> Tensor:
    """sum_i omega_i z_i, shape (B, K)."""
    ensemble_BK: Tensor = torch.tensordot(weights_M.to(logits_MBK.dtype), logits_MBK, dims=1)
    return ensemble_BK


def average_ensemble(logits_MBK: Tensor) -> Tensor:
    """Mean of the peers' logits, shape (B, K)."""
    return logits_MBK.mean(0)


def cross_entropies(logits_MBK: Tensor, targets_B: Tensor) -> Tensor:
    """CE(z_i, y) of each peer, shape (M,), in nats a sample."""
    num_peers, num_classes = logits_MBK.shape[0], logits_MBK.shape[-1]
    targets_MB = targets_B.flatten().expand(num_peers, -1)
    losses_MB = F.cross_entropy(logits_MBK.reshape(-1, num_classes), targets_MB.flatten(), reduction="none")
    return losses_MB.view(num_peers, -1).mean(1)


def divergences(logits_MBK: Tensor, teachers: Tensor, temperature: float) -> Tensor:
    """KL_T(z_i <- t_i) of each student i, shape (M,), in nats a sample.

    `teachers` is logits (B, K) of one teacher of all students, or (M, B, K). Gradient flows into them: a caller that
    does not want it detaches them.
    """
    log_q_MBK = torch.log_softmax(logits_MBK / temperature, dim=-1)
    log_p = torch.log_softmax(teachers / temperature, dim=-1)
    divergence_MBK = log_p.exp() * (log_p - log_q_MBK)
    losses_M: Tensor = temperature**2 * divergence_MBK.sum(-1).flatten(1).mean(1)
    return losses_M


def divergences_from_others(logits_MBK: Tensor, temperature: float, teachers_MBK: Tensor | None = None) -> Tensor:
    """mean_{j != i} KL_T(z_i <- t_j) of each student i, shape (M,), in nats a sample; zero for a single peer.

    The teachers t_j are `teachers_MBK`, by default the students z_j. No gradient flows into them. With
    S = sum_{j != i} p_j log p_j and P = sum_{j != i} p_j, the sum over j is sum_k (S - P log q_i): one pass over the M
    peers, O(M B K).
    """
    log_q_MBK = torch.log_softmax(logits_MBK / temperature, dim=-1)
    log_p_MBK = (log_q_MBK if teachers_MBK is None else (teachers_MBK / temperature).log_softmax(-1)).detach()
    p_MBK = log_p_MBK.exp()
    negative_entropy_MBK = p_MBK * log_p_MBK
    others_entropy_MBK = negative_entropy_MBK.sum(0) - negative_entropy_MBK
    divergence_MBK = others_entropy_MBK - (p_MBK.sum(0) - p_MBK) * log_q_MBK
    num_others = max(len(logits_MBK) - 1, 1)
    losses_M: Tensor = temperature**2 / num_others * divergence_MBK.sum(-1).flatten(1).mean(1)
    return losses_M


def at_least_float32(logits: Tensor) -> Tensor:
    """`logits` converted from 16 bits to float32; other types are unchanged."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _teaching_losses(logits_MBK: Tensor, settings: WmlConfig) -> Tensor:
    """tau^2 sum_j KL(z_j, z_i) for each teacher i, shape (M,).

    With S = sum_j log p_j, sum_j KL(p_i || p_j) = sum_k p_i (M log p_i - S); with P = sum_j p_j,
    sum_j KL(p_j || p_i) = sum_k (sum_j p_j log p_j - P log p_i). Each is one pass over the M peers.
    """
    num_peers = logits_MBK.shape[0]
    log_p_MBK = torch.log_softmax(logits_MBK / settings.temperature, dim=-1)
    teacher_MBK = log_p_MBK.detach() if settings.stop_gradient_teacher else log_p_MBK
    if settings.kl_direction == "teacher_to_student":
        divergence_MBK = teacher_MBK.exp() * (num_peers * teacher_MBK - log_p_MBK.sum(0))
    else:
        p_MBK = log_p_MBK.exp()
        divergence_MBK = (p_MBK * log_p_MBK).sum(0) - p_MBK.sum(0) * teacher_MBK
    losses_M: Tensor = settings.temperature**2 * divergence_MBK.sum(-1).flatten(1).mean(1)
    return losses_M


def _weights_like(weights_M: Tensor, like: Tensor) -> Tensor:
    if weights_M.shape != like.shape[:1]:
        raise ValueError(f"weights_M has shape {tuple(weights_M.shape)}; it must be ({like.shape[0]},), one a peer")
    return weights_M.to(like)


def _check_shapes(logits_MBK: Tensor, targets_B: Tensor) -> None:
    if logits_MBK.dim() < 3 or logits_MBK.shape[1:-1] != targets_B.shape:
        raise ValueError(
            f"logits_MBK {tuple(logits_MBK.shape)} and targets_B {tuple(targets_B.shape)} do not fit: "
            "logits are (M, B, K) and targets (B,)"
        )
