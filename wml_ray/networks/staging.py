"""Stages of a network that is a chain of modules, found by running it once.

Each stage is nested `nn.Sequential`s, in which tensors have the names that they have in the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wml_ray.errors import one_line
from wml_ray.networks.peer_tree import in_mode
from wml_ray.networks.spec import Stages

TRACED_SIDE = 64  # pixels; enough for five halvings, so that stages do not depend on the data
FLATTEN, POOL = "+flatten", "+pool"  # what a network does itself between two modules

StagePaths = dict[str, tuple[str, ...]]
"""Stage name -> paths of the modules that run in it one after another, with `FLATTEN` and `POOL` between them."""


class NotAChain(Exception):
    """The network cannot be cut into stages; the message names the layer that stands in the way."""


class _Call(NamedTuple):
    given: Tensor
    output: Tensor


_Calls = dict[str, _Call | None]
"""Path of each module that ran, in the order of their starts; None where not one tensor went in and one came out."""


def find_stages(network: nn.Module, channels: int) -> StagePaths:
    """Stages `stem`, `layer1`, `layer2` and so on, each beginning where the maps get smaller, and the pooling `head`.

    Raises:
        NotAChain: the modules of `network` do not each take the output of the one before.
    """
    image = torch.randn(2, channels, TRACED_SIDE, TRACED_SIDE)
    calls, output = _run(network, image)
    stages: StagePaths = {}
    name, side, smaller = "stem", 0, 0
    for path in _chain(network, "", calls, image, output):
        call = calls.get(path)
        shape: Sequence[int] = call.output.shape if call else ()
        if len(shape) < 4 or max(shape[2:]) == 1:
            name = "head"
        elif name != "head":
            if shape[-1] < side:
                smaller += 1
                name = f"layer{smaller}"
            side = shape[-1]
        stages[name] = (*stages.get(name, ()), path)
    if "head" not in stages or len(stages) < 2:
        raise NotAChain("its last module gives maps, or its first one logits")
    return stages


def cut_stages(network: nn.Module, paths: StagePaths) -> Stages:
    """The stages of `network`, made of its own modules."""
    return {name: _nested(network, steps) for name, steps in paths.items()}


def check_stages(stages: Stages, image: Tensor, expected: Tensor) -> None:
    """Check that the stages one after another give the network's output, and that none writes over its input.

    Raises:
        NotAChain: they do not, or one does.
    """
    outputs = image
    with torch.no_grad():
        for name, stage in stages.items():
            given, before = outputs, outputs.clone()
            with in_mode(stage, training=False):
                outputs = stage(given)
            if not given.equal(before):
                raise NotAChain(f"{name} writes over its input, which copies of a stage share")
    if outputs.shape != expected.shape or not torch.allclose(outputs, expected, rtol=1e-4, atol=1e-5):
        raise NotAChain(f"{', '.join(stages)} one after another do not give its output")


def _run(network: nn.Module, image: Tensor) -> tuple[_Calls, Tensor]:
    """The calls of all modules, and the output of the network."""
    calls: _Calls = {}
    repeated: set[str] = set()
    names = {module: path for path, module in network.named_modules() if path}

    def start(module: nn.Module, _: object) -> None:
        path = names[module]
        repeated.update({path} & calls.keys())
        calls[path] = None

    def end(module: nn.Module, given: tuple[object, ...], output: object) -> None:
        path = names[module]
        if len(given) == 1 and isinstance(given[0], Tensor) and isinstance(output, Tensor) and path not in repeated:
            calls[path] = _Call(given[0], output)

    hooks = [module.register_forward_pre_hook(start) for module in names]
    hooks += [module.register_forward_hook(end) for module in names]
    try:
        with torch.no_grad(), in_mode(network, training=False):
            output = network(image)
    except Exception as error:  # of any library's network
        last = next(reversed(calls), "it")
        raise NotAChain(f"{last} fails on images of {TRACED_SIDE} pixels ({one_line(error)})") from None
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(output, Tensor):
        raise NotAChain(f"its output is no tensor of logits but a {type(output).__name__}")
    return calls, output


def _chain(module: nn.Module, prefix: str, calls: _Calls, given: Tensor, output: Tensor) -> list[str]:
    """The steps from `given` to `output` through the children of `module`.

    The children of the network are replaced by their own where they are plain sequences, and the last one where its
    children are a chain.

    Raises:
        NotAChain: the children are no chain.
    """
    children = {f"{prefix}{name}": child for name, child in module.named_children()}
    for path, child in children.items():
        if path not in calls and any(True for _ in child.parameters()):
            raise NotAChain(f"{path} has parameters and does not run as a module")
    steps: list[str] = []
    order = [path for path in calls if path in children]
    for path in order:
        call, child = calls[path], children[path]
        if call is None:
            raise NotAChain(f"{path} runs twice, or not from one tensor to one tensor")
        steps += _between(given, call.given, path)
        plain = type(child).forward is nn.Sequential.forward and type(child) is nn.Sequential
        steps += _opened(child, path, calls, plain) if not prefix and (plain or path == order[-1]) else [path]
        given = call.output
    return [*steps, *_between(given, output, "the output")]


def _opened(child: nn.Module, path: str, calls: _Calls, plain: bool) -> list[str]:
    call = calls[path]
    assert call is not None
    try:
        return _chain(child, f"{path}.", calls, *call) if len(list(child.children())) else [path]
    except NotAChain:
        if plain:
            raise
        return [path]


def _between(before: Tensor, after: Tensor, path: str) -> list[str]:
    """What the network does itself between the output of a module and the input of the one at `path`."""
    if after is before:
        return []
    if before.dim() > 2 and after.equal(before.flatten(1)):
        return [FLATTEN]
    if before.dim() == 4 and after.dim() == 2 and after.equal(nn.functional.adaptive_avg_pool2d(before, 1).flatten(1)):
        return [POOL, FLATTEN]
    raise NotAChain(f"{path} is not the output of the module before it")


def _nested(network: nn.Module, steps: Sequence[str]) -> nn.Sequential:
    """Modules one after another, each under its path in nested sequences."""
    stage = nn.Sequential()
    for index, path in enumerate(steps):
        if path in (FLATTEN, POOL):
            stage.add_module(f"step{index}", nn.Flatten() if path == FLATTEN else nn.AdaptiveAvgPool2d(1))
            continue
        *parents, last = path.split(".")
        holder: nn.Module = stage
        for parent in parents:
            if parent not in dict(holder.named_children()):
                holder.add_module(parent, nn.Sequential())
            holder = holder.get_submodule(parent)
        holder.add_module(last, network.get_submodule(path))
    return stage
