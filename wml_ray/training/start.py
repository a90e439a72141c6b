"""The start of a run: its newest checkpoint, or the freshly pruned tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial

import torch

from wml_ray.checkpoints.checkpoint import Checkpoint, DamagedCheckpoint
from wml_ray.checkpoints.load import build_tree, config_and_spec, rebuild_tree
from wml_ray.checkpoints.plan import check_plan, layout
from wml_ray.checkpoints.pretrained import load_pretrained
from wml_ray.checkpoints.store import Checkpoints
from wml_ray.config.load import with_values
from wml_ray.config.schema import Config
from wml_ray.data.dataset import Dataset
from wml_ray.data.load import load_dataset
from wml_ray.data.readers import class_names
from wml_ray.data.splits import seed_for
from wml_ray.errors import UserError
from wml_ray.methods.base import Method, Teacher
from wml_ray.methods.registry import build, method_class
from wml_ray.networks.costs import count_macs, count_params, peer_costs, removed_shares
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec
from wml_ray.networks.trunk_gradient import divide_shared_gradients
from wml_ray.pruning.prune import prune
from wml_ray.pruning.widths import ChannelWidths, apply_channel_widths
from wml_ray.storage.lease import Lease
from wml_ray.storage.retry import retry_storage
from wml_ray.training.evaluation import metric_names
from wml_ray.training.events import now_ms
from wml_ray.training.state import below, initial_state, named_parameters
from wml_ray.training.teacher import FrozenTeacher, check_same_teacher, load_teacher, starting_tree
from wml_ray.training.threads import torch_threads, training_threads
from wml_ray.training.trainer import check_batch_shares

_EVERY_EPOCH = ("val/", "train/")  # prefixes of the metrics that every epoch of every method has


def load_or_create_checkpoint(config: Config, num_workers: int = 1, lease: Lease | None = None) -> Checkpoint:
    """The run's newest intact checkpoint, else the freshly pruned tree, saved as epoch 0.

    Every worker starts from a checkpoint, so all are pruned alike, and the first start is a resume like any other.
    `num_workers` is the largest number of workers the run may have.

    Raises:
        StorageUnavailable: the folder cannot be written, or was full for ten minutes.
        UserError: backbone, sharing, ratios, data or teacher are wrong, the teacher has changed since the run began, or
            there are checkpoints and none can be used.
    """
    teacher = load_teacher(config)
    with closing(epoch_checkpoints(config, lease)) as checkpoints:
        newest = checkpoints.latest(partial(check_checkpoint, config, teacher=teacher))
        if newest is None:
            if checkpoints.epochs():
                raise UserError(
                    f"no checkpoint in {checkpoints.folder} can be used; restore one, or remove it to start over"
                )
            dataset = load_dataset(config)
            check_batch_shares(config, dataset, num_workers)
            newest = first = initial_checkpoint(config, dataset)
            retry_storage(lambda: checkpoints.save(first), checkpoints.folder)
            checkpoints.wait_for_uploads()
        return newest


def initial_checkpoint(config: Config, dataset: Dataset) -> Checkpoint:
    """Epoch 0: the tree as initialised and pruned, and the method's own tensors.

    Raises:
        UserError: backbone, sharing, ratios or teacher are wrong.
    """
    teacher = load_teacher(config, dataset)
    tree = build_tree(config, dataset.spec)
    full = peer_costs(tree, dataset.spec)
    pretrained = None
    if start := starting_tree(config, teacher):
        channels = start.channels
        apply_channel_widths(tree, channels)
        tree.load_state_dict(start.tree.state_dict())
    else:
        pretrained = load_pretrained(tree, config.model, dataset.spec) if config.model.pretrained else None
        channels = _prune(tree, config, dataset)
    state = initial_state(_method_on(tree, config, dataset.spec, teacher))
    metadata = {
        "format": 1,
        "run_id": config.run_id,
        "config": config.dump(),
        "selects": method_class(config.method.name).selects,
        "sharing": list(tree.sharing),
        "image_spec": vars(dataset.spec),
        "classes": class_names(config.data),
        "skipped_images": list(dataset.skipped),
        "normalisation": {"mean": dataset.mean, "std": dataset.std},
        "channels": channels,
        "peers": removed_shares(full, peer_costs(tree, dataset.spec)),
        "tree": {"params": count_params(tree), "macs": count_macs(tree, dataset.spec)},
        "trainer_layout": layout(state),
        "created_ms": now_ms(),
        "epoch": 0,
        "metrics": {},
        "history": [],
    }
    if teacher:
        metadata["teacher"] = teacher.record
    if pretrained:
        metadata["pretrained"] = pretrained
    return Checkpoint(0, tree.state_dict(), state, metadata)


def _prune(tree: PeerTree, config: Config, dataset: Dataset) -> ChannelWidths:
    batches = dataset.saliency_batches(config.pruning.saliency_images)
    threads = min(training_threads(config), torch.get_num_threads())
    with torch.random.fork_rng(devices=[]), torch_threads(threads):
        torch.manual_seed(seed_for(config.seed, "saliency"))  # for dropout
        return prune(tree, config.pruning, dataset.spec, batches)


def build_method(
    config: Config, spec: ImageSpec, channels: Mapping[str, Sequence[int]], teacher: Teacher | None = None
) -> Method:
    """The config's method on a tree of these channel widths, both with their initial tensors."""
    tree = build_tree(config, spec)
    apply_channel_widths(tree, channels)
    return _method_on(tree, config, spec, teacher)


