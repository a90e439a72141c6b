"""One training step of a pruned tree against four separate unpruned networks trained together: time and peak memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import interleaved_medians_s

from wml_ray.config.schema import PruningConfig
from wml_ray.methods.losses import inner_loss
from wml_ray.methods.settings import WmlConfig
from wml_ray.networks.backbones import build_stages
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec
from wml_ray.pruning.prune import prune

SPEC = ImageSpec(3, 32, 100)
BATCH = 128
SHARING, RATIOS = [1, 1, 2, 4, 4], [0.0, 0.2, 0.4, 0.6]


def tree_against_separate_networks() -> dict[str, Any]:
    steps = {kind: _step(kind) for kind in ("tree", "separate")}
    times_s = interleaved_medians_s(steps, rounds=7)
    del steps
    memory_bytes = {kind: _peak_bytes(kind) for kind in ("tree", "separate")}
    return {"seconds": times_s, "peak_bytes": memory_bytes}


def _step(kind: str) -> Callable[[], None]:
    """Forward, Eq. 1, backward and SGD; the separate networks are four peers that share nothing and are not pruned."""
    torch.manual_seed(0)
    images = torch.randn(BATCH, *SPEC.shape).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(SPEC.num_classes, (BATCH,))
    weights_M = torch.full((4,), 0.25)
    if kind == "tree":
        model = PeerTree(lambda: build_stages("resnet32", SPEC), SHARING)
        prune(model, PruningConfig(ratios=RATIOS), SPEC, [(images[:64], targets[:64])])
        alpha = 0.5
    else:
        model = PeerTree(lambda: build_stages("resnet32", SPEC), [4] * 5)
        alpha = 0.0
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9, nesterov=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        inner_loss(model(images), targets, weights_M, WmlConfig(alpha=alpha)).backward()
        optimizer.step()

    return step


def _peak_bytes(kind: str) -> int:
    """Bytes that building the model and three steps add to the peak memory of a new process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(kind, sender))
    process.start()
    grown = int(receiver.recv())
    process.join()
    return grown


def _measure(kind: str, sender: Any) -> None:
    before = peak_resident_bytes()
    step = _step(kind)
    for _ in range(3):
        step()
    sender.send(peak_resident_bytes() - before)


def peak_resident_bytes() -> int:
    """VmHWM of Linux, since the start of this process; `ru_maxrss` would include the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
