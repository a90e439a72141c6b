"""The frozen teacher of a run: peers of a finished run, or a user's own network."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wml_ray.checkpoints.checkpoint import UNREADABLE, Checkpoint, DamagedCheckpoint, epoch_folder, read_checkpoint
from wml_ray.checkpoints.load import check_trusted, config_and_spec, rebuild_tree
from wml_ray.config.schema import Config
from wml_ray.data.dataset import Dataset
from wml_ray.data.readers import image_spec
from wml_ray.data.splits import seed_for
from wml_ray.errors import UserError, one_line, root_cause, shortened
from wml_ray.methods.base import TaughtMethod
from wml_ray.methods.registry import METHODS
from wml_ray.methods.settings import TEACHER_METHODS
from wml_ray.networks.backbones import call_function, named_stages
from wml_ray.networks.features import Features
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec
from wml_ray.pruning.widths import ChannelWidths
from wml_ray.storage.files import read_json
from wml_ray.storage.runs import RESULT, find_run

Statistics = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each channel, in the units the images are stored in."""

_JUDGES = ("seed", "data.name", "data.validation_fraction")  # the splits follow from them


class FrozenTeacher:
    """A tree in evaluation mode that does not learn; a `Teacher` of methods."""

    def __init__(self, tree: PeerTree, source: dict[str, Any], channels: ChannelWidths | None = None) -> None:
        """`source` says which network it is, `channels` how a run's whole tree is pruned."""
        self.tree = tree.eval().requires_grad_(False)
        self.channels = channels or {}
        self.record = {**source, "digest": _digest(tree)}
        """As the student's checkpoints keep it, in JSON."""
        self._scale, self._shift = torch.ones(()), torch.zeros(())

    def __str__(self) -> str:
        if "function" in self.record:
            return str(self.record["function"])
        run, peer, epoch = (self.record[key] for key in ("run", "peer", "epoch"))
        return f"{'all peers' if peer is None else f'peer {peer}'} of {run}, epoch {epoch}"

    def receive(self, dataset: Dataset, own: Statistics) -> None:
        """Move to the dataset's device, for inputs normalised as its own; `own` are the teacher's statistics.

        With x = (p - m) / s of pixels p, the teacher's input (p - m_t) / s_t is x s / s_t + (m - m_t) / s_t.
        """
        (mean, std), (own_mean, own_std) = (
            [torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in statistics]
            for statistics in ((dataset.mean, dataset.std), own)
        )
        self._scale = (std / own_std).to(dataset.device, torch.float32)
        self._shift = ((mean - own_mean) / own_std).to(dataset.device, torch.float32)
        memory_format = torch.channels_last if dataset.config.optim.channels_last else torch.contiguous_format
        self.tree.to(device=dataset.device, memory_format=memory_format)  # type: ignore[call-overload]

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """(B, ...) inputs to logits (P, B, K)."""
        logits: Tensor = self.tree(self._renormalised(inputs))
        return logits

    @torch.no_grad()
    def features(self, inputs: Tensor) -> Features:
        """(B, ...) inputs to the features of the tree."""
        return self.tree.features(self._renormalised(inputs))

    def _renormalised(self, inputs: Tensor) -> Tensor:
        return inputs * self._scale + self._shift


def load_teacher(config: Config, dataset: Dataset | None = None) -> FrozenTeacher | None:
    """The teacher of the config's method, for the inputs of `dataset`; None where the method has none.

    Without a dataset it is on the CPU, for inputs normalised as its own. A run's tree is rebuilt from the checkpoint of
    the epoch it was tested at, whose files are checked by digest.

    Raises:
        StorageUnavailable: the storage failed for ten minutes.
        UserError: there is no such run, peer or function; the run has not finished, its files are damaged, its images
            have another size or other classes, or its splits are others.
    """
    if config.method.name not in TEACHER_METHODS:
        return None
    spec = dataset.spec if dataset else image_spec(config.data)
    _check_use(config)
    teacher, statistics = _from_function(config, spec) if config.teacher.function else _from_run(config, spec, dataset)
    if dataset:
        teacher.receive(dataset, statistics)
    return teacher


