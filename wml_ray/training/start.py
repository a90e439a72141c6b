"""Where a run starts: its newest checkpoint, or the freshly pruned tree."""

from __future__ import annotations

from contextlib import closing

import torch

from wml_ray.checkpoints.checkpoint import Checkpoint
from wml_ray.checkpoints.load import build_tree
from wml_ray.checkpoints.store import Checkpoints
from wml_ray.config.schema import Config
from wml_ray.data.dataset import Dataset
from wml_ray.data.load import load_dataset
from wml_ray.data.splits import seed_for
from wml_ray.errors import UserError
from wml_ray.networks.costs import count_macs, count_params, peer_costs, removed_shares
from wml_ray.pruning.prune import prune
from wml_ray.storage.lease import Lease
from wml_ray.training.events import now_ms
from wml_ray.training.threads import torch_threads, training_threads
from wml_ray.training.trainer import check_batch_shares, initial_state


def load_or_create_checkpoint(config: Config, num_workers: int = 1, lease: Lease | None = None) -> Checkpoint:
    """Where the run starts: its newest intact checkpoint, else the freshly pruned tree, saved as epoch 0.

    Every worker starts from a checkpoint, so all are pruned alike and a first start is like any other. `num_workers` is
    how many there may come to be.

    Raises:
        UserError: in the backbone, the sharing, the ratios or the data, before anything is written.
    """
    with closing(epoch_checkpoints(config, lease)) as checkpoints:
        newest = checkpoints.latest()
        if newest is None:
            dataset = load_dataset(config)
            check_batch_shares(config, dataset, num_workers)
            newest = initial_checkpoint(config, dataset)
            try:
                checkpoints.save(newest)
            except OSError as error:
                raise UserError(
                    f"run.storage_path = '{config.run.storage_path}': {config.run_folder} cannot be written "
                    f"({error.strerror}); name a folder that can"
                ) from error
            checkpoints.wait_for_uploads()
        return newest


def initial_checkpoint(config: Config, dataset: Dataset) -> Checkpoint:
    """Epoch 0: the tree as initialised and pruned."""
    tree = build_tree(config, dataset.spec)
    full = peer_costs(tree, dataset.spec)
    batches = dataset.saliency_batches(config.pruning.saliency_images)
    threads = min(training_threads(config), torch.get_num_threads())
    with torch.random.fork_rng(devices=[]), torch_threads(threads):
        torch.manual_seed(seed_for(config.seed, "saliency"))  # for dropout
        channels = prune(tree, config.pruning, dataset.spec, batches)
    plan = {
        "format": 1,
        "run_id": config.run_id,
        "config": config.model_dump(mode="json"),
        "sharing": list(tree.sharing),
        "image_spec": vars(dataset.spec),
        "skipped_images": list(dataset.skipped),
        "normalisation": {"mean": dataset.mean, "std": dataset.std},
        "channels": channels,
        "peers": removed_shares(full, peer_costs(tree, dataset.spec)),
        "tree": {"params": count_params(tree), "macs": count_macs(tree, dataset.spec)},
        "created_ms": now_ms(),
        "epoch": 0,
        "metrics": {},
        "history": [],
    }
    return Checkpoint(0, tree.state_dict(), initial_state(tree.num_peers), plan)


def epoch_checkpoints(config: Config, lease: Lease | None) -> Checkpoints:
    return Checkpoints(config.run_folder / "checkpoints", config.run.keep_checkpoints, lease)


def mid_epoch_checkpoints(config: Config, lease: Lease | None) -> Checkpoints:
    """Of the middle of an epoch, written when the machine was about to go."""
    return Checkpoints(config.run_folder / "checkpoints" / "partial", 1, lease)


def starting_point(config: Config, lease: Lease | None, partial: Checkpoints) -> tuple[int, bool]:
    """Epochs done in the newest checkpoint, and whether one of the middle of the next epoch goes on from there."""
    newest, further = load_or_create_checkpoint(config, lease=lease), partial.latest()
    return newest.epoch, further is not None and further.metadata["history"] == newest.metadata["history"]
