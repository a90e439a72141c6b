"""The stages of networks of timm and torchvision, randomly initialised: `timm:NAME` and `torchvision:NAME`.

Both libraries are imported only here and in the builders of `cnn`.
"""

from __future__ import annotations

from difflib import get_close_matches
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn

from wml_ray.errors import UserError, shortened
from wml_ray.networks.spec import ImageSpec, Stages
from wml_ray.networks.staging import TRACED_SIDE, NotAChain, StagePaths, check_stages, cut_stages, find_stages
from wml_ray.networks.transformer import is_transformer, transformer_stages

TRACED_CLASSES = 7


def library_stages(name: str, spec: ImageSpec, patch_size: int | None) -> Stages:
    """The stages of `timm:NAME` or `torchvision:NAME`, freshly initialised; tensors keep their names in the library.

    Raises:
        UserError: the library is missing or has no such network, it cannot be cut into stages, or the patch size does
            not fit.
    """
    network = library_network(name, spec, patch_size)
    if is_transformer(network):
        side = cast(Any, network).patch_embed.patch_size[0]
        if spec.resolution % side:
            raise UserError(
                f"model.backbone = '{name}' has patches of {side} pixels, which do not divide images of "
                f"{spec.resolution}; set model.patch_size to a number that does"
            )
        try:
            return transformer_stages(network)
        except NotAChain as error:
            raise _not_staged(name, error) from None
    if patch_size is not None:
        raise UserError(f"model.patch_size = {patch_size}: model.backbone = '{name}' has no patches; set it to null")
    return cut_stages(network, _stage_paths(name, spec.channels))


@lru_cache(maxsize=16)
def _stage_paths(name: str, channels: int) -> StagePaths:
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            network = library_network(name, ImageSpec(channels, 0, TRACED_CLASSES)).eval()
            paths = find_stages(network, channels)
            image = torch.randn(2, channels, TRACED_SIDE, TRACED_SIDE)
            with torch.no_grad():
                expected = network(image)
            check_stages(cut_stages(network, paths), image, expected)
            return paths
    except NotAChain as error:
        raise _not_staged(name, error) from None


def _not_staged(name: str, error: NotAChain) -> UserError:
    return UserError(f"model.backbone = '{name}' cannot be cut into stages: {error}")


def library_network(name: str, spec: ImageSpec, patch_size: int | None = None) -> nn.Module:
    """The whole network `timm:NAME` or `torchvision:NAME`, randomly initialised.

    Raises:
        UserError: the library is missing or has no such network, or the patches do not fit the images.
    """
    library, _, network = name.partition(":")
    return _from_timm(name, network, spec, patch_size) if library == "timm" else _from_torchvision(name, network, spec)


def _from_timm(name: str, network: str, spec: ImageSpec, patch_size: int | None) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise UserError(f"model.backbone = '{name}' needs the timm package: pip install 'wml_ray[timm]'") from None
    if not timm.is_model(network):
        raise _unknown(name, timm.list_models())
    options: dict[str, Any] = {"num_classes": spec.num_classes, "in_chans": spec.channels}
    if timm.model_entrypoint(network).__module__.rpartition(".")[2] in ("vision_transformer", "deit"):
        options["img_size"] = spec.resolution
        options |= {"patch_size": patch_size} if patch_size else {}
    return cast(nn.Module, timm.create_model(network, **options))


def _from_torchvision(name: str, network: str, spec: ImageSpec) -> nn.Module:
    from torchvision import models

    if network not in (known := models.list_models(module=models)):
        raise _unknown(name, known)
    module: nn.Module = models.get_model(network, weights=None, num_classes=spec.num_classes)
    if spec.channels != 3:
        _adapt_first_layer(module, spec.channels)
    return module


def _adapt_first_layer(network: nn.Module, channels: int) -> None:
    """Replace the first convolution of a network for RGB images by one of `channels` input channels."""
    path, first = next((path, module) for path, module in network.named_modules() if isinstance(module, nn.Conv2d))
    options: dict[str, Any] = {key: getattr(first, key) for key in ("stride", "padding", "dilation")}
    new = nn.Conv2d(channels, first.out_channels, first.kernel_size, bias=first.bias is not None, **options)  # type: ignore[arg-type]
    network.set_submodule(path, new)


def _unknown(name: str, known: list[str]) -> UserError:
    library, _, network = name.partition(":")
    close = get_close_matches(network[:100], known, n=3, cutoff=0.5)
    near = f"; near are {', '.join(close)}" if close else ""
    return UserError(f"model.backbone = '{shortened(name)}': {library} has no such network{near}")