def check_teacher(config: Config) -> str:
    """The teacher of the config's method in words; empty where the method has none.

    Raises:
        UserError: as `load_teacher`, or its storage does not respond, which is not retried.
    """
    if config.teacher.run and config.method.name in TEACHER_METHODS:
        try:
            folder = find_run(config.teacher.run, config.run.storage_path)
            if folder:
                folder.exists()
        except UserError:
            raise
        except Exception as error:  # any error of a storage's client
            raise UserError(
                f"teacher.run = '{config.teacher.run}' cannot be read ({root_cause(error)}); check the address, and "
                "the credentials and the client of its storage"
            ) from None
    return str(load_teacher(config) or "")


def check_same_teacher(checkpoint: Checkpoint, teacher: FrozenTeacher | None) -> None:
    """Check that the run of `checkpoint` began with this teacher.

    Raises:
        UserError: the teacher's tensors have changed.
    """
    if teacher and (checkpoint.metadata.get("teacher") or {}).get("digest") != teacher.record["digest"]:
        raise UserError(
            f"the teacher, {teacher}, has changed since this run began; restore it, or delete the run's folder to "
            "start over with the new one"
        )


def starting_tree(config: Config, teacher: FrozenTeacher | None) -> FrozenTeacher | None:
    """The teacher if the peers start with its tensors, else None."""
    return teacher if teacher and _method(config).starts_as_teacher else None


def _method(config: Config) -> type[TaughtMethod]:
    method = METHODS[config.method.name]
    assert issubclass(method, TaughtMethod)
    return method


def _check_use(config: Config) -> None:
    """Check that the method can use a teacher of this kind."""
    method, teacher = _method(config), config.teacher
    if method.needs_features and teacher.run and teacher.peer is None:
        raise UserError(f"teacher.peer = null: {config.method.name} imitates one network; name a peer, such as 0")
    if method.starts_as_teacher and (teacher.run is None or teacher.peer is not None):
        raise UserError(
            f"method.name = {config.method.name} goes on from all peers of an independent run; set teacher.run to one "
            "of the same seed, model and pruning, and teacher.peer=null"
        )


def _from_run(config: Config, spec: ImageSpec, dataset: Dataset | None) -> tuple[FrozenTeacher, Statistics]:
    folder, result = _finished_run(config)
    peer, epoch = config.teacher.peer, result["test_epoch"]
    try:
        checkpoint = read_checkpoint(epoch_folder(folder / "checkpoints", epoch))
    except (DamagedCheckpoint, *UNREADABLE) as error:
        raise _refused(config, f"{one_line(error)}; restore its files, or train it again") from None
    remedy = "if you trust it, name it as model.backbone or teacher.function of this run instead"
    check_trusted(
        checkpoint, f"teacher.run = '{shortened(config.teacher.run)}'", remedy, config.user_functions.values()
    )
    try:
        tree = rebuild_tree(checkpoint, f"of epoch {epoch}")
        own_config, own_spec = config_and_spec(checkpoint, f"of epoch {epoch}")
        statistics = checkpoint.metadata["normalisation"]["mean"], checkpoint.metadata["normalisation"]["std"]
        source = {"run": checkpoint.metadata["run_id"], "epoch": epoch, "peer": peer}
    except (DamagedCheckpoint, *UNREADABLE) as error:
        raise _refused(config, f"{one_line(error)}; restore its files, or train it again") from None
    _check_data(config, own_config, spec, own_spec)
    if _method(config).starts_as_teacher:
        _check_family(config, own_config)
    if dataset and list(dataset.skipped) != list(checkpoint.metadata["skipped_images"]):
        raise _refused(config, "it left out other images with data.skip_bad, so its splits are others; train it again")
    if peer is not None and peer >= tree.num_peers:
        raise UserError(
            f"teacher.peer = {peer}: {folder.name} has the peers 0 to {tree.num_peers - 1}, or null for all"
        )
    if peer is None:
        return FrozenTeacher(tree, source, checkpoint.metadata["channels"]), statistics
    return FrozenTeacher(_chain(tree.stages_of(peer)), source), statistics


