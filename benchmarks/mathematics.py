"""The weight gradient and the KL term: against backward passes, and over the number of peers."""

from __future__ import annotations

import torch
from timing import interleaved_medians_s
from torch import Tensor

from wml_ray.methods.base import StepContext
from wml_ray.methods.hypergradient import weight_gradient
from wml_ray.methods.losses import ensemble_loss, inner_loss, peer_losses
from wml_ray.methods.settings import WmlConfig
from wml_ray.networks.backbones import build_stages
from wml_ray.networks.peer_tree import PeerTree, functional_forward
from wml_ray.networks.spec import ImageSpec
from wml_ray.training.threads import torch_threads

SPEC = ImageSpec(3, 32, 10)
BATCH = 64
SAME_POINT, EXACT, GAMMA = WmlConfig(unroll="same_point"), WmlConfig(unroll="exact"), 0.1
STEP = StepContext(step=0, epoch=0, total_epochs=1, learning_rate=GAMMA)
BFLOAT16 = STEP._replace(precision="bfloat16")


def weight_gradient_against_backward_passes(peers: tuple[int, ...] = (2, 4, 8, 16)) -> dict[str, dict[str, float]]:
    """Seconds of Eq. 5 by one tangent pass, by M + 1 backward passes, and of one training step, on a ResNet-20 tree.

    The outer batch has the default share of the images, and all of them in `same_point, whole`. One thread, as a run of
    this size takes.
    """
    with torch_threads(1):
        return {str(num_peers): _weight_gradient_times_s(num_peers) for num_peers in peers}


def _weight_gradient_times_s(num_peers: int) -> dict[str, float]:
    torch.manual_seed(0)
    tree = PeerTree(lambda: build_stages("resnet20", SPEC), [1, 1, num_peers // 2, num_peers, num_peers])
    tree = tree.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(tree.parameters(), 1e-6, momentum=0.9, nesterov=True)
    weights_M = torch.full((num_peers,), 1 / num_peers, dtype=torch.float64)
    inner, whole = _batch(1), _batch(2)
    images = SAME_POINT.outer_images(BATCH)
    outer = whole[0][:images], whole[1][:images]

    def training_step(bfloat16: bool = False) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits_MBK = tree(inner[0])
        inner_loss(logits_MBK, inner[1], weights_M, SAME_POINT).backward()
        optimizer.step()

    return interleaved_medians_s(
        {
            "same_point": lambda: weight_gradient(tree, inner, outer, weights_M, SAME_POINT, STEP),
            "same_point, whole": lambda: weight_gradient(tree, inner, whole, weights_M, SAME_POINT, STEP),
            "exact": lambda: weight_gradient(tree, inner, outer, weights_M, EXACT, STEP),
            "backward_passes": lambda: by_backward_passes(tree, inner, outer, weights_M),
            "training_step": training_step,
            "same_point, bfloat16": lambda: weight_gradient(tree, inner, outer, weights_M, SAME_POINT, BFLOAT16),
            "training_step, bfloat16": lambda: training_step(bfloat16=True),
        },
        rounds=5,
    )


def by_backward_passes(
    tree: PeerTree, inner: tuple[Tensor, Tensor], outer: tuple[Tensor, Tensor], weights_M: Tensor
) -> Tensor:
    """Eq. 5 at the same point by a backward pass for L2 and one for each peer's L_a."""
    parameters = dict(tree.named_parameters())
    omega_M = weights_M.clone().requires_grad_()
    loss = ensemble_loss(functional_forward(tree, parameters, outer[0]), outer[1], omega_M)
    direct_M, *v = torch.autograd.grad(loss, [omega_M, *parameters.values()])
    losses_M = peer_losses(functional_forward(tree, parameters, inner[0]), inner[1], SAME_POINT)
    products = []
    for loss in losses_M:
        slopes = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, materialize_grads=True)
        products.append(sum((a * b).sum() for a, b in zip(v, slopes, strict=True)))
    return direct_M - GAMMA * torch.stack(products)


def kl_term(peers: tuple[int, ...] = (2, 4, 8, 16, 32)) -> dict[str, float]:
    """Seconds of L1 with the KL term and its backward pass, batch 256, 100 classes."""

    def call(num_peers: int) -> None:
        logits = logits_of[num_peers].requires_grad_()
        inner_loss(logits, targets, torch.full((num_peers,), 1 / num_peers), SAME_POINT).backward()

    targets = torch.randint(100, (256,))
    logits_of = {num_peers: torch.randn(num_peers, 256, 100) for num_peers in peers}
    repeats = 20
    times_s = interleaved_medians_s(
        {str(m): lambda m=m: [call(m) for _ in range(repeats)] for m in peers},  # type: ignore[misc]
        rounds=15,
    )
    return {name: value / repeats for name, value in times_s.items()}


def _batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(BATCH, *SPEC.shape, generator=generator).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(SPEC.num_classes, (BATCH,), generator=generator)