def _method_on(tree: PeerTree, config: Config, spec: ImageSpec, teacher: Teacher | None) -> Method:
    if config.model.trunk_gradient == "mean":
        divide_shared_gradients(tree)
    return build(config.method.name, tree, config.method_settings, spec, seed_for(config.seed, "method"), teacher)


def epoch_checkpoints(config: Config, lease: Lease | None) -> Checkpoints:
    """The checkpoints written at the end of each epoch."""
    return Checkpoints(config.run_folder / "checkpoints", config.run.keep_checkpoints, lease)


def mid_epoch_checkpoints(config: Config, lease: Lease | None) -> Checkpoints:
    """The checkpoints written in the middle of an epoch, at a notice of preemption."""
    return Checkpoints(config.run_folder / "checkpoints" / "partial", 1, lease, keep_damaged=False)


def check_checkpoint(config: Config, checkpoint: Checkpoint, teacher: FrozenTeacher | None = None) -> None:
    """Check that the run of `config` can be resumed from a checkpoint, with its method's teacher.

    Raises:
        DamagedCheckpoint: it is of another run, its metadata are not whole, or its tensors do not fit the network, the
            method or the optimiser.
        UserError: the teacher has changed since the run began.
    """
    name = f"of epoch {checkpoint.epoch}"
    own_config, spec = config_and_spec(checkpoint, name)
    if own_config.model.pretrained and config.model.pretrained:  # the file may have moved
        own_config = with_values(own_config, {"model.pretrained": config.model.pretrained})
    run_ids = {str(checkpoint.metadata.get("run_id")), own_config.run_id}
    if run_ids != {config.run_id}:
        raise DamagedCheckpoint(f"the checkpoint {name} is of another run ({', '.join(sorted(run_ids))})")
    check_same_teacher(checkpoint, teacher)
    method = _method_on(rebuild_tree(checkpoint, name), config, spec, teacher)
    state, parameters = checkpoint.state, named_parameters(method)
    misfits = [
        key for key, tensor in initial_state(method).items() if key not in state or state[key].shape != tensor.shape
    ]
    for key, tensor in below("optimizer", state).items():
        parameter = parameters.get(key.partition("/")[2])
        if parameter is None or tensor.shape not in (parameter.shape, ()):
            misfits.append(f"optimizer/{key}")
    if misfits:
        raise DamagedCheckpoint(f"checkpoint {name} is damaged (trainer.safetensors: {misfits[0]} does not fit)")
    metrics = [
        metric for metric in metric_names(config.method.name, config.num_peers) if metric.startswith(_EVERY_EPOCH)
    ]
    try:
        check_plan(checkpoint.metadata, state, metrics, config.num_peers)
    except ValueError as error:
        raise DamagedCheckpoint(f"checkpoint {name} is damaged ({error})") from None


def starting_point(config: Config, lease: Lease | None, mid_epoch: Checkpoints) -> tuple[int, bool]:
    """Epochs done in the newest checkpoint, and whether a checkpoint of the middle of the next epoch continues it."""
    newest = load_or_create_checkpoint(config, lease=lease)
    further = mid_epoch.latest(partial(check_checkpoint, config, teacher=load_teacher(config)))
    return newest.epoch, further is not None and further.metadata["history"] == newest.metadata["history"]
