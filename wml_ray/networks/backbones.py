"""Backbone name -> stages: the table of built-in backbones, and a user's own function."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from wml_ray.errors import UserError, one_line
from wml_ray.networks.cnn import cifar_resnet, densenet_bc, mobilenet_v2, resnet, vgg16_bn, wide_resnet
from wml_ray.networks.libraries import library_stages
from wml_ray.networks.spec import ImageSpec, Stages
from wml_ray.settings import LIBRARIES


def build_stages(name: str, spec: ImageSpec, patch_size: int | None = None) -> Stages:
    """Freshly initialised stages of a backbone.

    `name` is one of `BACKBONES`, a network of a library such as `timm:efficientnet_b0`, or a user's
    `package.module:function`, which is called as `function(spec)` and returns a list or a dict of modules.
    `patch_size`, in pixels, is that of a vision transformer; None is the network's own.

    Raises:
        UserError: the name is unknown, the network cannot be cut into stages or has no such patches, or the user's
            function cannot be imported or returns something else.
    """
    if name.partition(":")[0] in LIBRARIES and ":" in name:
        return library_stages(name, spec, patch_size)
    if patch_size is not None:
        raise UserError(f"model.patch_size = {patch_size}: model.backbone = '{name}' has no patches; set it to null")
    if ":" in name:
        return _user_stages(name, spec)
    if name not in BACKBONES:
        raise UserError(
            f"model.backbone = '{name}' is unknown; allowed: {', '.join(BACKBONES)}, "
            "timm:NAME, torchvision:NAME, or your own as package.module:function"
        )
    return BACKBONES[name](spec)


def import_function(name: str, key: str) -> Callable[[ImageSpec], Any]:
    """The function of a user's `package.module:function`, from the import path.

    `key` is the config key that names it.

    Raises:
        UserError: it cannot be imported.
    """
    module_name, _, function_name = name.partition(":")
    try:
        return cast("Callable[[ImageSpec], Any]", getattr(importlib.import_module(module_name), function_name))
    except (Exception, SystemExit) as error:  # the user's own code
        raise UserError(
            f"{key} = '{name}' cannot be imported: {_described(error)}; its module must be beside the config file, in "
            "the current directory or on PYTHONPATH"
        ) from error


def call_function(name: str, key: str, spec: ImageSpec) -> Any:
    """The value of a user's `package.module:function(spec)`; `key` is the config key that names it.

    Raises:
        UserError: it cannot be imported, or raises an error.
    """
    function = import_function(name, key)
    try:
        return function(spec)
    except (Exception, SystemExit) as error:  # the user's own code
        raise UserError(f"{key} = '{name}' failed: {_described(error)}") from error


def named_stages(stages: Any) -> Stages | None:
    """A list or dict of modules as a dict; None for anything else."""
    if isinstance(stages, (list, tuple)):
        stages = {f"stage{index}": stage for index, stage in enumerate(stages)}
    if not isinstance(stages, Mapping) or not all(isinstance(stage, nn.Module) for stage in stages.values()):
        return None
    return dict(stages)


def _user_stages(name: str, spec: ImageSpec) -> Stages:
    stages = named_stages(call_function(name, "model.backbone", spec))
    if stages is None:
        raise UserError(f"model.backbone = '{name}' must return a list or dict of torch.nn.Module, one a stage")
    return stages


def _described(error: BaseException) -> str:
    """The type and text of an error of the user's code, and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename != __file__ and not frame.filename.startswith("<")]
    place = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
    return f"{type(error).__name__}: {one_line(error)}{place}"


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
