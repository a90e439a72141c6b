"""Backbone name -> stages: the table of built-in backbones, and a user's own function."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from wml_ray.errors import UserError
from wml_ray.networks.cnn import cifar_resnet, densenet_bc, mobilenet_v2, resnet, vgg16_bn, wide_resnet
from wml_ray.networks.spec import ImageSpec, Stages


def build_stages(name: str, spec: ImageSpec) -> Stages:
    """Freshly initialised stages of the backbone `name` (or of a user's `package.module:function`).

    A user's function is called as `function(spec)` and returns a list or a dict of modules.

    Raises:
        UserError: the name is unknown, or the user's function cannot be imported or returns something else.
    """
    if ":" in name:
        return _user_stages(name, spec)
    if name not in BACKBONES:
        raise UserError(
            f"model.backbone = '{name}' is unknown; allowed: {', '.join(BACKBONES)}, "
            "or your own as package.module:function"
        )
    return BACKBONES[name](spec)


def import_function(name: str, key: str) -> Callable[[ImageSpec], Any]:
    """The function of a user's `package.module:function`, also found in the current directory.

    `key` is the config key that names it.

    Raises:
        UserError: it cannot be imported.
    """
    module_name, _, function_name = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return cast("Callable[[ImageSpec], Any]", getattr(importlib.import_module(module_name), function_name))
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{key} = '{name}' cannot be imported: {error}; its module must be beside the config file, in the "
            "current directory or on PYTHONPATH"
        ) from error


def named_stages(stages: Any) -> Stages | None:
    """A list or dict of modules as a dict; None for anything else."""
    if isinstance(stages, (list, tuple)):
        stages = {f"stage{index}": stage for index, stage in enumerate(stages)}
    if not isinstance(stages, Mapping) or not all(isinstance(stage, nn.Module) for stage in stages.values()):
        return None
    return dict(stages)


def _user_stages(name: str, spec: ImageSpec) -> Stages:
    stages = named_stages(import_function(name, "model.backbone")(spec))
    if stages is None:
        raise UserError(f"model.backbone = '{name}' must return a list or dict of torch.nn.Module, one a stage")
    return stages


BACKBONES: dict[str, Callable[[ImageSpec], Stages]] = {
    **{f"resnet{depth}": partial(cifar_resnet, depth=depth) for depth in (20, 32, 56, 110)},
    **{
        f"resnet{depth}{suffix}": partial(resnet, name=f"resnet{depth}", cifar_stem=bool(suffix))
        for depth in (18, 50, 101)
        for suffix in ("", "_cifar")
    },
    "mobilenet_v2": mobilenet_v2,
    "vgg16_bn": vgg16_bn,
    **{f"densenet_bc{depth}": partial(densenet_bc, depth=depth) for depth in (40, 100)},
    **{
        f"wrn_{depth}_{widen}": partial(wide_resnet, depth=depth, widen=widen)
        for depth, widen in ((16, 4), (28, 10), (40, 2))
    },
}
