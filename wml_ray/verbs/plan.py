"""The verb `plan` as a function: a run described without training it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wml_ray.checkpoints.pretrained import describe_pretrained
from wml_ray.checkpoints.store import Checkpoints
from wml_ray.config.load import as_config
from wml_ray.config.schema import Config
from wml_ray.data.check import undecodable_images
from wml_ray.data.dataset import Dataset
from wml_ray.data.in_memory import InMemoryDataset
from wml_ray.data.load import load_dataset
from wml_ray.data.readers import DataMissing, image_spec
from wml_ray.data.splits import generator_for
from wml_ray.storage.files import check_storage
from wml_ray.training.memory import training_memory_bytes
from wml_ray.training.prediction import StepPrediction, network_of, predict_step
from wml_ray.training.result import stored_result
from wml_ray.training.start import build_method, initial_checkpoint
from wml_ray.training.teacher import check_teacher, load_teacher
from wml_ray.training.trainer import check_batch_shares


@dataclass(frozen=True)
class RunPlan:
    """The description of a run."""

    peers: list[dict[str, Any]]  # channels, params and MACs of each peer, and the shares removed
    tree_params: int
    memory_bytes: int  # estimated peak of one worker's training step
    state: str
    images: str
    teacher: str  # empty where the method has none
    stages: list[str]  # names; `model.sharing` has an entry for each
    pretrained: str  # what was loaded; empty without `model.pretrained`
    step: StepPrediction | None = None  # where a bandwidth was given


def plan(
    config: str | Path | Mapping[str, Any] | Config,
    check_data: bool = False,
    bandwidth_gbit: float | None = None,
    **overrides: Any,
) -> RunPlan:
    """Build and prune the tree, and measure it; trains nothing and writes nothing.

    Where the dataset is missing, the saliency is computed on noise.
    The headers of an image folder's files are checked and a sample is decoded; `check_data` decodes all, with progress.
    `bandwidth_gbit`, of the link of each worker, adds the predicted step, for which some steps run on noise.
    `config` and `overrides` are those of `train`.

    Raises:
        UserError: a mistake in the config, images that cannot be decoded, an unusable storage or teacher, or a
            bandwidth for a run of one worker.
    """
    config = as_config(config, overrides)
    network = None if bandwidth_gbit is None else network_of(config, bandwidth_gbit)
    check_storage(config.run_folder)
    teacher = check_teacher(config)
    skipped = undecodable_images(config.data, check_data, show_progress=check_data)
    dataset, images = _data_or_noise(config, skipped)
    start = initial_checkpoint(config, dataset)
    method = build_method(config, dataset.spec, start.metadata["channels"], load_teacher(config, dataset))
    fewest, most = config.scale.worker_range
    check_batch_shares(config, dataset, max(most, 1))
    images_a_worker = -(-config.data.batch_size // max(fewest, 1))
    memory = training_memory_bytes(method, dataset.spec, images_a_worker, config.optim)
    return RunPlan(
        peers=start.metadata["peers"],
        tree_params=start.metadata["tree"]["params"],
        memory_bytes=memory,
        state=_state(config),
        images=images,
        teacher=teacher,
        stages=list(method.tree.stages),
        pretrained=describe_pretrained(start.metadata["pretrained"]) if "pretrained" in start.metadata else "",
        step=predict_step(config, method, dataset, network) if network else None,
    )


def _state(config: Config) -> str:
    if stored_result(config):
        return "finished"
    epochs = Checkpoints(config.run_folder / "checkpoints", 1).epochs()
    return f"epoch {epochs[-1]} of {config.optim.epochs} done" if epochs else "not started"


def _data_or_noise(config: Config, skipped: Collection[str]) -> tuple[Dataset, str]:
    """The dataset without the images of `skipped`, or random images of the same shape; and a description."""
    name = config.data.name
    present = config.model_copy(update={"data": config.data.model_copy(update={"download": False})})
    try:
        dataset = load_dataset(present, skipped=skipped)
        used = f", {len(dataset.splits['train']):,} training images" if config.data.train_images else ""
        left_out = f", {len(skipped):,} left out that cannot be decoded" if skipped else ""
        return dataset, name + used + left_out
    except DataMissing:
        spec = image_spec(config.data)
        images = max(config.data.batch_size, config.pruning.saliency_images)
        generator = generator_for(config.seed, "noise")
        pixels = torch.randint(256, (images, *spec.shape), dtype=torch.uint8, generator=generator)
        labels = torch.randint(spec.num_classes, (images,), generator=generator)
        every = torch.arange(images)
        splits = {"train": every, "outer": every, "validation": every, "test": every}
        dataset = InMemoryDataset(config, spec, splits, pixels, labels, torch.device("cpu"))  # type: ignore[arg-type]
        return dataset, f"noise, because '{config.data.root}' has no {name}; channel widths may differ slightly"
