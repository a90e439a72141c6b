"""Trees and peers rebuilt from checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from wml_ray.checkpoints.checkpoint import UNREADABLE, Checkpoint, DamagedCheckpoint, read_checkpoint
from wml_ray.config.load import parse_config
from wml_ray.config.nested import functions_named_in
from wml_ray.config.schema import Config
from wml_ray.data.splits import seed_for
from wml_ray.errors import UserError, one_line, shortened
from wml_ray.networks.backbones import build_stages
from wml_ray.networks.exits import exit_tree
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec
from wml_ray.pruning.widths import apply_channel_widths
from wml_ray.storage.paths import to_path


def load_tree(folder: str | Path, trust: bool = False) -> PeerTree:
    """The tree of a checkpoint, in evaluation mode on the CPU.

    `folder` is the folder of one checkpoint, such as `results/wml/RUN/checkpoints/epoch-0030`, or its address in remote
    storage. Parameters and buffers equal those of the checkpoint bit for bit. Inputs (B, channels, height, width),
    normalised as `plan.json` says, give logits (M, B, classes).

    A checkpoint may name a network as `package.module:function`, any function of any module on the import path. It is
    imported and called with `trust=True` only.

    Raises:
        DamagedCheckpoint: a file is missing, a digest does not match, or the tensors do not fit the network.
        StorageUnavailable: the storage failed for ten minutes.
        UserError: the backbone is the user's own and not trusted, or cannot be imported.
    """
    checkpoint = read_checkpoint(to_path(folder))
    if not trust:
        check_trusted(checkpoint, f"checkpoint {folder}", "pass trust=True if you trust it")
    return rebuild_tree(checkpoint, folder).eval()


def load_peer(folder: str | Path, index: int, trust: bool = False) -> nn.Module:
    """The network of one peer of a checkpoint, otherwise as `load_tree`; inputs give logits (B, classes).

    Raises:
        UserError: as `load_tree`, or there is no such peer.
    """
    tree = load_tree(folder, trust)
    if not 0 <= index < tree.num_peers:
        raise UserError(f"{folder} has no peer {index}; give a number from 0 to {tree.num_peers - 1}")
    return tree.peer(index).eval()


def check_trusted(checkpoint: Checkpoint, name: str, remedy: str, trusted: Collection[str] = ()) -> None:
    """Check that to rebuild the checkpoint's tree imports no user's function but the `trusted` ones.

    Raises:
        UserError: it names another one; the message begins with `name` and ends with `remedy`.
    """
    for key, function in functions_named_in(checkpoint.metadata.get("config")).items():
        if function not in trusted:
            raise UserError(f"{name} would run {shortened(function)}, its {key}; {remedy}")


def build_tree(config: Config, spec: ImageSpec) -> PeerTree:
    """The unpruned tree of a config; its initial tensors follow from the seed.

    Raises:
        UserError: the backbone is unknown, or the sharing or the exits do not fit its stages.
    """
    model = config.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "initialisation"))

        def build() -> dict[str, nn.Module]:
            return build_stages(model.backbone, spec, model.patch_size)

        if model.exits:
            return exit_tree(build, model.sharing, model.exits, spec)
        return PeerTree(build, model.sharing)


def rebuild_tree(checkpoint: Checkpoint, name: str | Path) -> PeerTree:
    """The tree of a checkpoint, in training mode; `name` is shown in errors.

    Raises:
        DamagedCheckpoint: the metadata cannot be parsed, or the tensors do not fit the network that it describes.
        UserError: the backbone cannot be imported.
    """
    config, spec = config_and_spec(checkpoint, name)
    tree = build_tree(config, spec)
    try:
        apply_channel_widths(tree, checkpoint.metadata["channels"])
    except (*UNREADABLE, RuntimeError, AttributeError) as error:
        raise DamagedCheckpoint(f"checkpoint {name} is damaged (plan.json: {one_line(error)})") from error
    if difference := _difference(checkpoint.model, tree.state_dict()):
        raise DamagedCheckpoint(f"checkpoint {name} is damaged (model.safetensors: {difference})")
    tree.load_state_dict(checkpoint.model)
    return tree


def config_and_spec(checkpoint: Checkpoint, name: str | Path) -> tuple[Config, ImageSpec]:
    """The config of a checkpoint's run and the image specification of its data; `name` is shown in errors.

    Raises:
        DamagedCheckpoint: the metadata cannot be parsed.
    """
    try:
        return parse_config(checkpoint.metadata["config"]), ImageSpec(**checkpoint.metadata["image_spec"])
    except UNREADABLE as error:
        raise DamagedCheckpoint(f"checkpoint {name} is damaged (plan.json: {one_line(error)})") from error


def _difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The first name, shape or dtype that differs; empty if none does."""
    for name in sorted(found.keys() ^ expected.keys()):
        return f"{name} is {'missing' if name in expected else 'unknown'}"
    for name, tensor in expected.items():
        if (found[name].shape, found[name].dtype) != (tensor.shape, tensor.dtype):
            return f"{name} is {tuple(found[name].shape)} {found[name].dtype}, not {tuple(tensor.shape)} {tensor.dtype}"
    return ""
