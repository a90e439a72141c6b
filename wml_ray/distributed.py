"""Collectives over the workers of one training: rank, means, gathering in rank order, broadcast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_workers(sums: Sequence[Tensor], targets: Tensor) -> list[Tensor]:
    """Sums over each worker's images to means over all workers' images, in one all-reduce."""
    if world_size() == 1:
        return [part / len(targets) for part in sums]
    count = sums[0].new_tensor([len(targets)])
    flat = torch.cat([count, *(part.reshape(-1) for part in sums)])
    dist.all_reduce(flat)
    means = (flat[1:] / flat[0]).split([part.numel() for part in sums])
    return [mean.view(part.shape) for mean, part in zip(means, sums, strict=True)]


def means_in_rank_order(*sums_and_targets: tuple[Tensor, Tensor]) -> list[Tensor]:
    """As `_mean_over_workers` for short vectors, added in rank order so that every worker gets the same bits."""
    own = torch.cat([torch.cat([sums, sums.new_tensor([len(targets)])]) for sums, targets in sums_and_targets])
    if world_size() > 1:
        gathered = [torch.empty_like(own) for _ in range(world_size())]
        dist.all_gather(gathered, own)
        own = torch.stack(gathered).sum(0)
    parts = own.split([len(sums) + 1 for sums, _ in sums_and_targets])
    return [part[:-1] / part[-1] for part in parts]


@dataclass(frozen=True)
class WorkerRank:
    """Which worker this is among how many."""

    rank: int = 0
    world_size: int = 1

    def share_of(self, values: Tensor) -> Tensor:
        """This worker's share of a global batch; shares differ by at most one image."""
        return values.tensor_split(self.world_size)[self.rank]


T = TypeVar("T")


def broadcast_from_rank_0(worker: WorkerRank, decide: Callable[[], T]) -> T:
    """What rank 0 decides, on every worker."""
    if worker.world_size == 1:
        return decide()
    decided: list[Any] = [decide() if worker.rank == 0 else None]
    dist.broadcast_object_list(decided, src=0)
    return decided[0]  # type: ignore[no-any-return]
