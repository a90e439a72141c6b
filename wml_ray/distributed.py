"""Collectives over the workers of one training: means, gathering in rank order, broadcast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of workers; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this worker, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_of_workers(value: Tensor) -> Tensor:
    """The sum of the workers' values; `value` is not changed."""
    if world_size() > 1:
        value = value.contiguous().clone()
        dist.all_reduce(value)
    return value


def mean_of_workers(value: Tensor) -> Tensor:
    """The mean of the workers' values, each with the same weight; `value` is not changed."""
    return sum_of_workers(value) / world_size() if world_size() > 1 else value


def gather_rows(row: Tensor) -> Tensor:
    """The workers' rows in rank order, (W, n) from (n,)."""
    rows = [torch.empty_like(row) for _ in range(world_size())]
    dist.all_gather(rows, row.contiguous())
    return torch.stack(rows)


def mean_over_workers(sums: Sequence[Tensor], targets: Tensor) -> list[Tensor]:
    """Means over all workers' images from each worker's sums over its own images, in one all-reduce."""
    if world_size() == 1:
        return [part / len(targets) for part in sums]
    count = sums[0].new_tensor([len(targets)])
    flat = torch.cat([count, *(part.reshape(-1) for part in sums)])
    dist.all_reduce(flat)
    means = (flat[1:] / flat[0]).split([part.numel() for part in sums])
    return [mean.view(part.shape) for mean, part in zip(means, sums, strict=True)]


def means_in_rank_order(*sums_and_targets: tuple[Tensor, Tensor]) -> list[Tensor]:
    """As `mean_over_workers` for short vectors, added in rank order so that every worker gets the same bits."""
    own = torch.cat([torch.cat([sums, sums.new_tensor([len(targets)])]) for sums, targets in sums_and_targets])
    if world_size() > 1:
        own = gather_rows(own).sum(0)
    parts = own.split([len(sums) + 1 for sums, _ in sums_and_targets])
    return [part[:-1] / part[-1] for part in parts]


@dataclass(frozen=True)
class WorkerRank:
    """The number of this worker, and the number of workers."""

    rank: int = 0
    world_size: int = 1

    def share_of(self, values: Tensor) -> Tensor:
        """This worker's share of a global batch; shares differ by at most one image."""
        return values.tensor_split(self.world_size)[self.rank]


T = TypeVar("T")


def broadcast_from_rank_0(decide: Callable[[], T]) -> T:
    """The value of `decide()` on rank 0, returned on every worker. `decide` runs on rank 0 only."""
    if world_size() == 1:
        return decide()
    decided: list[Any] = [decide() if rank() == 0 else None]
    dist.broadcast_object_list(decided, src=0)
    return decided[0]  # type: ignore[no-any-return]
