"""A state dict of a whole backbone, loaded into every copy of a tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from wml_ray.config.model import ModelConfig
from wml_ray.errors import UserError, one_line, shortened
from wml_ray.networks.costs import layer_costs
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec
from wml_ray.pruning.prune import head_names
from wml_ray.settings import LIBRARIES

WRAPPERS = ("state_dict", "model")  # keys under which training scripts store the state dict
COUNTER = "num_batches_tracked"  # of BatchNorm, which files of old versions of PyTorch lack
LISTED = 8  # names in an error, of each kind


def load_pretrained(tree: PeerTree, model: ModelConfig, spec: ImageSpec) -> dict[str, Any]:
    """Copy the tensors of `model.pretrained` into every copy of an unpruned tree; returns what was loaded, as JSON.

    Names are those of the library for `timm:NAME` and `torchvision:NAME`, else `<stage>.<name in the stage>`, or
    `<number of the stage>.<name in the stage>`. A file of another number of classes, or without the layer that gives
    the logits, leaves that layer as it is. Counters of BatchNorm may be missing.

    Raises:
        UserError: the file cannot be read, or a tensor is missing, surplus or of another shape.
    """
    assert model.pretrained is not None
    found = _read(model.pretrained)
    names = _names_in_file(tree, model.backbone, found)
    expected = tree.state_dict()
    heads = set(head_names(tree, layer_costs(tree, spec), spec))
    in_head = {names[name] for name in expected if name.rpartition(".")[0] in heads}
    weight = next(name for name in in_head if name.endswith("weight"))
    replaced = sorted(in_head) if weight not in found or len(found[weight]) != spec.num_classes else []
    counters = {name for name in names.values() if name.rpartition(".")[2] == COUNTER} - found.keys()
    _check(model, {names[name]: tensor for name, tensor in expected.items()}, found, {*replaced, *counters})
    with torch.no_grad():
        for name, tensor in expected.items():
            if names[name] not in replaced and names[name] in found:
                tensor.copy_(found[names[name]])
    return {
        "file": Path(model.pretrained).name,
        "sha256": model.pretrained_digest,
        "tensors": len(found.keys() - set(replaced)),
        "new": replaced,
        "counters_from_zero": len(counters),
    }


def describe_pretrained(record: Mapping[str, Any]) -> str:
    """What `load_pretrained` loaded, in a line."""
    new = f"; new for these classes: {', '.join(record['new'])}" if record["new"] else ""
    counters = f"; {record['counters_from_zero']} BatchNorm counters from 0" if record["counters_from_zero"] else ""
    return (
        f"{record['file']} (sha256 {record['sha256'][:10]}), {record['tensors']} tensors in every copy{new}{counters}"
    )


def _read(path: str) -> dict[str, Tensor]:
    """The state dict in a file, without the prefix `module.` of DataParallel."""
    try:
        if path.endswith(".safetensors"):
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of the readers of both formats; a file may hold anything
        raise UserError(
            f"model.pretrained = '{path}' cannot be read as tensors ({shortened(one_line(error))}); save the state "
            "dict alone, with torch.save(network.state_dict(), FILE) or safetensors"
        ) from None
    for key in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"model.pretrained = '{path}' holds no state dict, which maps names to tensors")
    prefix = "module." if all(name.startswith("module.") for name in found) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def _names_in_file(tree: PeerTree, backbone: str, found: Mapping[str, Tensor]) -> dict[str, str]:
    """Name of each tensor of the tree -> its name in the file."""
    numbered = all(name[:1].isdigit() for name in found)
    prefixes = {stage: f"{index if numbered else stage}." for index, stage in enumerate(tree.stages)}
    if backbone.partition(":")[0] in LIBRARIES:
        prefixes = dict.fromkeys(tree.stages, "")
    names = {}
    for name in tree.state_dict():
        _, stage, _, inner = name.split(".", 3)
        names[name] = prefixes[stage] + inner
    return names


def _check(model: ModelConfig, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], may_lack: set[str]) -> None:
    missing = [name for name in expected if name not in found and name not in may_lack]
    surplus = [name for name in found if name not in expected]
    shapes = [
        f"{name} {tuple(found[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and name not in may_lack and found[name].shape != tensor.shape
    ]
    kinds = {"missing": missing, "surplus": surplus, "of another shape": shapes}
    wrong = [f"{len(names)} {kind} ({_listed(names)})" for kind, names in kinds.items() if names]
    if wrong:
        raise UserError(
            f"model.pretrained = '{model.pretrained}' does not fit model.backbone = '{model.backbone}': tensors "
            f"{'; '.join(wrong)}"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