def _finished_run(config: Config) -> tuple[Path, dict[str, Any]]:
    """The folder of `teacher.run` and its result."""
    run = config.teacher.run
    assert run is not None
    folder = find_run(run, config.run.storage_path)
    if folder is None:
        raise _refused(
            config,
            f"there is no such folder, and no run of this id below {config.run.storage_path}; give the folder, the "
            "address or the id of a finished run",
        )
    try:
        result = read_json(folder / RESULT, "restore it", ("test_epoch",))
    except UNREADABLE as error:
        raise _refused(config, one_line(error)) from None
    if result is None:
        raise _refused(config, f"the run has not finished, as {folder} has no {RESULT}; train it to its end")
    return folder, result


def _check_data(config: Config, own_config: Config, spec: ImageSpec, own_spec: ImageSpec) -> None:
    """Check that the teacher was trained on images as the run's, and on none that the run is judged by."""
    if spec != own_spec:
        shape, own_shape = ("x".join(map(str, spec.shape)) for spec in (spec, own_spec))
        raise _refused(
            config,
            f"it was trained on images of {own_shape} and {own_spec.num_classes} classes, this run has {shape} and "
            f"{spec.num_classes}; name a run on the same images",
        )
    flat, own_flat = config.flatten(), own_config.flatten()
    for key in _JUDGES:
        if flat[key] != own_flat[key]:
            raise _refused(
                config,
                f"it was trained with {key}={own_flat[key]}, this run has {flat[key]}, so it may have seen the images "
                f"that this run is validated or tested on; train a teacher with {key}={flat[key]}",
            )


def _check_family(config: Config, own_config: Config) -> None:
    """Check that the teacher is the run's own family, trained independently."""
    if own_config.method.name != "independent":
        raise _refused(config, f"its method is {own_config.method.name}; train it with method.name=independent")
    flat, own_flat = config.flatten(), own_config.flatten()
    for key in sorted(flat.keys() | own_flat.keys()):
        if key.startswith(("model.", "pruning.")) and flat.get(key) != own_flat.get(key):
            raise _refused(
                config,
                f"its {key} is {own_flat.get(key)}, this run's {flat.get(key)}, and this run goes on from its peers; "
                "make both equal",
            )


def _refused(config: Config, reason: str) -> UserError:
    return UserError(f"teacher.run = '{shortened(config.teacher.run)}': {reason}")


def _from_function(config: Config, spec: ImageSpec) -> tuple[FrozenTeacher, Statistics]:
    name = config.teacher.function
    assert name is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "teacher"))
        network = call_function(name, "teacher.function", spec)
    if isinstance(network, nn.Module) and _method(config).needs_features:
        raise UserError(
            f"teacher.function = '{name}' returns one module, but {config.method.name} needs its stages; return a list "
            "or dict of modules, as a backbone does"
        )
    stages = {"network": network} if isinstance(network, nn.Module) else named_stages(network)
    if not stages:
        raise UserError(f"teacher.function = '{name}' must return a torch.nn.Module, or a list or dict of its stages")
    teacher = FrozenTeacher(_chain(stages), {"function": name})
    shape = tuple(teacher.logits(torch.zeros(1, *spec.shape)).shape)
    if shape != (1, 1, spec.num_classes):
        raise UserError(
            f"teacher.function = '{name}' gives outputs of shape {shape[1:]} for an image; they must be logits of "
            f"shape {(1, spec.num_classes)}"
        )
    return teacher, ([0.0] * spec.channels, [1.0] * spec.channels)  # its inputs are the pixels


def _chain(stages: dict[str, nn.Module]) -> PeerTree:
    """The tree of a single peer."""
    return PeerTree(lambda: stages, [1] * len(stages))


def _digest(tree: PeerTree) -> str:
    """SHA-256 of the names, types, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tree.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
