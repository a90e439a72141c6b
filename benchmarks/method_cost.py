"""The cost of training each method, relative to `independent`: CPU time of a step, and peak memory.

python benchmarks/method_cost.py [METHOD ...]

A ResNet-20 tree with sharing [1, 1, 2, 4, 4] and ratios 0, 0.2, 0.4, 0.6, one thread. Time: 20 steps on 64 images of
1 x 8 x 8 with all that a method does after a step (WML's update of omega is one of them), medians of interleaved turns.
Memory: what building the method and three steps on 128 images of 3 x 32 x 32 add to the peak of a new process.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import torch
from timing import interleaved_medians_s
from training_step import peak_resident_bytes

from wml_ray.checkpoints.load import build_tree
from wml_ray.config.load import parse_config
from wml_ray.config.schema import Config
from wml_ray.methods.base import StepContext
from wml_ray.methods.registry import METHODS, build
from wml_ray.methods.settings import TEACHER_METHODS
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec
from wml_ray.pruning.prune import prune
from wml_ray.training.teacher import FrozenTeacher

BASELINE = "independent"
SMALL, LARGE = ImageSpec(1, 8, 10), ImageSpec(3, 32, 100)
STEPS = 20  # between two updates of omega, by default


def steps_of(name: str, spec: ImageSpec, images: int) -> Callable[[int], None]:
    """A function that trains so many steps of a method."""
    torch.manual_seed(0)
    config = _config(name)
    model = build(name, _tree(config, spec), config.method_settings, spec, seed=0, teacher=_teacher(config, spec))
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9, nesterov=True)
    inputs = torch.randn(images * model.num_views, *spec.shape).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(spec.num_classes, (images,))
    fewer = config.wml.outer_images(images)
    outer = inputs[:fewer], targets[:fewer]

    def run(steps: int) -> None:
        for step in range(steps):
            context = StepContext(step, epoch=0, total_epochs=1, learning_rate=1e-6)
            optimizer.zero_grad(set_to_none=True)
            reduce(add, model.losses(model(inputs), targets, context).values()).backward()
            optimizer.step()
            interval = model.outer_batch_interval
            model.after_step(context, (inputs, targets), outer if interval and (step + 1) % interval == 0 else None)

    return run


def _config(name: str) -> Config:
    raw: dict[str, Any] = {"method": {"name": name}}
    if name in TEACHER_METHODS:
        raw["teacher"] = {"run": "unused", "peer": None if name == "ctsl_mkt" else 0}
    if name == "self_distillation":
        raw |= {"model": {"sharing": [1, 1, 1, 1, 4], "exits": [1, 2, 3, 4]}, "pruning": {"ratios": [0.0] * 4}}
    return parse_config(raw)


def _tree(config: Config, spec: ImageSpec) -> PeerTree:
    tree = build_tree(config, spec)
    prune(tree, config.pruning, spec, [(torch.randn(64, *spec.shape), torch.randint(spec.num_classes, (64,)))])
    return tree


def _teacher(config: Config, spec: ImageSpec) -> FrozenTeacher | None:
    if config.method.name not in TEACHER_METHODS:
        return None
    tree = _tree(config, spec)
    if config.teacher.peer is not None:
        stages = dict(zip(tree.stages, tree.peer(config.teacher.peer), strict=True))
        tree = PeerTree(lambda: stages, [1] * len(stages))
    tree.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return FrozenTeacher(tree, {})


def peak_bytes(name: str) -> int:
    """Bytes that building the method and three steps add to the peak memory of a new process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(name, sender))
    process.start()
    grown = int(receiver.recv())
    process.join()
    return grown


def _measure(name: str, sender: Any) -> None:
    torch.set_num_threads(1)
    before = peak_resident_bytes()
    steps_of(name, LARGE, images=128)(3)
    sender.send(peak_resident_bytes() - before)


def main() -> None:
    torch.set_num_threads(1)
    names = list(dict.fromkeys([BASELINE, *(sys.argv[1:] or METHODS)]))
    trained = {name: steps_of(name, SMALL, images=64) for name in names}
    times_s = interleaved_medians_s({name: lambda run=run: run(STEPS) for name, run in trained.items()}, rounds=7)
    memory = {name: peak_bytes(name) for name in names}
    print("| method | time of a step | peak memory |\n| --- | ---: | ---: |")
    for name in names:
        print(f"| `{name}` | {times_s[name] / times_s[BASELINE]:.2f} | {memory[name] / memory[BASELINE]:.2f} |")


if __name__ == "__main__":
    main()
