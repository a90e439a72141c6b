"""Gloo workers in processes of their own, for properties of data parallelism."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(function: Callable[..., Any], folder: Path, *arguments: Any, world_size: int = 2) -> list[Any]:
    """Run `function(rank, *arguments)` on each worker; returns their results: tensors and plain containers only."""
    mp.spawn(_enter, (world_size, function, folder, arguments), nprocs=world_size)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


def _enter(rank: int, world_size: int, function: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    torch.save(function(rank, *arguments), folder / f"rank{rank}.pt")
    dist.destroy_process_group()
