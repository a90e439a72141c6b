"""Network: one peer or an ensemble of a run as a module that takes images as they are stored."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wml_ray.checkpoints.checkpoint import (
    UNREADABLE,
    Checkpoint,
    DamagedCheckpoint,
    epoch_folder,
    read_checkpoint,
)
from wml_ray.checkpoints.load import check_trusted, config_and_spec, rebuild_tree
from wml_ray.checkpoints.store import stored_epochs
from wml_ray.config.load import parse_config
from wml_ray.data.readers import DATASETS, class_names
from wml_ray.errors import UserError, one_line, shortened
from wml_ray.export.images import Image, pixels_of
from wml_ray.methods.registry import method_class
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec
from wml_ray.report.style import prediction_words
from wml_ray.storage.retry import retry_storage
from wml_ray.storage.runs import RESULT
from wml_ray.training.result import read_result

if TYPE_CHECKING:
    import pandas as pd

    from wml_ray.config.schema import Config

ENSEMBLES = ("average", "weighted")
PREDICT_BATCH = 64  # images that `predict` holds at once


@dataclass(frozen=True)
class NetworkInfo:
    """What a network is and where it comes from."""

    run_id: str
    epoch: int
    choice: str  # "peer2", "ensemble_average" or "ensemble_weighted"; val/accuracy/<choice> is its accuracy
    classes: tuple[str, ...]
    spec: ImageSpec
    mean: tuple[float, ...]  # of each channel, in the units of the pixels
    std: tuple[float, ...]
    params: int
    macs: int
    metrics: Mapping[str, float]  # of the run at this epoch, under their MLflow names
    config: Config
    plan: Mapping[str, Any]  # the metadata of its checkpoint
    test_accuracy: float | None = None  # None of a run that was not tested at this epoch

    @property
    def white(self) -> int:
        """The largest value of a pixel."""
        name = self.config.data.name
        return DATASETS[name].white if name in DATASETS else 255

    @property
    def title(self) -> str:
        """Such as `peer 2 of digits-resnet20-0123456789`."""
        return f"{prediction_words(self.choice)} of {self.run_id}"

    @property
    def validation_accuracy(self) -> float:
        """Share of the validation images that the run classified correctly at this epoch; nan at epoch 0."""
        return self.metrics.get(f"val/accuracy/{self.choice}", float("nan"))


class Network(nn.Module):
    """A network in evaluation mode that takes images as they are: the normalisation is inside.

    `network(images)` takes pixels (B, C, H, W), uint8 or float, in the units in which the dataset stores them whatever
    their type: 0 to 255, `digits` 0 to 16. It returns logits (B, K), one for each of `network.classes`.
    """

    mean_C11: Tensor
    std_C11: Tensor
    weights_M: Tensor

    def __init__(self, tree: PeerTree, weights: Sequence[float], info: NetworkInfo) -> None:
        """`tree` takes normalised images (B, C, H, W); the logits of its peers are summed with `weights`."""
        super().__init__()
        self.info = info
        self.tree = tree
        for name, values in (("mean_C11", info.mean), ("std_C11", info.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("weights_M", torch.tensor(weights, dtype=torch.float32))
        self.eval().requires_grad_(False)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return self.info.classes

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W), uint8 or float pixels.

        Raises:
            UserError: the images have another shape.
        """
        logits_MBK = self.peer_logits(images)
        return logits_MBK[0] if len(logits_MBK) == 1 else torch.einsum("m,mbk->bk", self.weights_M, logits_MBK)

    def peer_logits(self, images: Tensor) -> Tensor:
        """Logits (M, B, K) of the peers that the network is made of, of images as `forward` takes them.

        Raises:
            UserError: the images have another shape.
        """
        self._check_shape(images)
        logits_MBK: Tensor = self.tree((images.to(self.mean_C11.dtype) - self.mean_C11) / self.std_C11)
        return logits_MBK

    def _check_shape(self, images: Tensor) -> None:
        if tuple(images.shape[1:]) != self.info.spec.shape:
            channels, height, width = self.info.spec.shape
            raise UserError(
                f"images have the shape {tuple(images.shape)}; this network takes (images, {channels}, {height}, "
                f"{width}), and `predict` takes files and images of any size"
            )

    @torch.no_grad()
    def predict(self, images: Image | Sequence[Image]) -> pd.DataFrame:
        """The class of each image: a frame with a row an image and the columns `class`, `probability` and `label`.

        `images` is one or several paths, PIL images or tensors (C, H, W). Files and PIL images are rotated by their
        EXIF orientation, resized and cropped as the run's validation images were; tensors are taken as `forward` does.

        Raises:
            UserError: an image cannot be read, or has another shape.
        """
        import pandas as pd

        several = images if isinstance(images, Sequence) and not isinstance(images, str) else [images]
        rows: list[tuple[str, float, int]] = []
        for start in range(0, len(several), PREDICT_BATCH):
            batch = several[start : start + PREDICT_BATCH]
            pixels = [pixels_of(image, self.info.config.data, self.info.spec) for image in batch]
            _warn_of_unit_interval(pixels)
            probabilities_BK = self(torch.stack(pixels).to(self.mean_C11.device)).softmax(-1)
            best = probabilities_BK.max(-1)
            rows += [
                (self.classes[label], probability, label)
                for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        return pd.DataFrame(rows, columns=["class", "probability", "label"])


def _warn_of_unit_interval(pixels: Sequence[Tensor]) -> None:
    """Warn of float images of 0 to 1, which are nearly black to a network that takes 0 to 255."""
    if all(image.is_floating_point() and 0 < float(image.max()) <= 1 for image in pixels):
        warnings.warn("the pixels are between 0 and 1; this network takes 0 to 255: multiply them by 255", stacklevel=3)


def load_network(folder: Path, choice: int | str, epoch: int | None = None, trust: bool = False) -> Network:
    """A peer or an ensemble of a run in `folder`, local or remote: of the epoch that the run was tested at.

    `folder` may also be what `wml-ray export --to safetensors` wrote, which holds a single network.

    `epoch` names another epoch whose checkpoint is kept, also of a run that has not finished. Code that the run names
    as `package.module:function` is imported and called with `trust=True` only.

    Raises:
        DamagedCheckpoint: a file is missing or changed.
        StorageUnavailable: the storage failed for ten minutes.
        UserError: the run has not finished and no epoch is given, it has no such epoch, peer or ensemble, or it names
            code that is not trusted.
    """
    if retry_storage((folder / "plan.json").exists, folder):
        network = load_standalone(folder, trust)
        kind = network.info.choice.partition("_")[0]
        if choice not in (kind, network.info.choice.removeprefix("ensemble_")) and kind != f"peer{choice}":
            raise UserError(f"{folder} holds {network.info.title} and no other network")
        return network
    result = retry_storage(lambda: read_result(folder / RESULT), folder)
    path = _checkpoint_folder(folder, result, epoch)
    checkpoint = read_checkpoint(path)
    if not trust:
        check_trusted(checkpoint, f"run {folder}", "pass trust=True (--trust) if you trust it")
    network = network_of(checkpoint, path, choice)
    if result and result["test_epoch"] == checkpoint.epoch:
        label = network.info.choice
        tested = result["final"].get(f"test/accuracy/{label}")
        network.info = replace(network.info, test_accuracy=tested)
    return network


def load_standalone(folder: Path, trust: bool = False) -> Network:
    """The network that `wml-ray export --to safetensors` wrote into `folder`; raises as `load_network`."""
    checkpoint = read_checkpoint(folder)
    if not trust:
        check_trusted(checkpoint, f"network {folder}", "pass trust=True (--trust) if you trust it")
    try:
        choice, weights = checkpoint.metadata["network"]["choice"], checkpoint.metadata["network"]["weights"]
    except UNREADABLE as error:
        raise DamagedCheckpoint(f"{folder} is damaged (plan.json: {one_line(error)})") from error
    return Network(rebuild_tree(checkpoint, folder), weights, _info(checkpoint, folder, choice))


def _checkpoint_folder(folder: Path, result: Mapping[str, Any] | None, epoch: int | None) -> Path:
    """The checkpoint of the epoch that a run was tested at, or of `epoch`."""
    checkpoints = folder / "checkpoints"
    kept = stored_epochs(checkpoints)
    if result is None and epoch is None:
        remedy = f"epoch {kept[-1]} is the last it reached" if kept else "it has no checkpoint yet"
        raise UserError(f"run {folder} has not finished; train it to its end, or name an epoch (--epoch N): {remedy}")
    epoch = result["test_epoch"] if epoch is None and result else epoch
    if epoch not in kept:
        there = ", ".join(map(str, kept)) or "none"
        raise UserError(f"run {folder} has no checkpoint of epoch {epoch}; it has {there}")
    return epoch_folder(checkpoints, epoch)


def network_of(checkpoint: Checkpoint, name: str | Path, choice: int | str) -> Network:
    """A peer (its number) or an ensemble of a checkpoint; `name` is shown in errors.

    The ensemble is `average`, `weighted`, or `ensemble`: weighted where the method has peer weights, else average. Code
    that the checkpoint names is imported and called: check it with `checkpoints.load.check_trusted` before.

    Raises:
        DamagedCheckpoint: the tensors do not fit the network that the metadata describes.
        UserError: there is no such peer or ensemble, or the backbone cannot be imported.
    """
    config, _ = config_and_spec(checkpoint, name)
    choice = checked_choice(config, choice)
    tree = rebuild_tree(checkpoint, name)
    info = _info(checkpoint, name, network_name(choice))
    if isinstance(choice, int):
        return Network(_alone(tree, choice), [1.0], info)
    equal = 1 / tree.num_peers
    weights = [info.metrics.get(f"weights/peer{peer}", equal) for peer in range(tree.num_peers)]
    return Network(tree, weights if choice == "weighted" else [equal] * tree.num_peers, info)


def network_name(choice: int | str) -> str:
    """As in the names of metrics: `peer2`, `ensemble_average`."""
    return f"peer{choice}" if isinstance(choice, int) else f"ensemble_{choice}"


def _alone(tree: PeerTree, peer: int) -> PeerTree:
    """The tree of one peer alone."""
    stages = tree.stages_of(peer)
    return PeerTree(lambda: stages, [1] * len(stages))


def _info(checkpoint: Checkpoint, name: str | Path, choice: str) -> NetworkInfo:
    config, spec = config_and_spec(checkpoint, name)
    metadata = checkpoint.metadata
    try:
        alone = choice.startswith("peer") and "network" not in metadata
        costs = metadata["peers"][int(choice.removeprefix("peer"))] if alone else metadata["tree"]
        return NetworkInfo(
            metadata["run_id"],
            checkpoint.epoch,
            choice,
            tuple(metadata.get("classes") or class_names(config.data)),
            spec,
            tuple(metadata["normalisation"]["mean"]),
            tuple(metadata["normalisation"]["std"]),
            costs["params"],
            costs["macs"],
            metadata["history"][-1]["metrics"] if metadata["history"] else {},
            parse_config(metadata.get("run_config", metadata["config"])),
            metadata,
        )
    except UNREADABLE as error:
        raise DamagedCheckpoint(f"checkpoint {name} is damaged (plan.json: {one_line(error)})") from error


def checked_choice(config: Config, choice: int | str) -> int | str:
    """A peer, `average` or `weighted`: `choice`, where `ensemble` is weighted if the method has peer weights.

    Raises:
        UserError: the run has no such peer or ensemble.
    """
    has_weights = "weights/peer0" in method_class(config.method.name).metric_names(config.num_peers)
    if choice == "ensemble":
        return "weighted" if has_weights else "average"
    if isinstance(choice, int):
        if not 0 <= choice < config.num_peers:
            raise UserError(f"there is no peer {choice}; give a number from 0 to {config.num_peers - 1}, or `ensemble`")
    elif choice not in ENSEMBLES:
        raise UserError(f"'{shortened(choice)}' is no ensemble; allowed: {', '.join(ENSEMBLES)}")
    elif choice == "weighted" and not has_weights:
        raise UserError(f"{config.method.name} has no peer weights, so there is no weighted ensemble; use average")
    return choice
