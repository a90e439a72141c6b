"""Detection of losses that grow, and of losses and parameters that are not finite."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from wml_ray.errors import Diverged
from wml_ray.methods.base import Method, StepContext
from wml_ray.networks.peer_tree import describe_peers

REMEDY = "lower optim.learning_rate, lengthen optim.warmup_epochs, or set optim.gradient_clip=1"
GROWTH = 1000.0  # of a peer's loss, over its first one, that is warned of


class DivergenceMonitor:
    """Raises `Diverged`, naming peers, epoch, step and learning rate, once a loss or a parameter is not finite.

    Before, a warning is shown once when a peer's loss has grown a thousandfold.
    """

    def __init__(self, method: Method, interval: int) -> None:
        """Losses are checked every `interval` steps: on a GPU, reading a loss waits for the queued kernels."""
        self.method, self.interval = method, interval
        self._unchecked: list[tuple[StepContext, Tensor]] = []
        self._first: list[float] = []  # losses of the peers, at least 1: a resumed training may start near 0
        self._warned = False

    def record(self, context: StepContext, losses_M: Tensor) -> None:
        """Note the cross-entropies of a step, and check all that were noted if the interval is over."""
        self._unchecked.append((context, losses_M))
        if len(self._unchecked) >= self.interval:
            self.check_losses()

    def check_losses(self) -> None:
        """Check the losses noted so far.

        Raises:
            Diverged: one of them is not finite.
        """
        for context, losses_M in self._unchecked:
            losses = losses_M.tolist()
            bad = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
            if bad:
                raise diverged(f"the loss of {describe_peers(bad)}", context)
            self._warn_of_growth(context, losses)
        self._unchecked.clear()

    def _warn_of_growth(self, context: StepContext, losses: list[float]) -> None:
        self._first = self._first or [max(loss, 1.0) for loss in losses]
        grown = [index for index, loss in enumerate(losses) if loss > GROWTH * self._first[index]]
        if grown and not self._warned:
            self._warned = True
            before, now = self._first[grown[0]], losses[grown[0]]
            warnings.warn(
                f"the loss of {describe_peers(grown)} has grown more than a thousandfold, from {before:.3g} to "
                f"{now:.3g} at {_place(context)}; training continues; {REMEDY} if this was not intended",
                stacklevel=2,
            )

    def check_parameters(self, last_step: StepContext) -> None:
        """Check the parameters of the tree and of the method after the step `last_step`.

        Raises:
            Diverged: one of them is not finite.
        """
        named = list(self.method.named_parameters())
        norms = torch.stack(torch._foreach_norm([p.detach() for _, p in named])).tolist()
        bad = [name for (name, _), norm in zip(named, norms, strict=True) if not math.isfinite(norm)]
        if bad:
            in_tree = [name.removeprefix("tree.") for name in bad if name.startswith("tree.")]
            peers = sorted(frozenset[int]().union(*map(self.method.tree.peers_through, in_tree)))
            owner = describe_peers(peers) if peers else "the method"
            raise diverged(f"a parameter of {owner} ({(in_tree or bad)[0]})", last_step)


def diverged(quantity: str, context: StepContext) -> Diverged:
    """The error for a quantity that was not finite at a step."""
    return Diverged(f"training diverged: {quantity} is not finite at {_place(context)}; {REMEDY}")


def _place(context: StepContext) -> str:
    rate = f"{context.learning_rate:.4g}"
    return f"epoch {context.epoch + 1}, step {context.step + 1}, learning rate {rate}"
