"""The memory of a training: an estimate before it, and the peak that was measured."""

from __future__ import annotations

import gc
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from wml_ray.config.schema import OptimConfig
from wml_ray.methods.base import Method, TaughtMethod
from wml_ray.networks.costs import example
from wml_ray.networks.peer_tree import in_mode
from wml_ray.networks.spec import ImageSpec


def training_memory_bytes(method: Method, spec: ImageSpec, batch_size: int, optim: OptimConfig) -> int:
    """Parameters, gradients, optimiser state, copies and teacher of the method, and tensors autograd saves for a batch.

    Parameters that need no gradient, as a teacher's, are there once.

    The last are counted on 2 images and scaled to `batch_size`, a worker's share.
    """
    trained = _bytes_of(method, trained=True)
    copies = 2 + (2 if optim.name == "adamw" else int(optim.momentum > 0))
    copies += method.extra_copies
    kept_per_image = _saved_bytes(method, spec, images=2) / 2
    if optim.precision in ("bfloat16", "float16"):  # `auto` may be float32 where the run will be
        kept_per_image /= 2
    frozen = _bytes_of(method, trained=False)
    if isinstance(method, TaughtMethod):
        frozen += _bytes_of(method.teacher.tree, trained=False)
    return int(trained * copies + frozen + kept_per_image * batch_size)


def _bytes_of(network: nn.Module, trained: bool) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad is trained)


def _saved_bytes(network: Method, spec: ImageSpec, images: int) -> int:
    own = {p.untyped_storage().data_ptr() for p in [*network.parameters(), *network.buffers()]}
    storages: dict[int, int] = {}
    held = []  # so that no address is used twice while counting

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with in_mode(network, training=True), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        network(example(network, spec, images * network.num_views))
    network.load_state_dict(buffers, strict=False)
    return sum(storages.values())


class PeakMemory:
    """The peak memory of this process since this object was made: of tensors on a GPU, else all resident memory.

    Resident memory includes the libraries. On systems other than Linux it is the peak of the whole process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        gc.collect()  # an actor of a study still holds its last trial
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak becomes the present size

    def measure_bytes(self) -> int:
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with suppress(OSError):
            if peak := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
                return int(peak[1]) * 1024
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak_kib if sys.platform == "darwin" else peak_kib * 1024
