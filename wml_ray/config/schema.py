"""The one schema of a run: frozen, validated, and the only place where a setting is described."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, Field, model_validator

from wml_ray.methods.settings import DmlConfig, MethodConfig, MethodName, WmlConfig
from wml_ray.settings import NAME, Count, NonNegative, Positive, Ratio, Section
from wml_ray.storage.paths import to_path

MAX_SEED = 2**31 - 1


class DataConfig(Section):
    name: Literal["digits", "fashion_mnist", "cifar10", "cifar100", "imagefolder"] = Field(
        "digits", description="dataset; `digits` ships inside scikit-learn and needs no download"
    )
    root: str = Field("data", description="folder that holds the dataset")
    download: bool = Field(False, description="download the dataset into `root` when it is not there")
    batch_size: Annotated[int, Field(ge=2)] = Field(
        64, description="images a step over all workers together; the number of workers never changes it"
    )
    validation_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = Field(
        0.1, description="share of the training images held out for validation, fixed by the seed"
    )
    resolution: Annotated[int, Field(ge=8)] = Field(
        224, description="side of the square images in pixels; `imagefolder` only, the other sets have their own"
    )
    crop_padding: Annotated[int, Field(ge=0)] = Field(
        0, description="pixels of zero padding before a random crop back to size; small sets only"
    )
    flip: bool = Field(False, description="mirror half of the training images left to right")
    cutout: Annotated[int, Field(ge=0)] = Field(
        0, description="side in pixels of a random square set to the mean; small sets only, 0 is off"
    )
    loader_workers: Annotated[int, Field(ge=0)] = Field(
        2, description="loader processes per training worker; `imagefolder` only"
    )
    skip_bad: bool = Field(
        False, description="leave out images that cannot be decoded: decodes all before training; `imagefolder` only"
    )
    train_images: Count | None = Field(
        None, description="use only so many training images, drawn by the seed, balanced by class; null uses all"
    )

    @model_validator(mode="after")
    def _train_images_fill_a_batch(self) -> DataConfig:
        if self.train_images is not None and self.train_images < self.batch_size:
            raise ValueError(
                f"data.train_images = {self.train_images} is less than data.batch_size = {self.batch_size}; use at "
                "least one batch of images, or a smaller batch"
            )
        return self


class ModelConfig(Section):
    backbone: str = Field(
        "resnet20", description="a name from the backbone table, or `package.module:function` returning stages"
    )
    sharing: tuple[Count, ...] = Field(
        (1, 1, 2, 4, 4), min_length=1, description="copies per stage; the last entry is the number of peers M"
    )

    @model_validator(mode="after")
    def _sharing_is_a_tree(self) -> ModelConfig:
        for stage, (above, here) in enumerate(zip(self.sharing, self.sharing[1:], strict=False), start=1):
            if here % above:
                raise ValueError(
                    f"sharing {list(self.sharing)} is not a tree: entry {stage} ({here}) must be a multiple of the one "
                    f"before ({above}); for example [1, 1, 2, 4, 4], or [4, 4, 4, 4, 4] to share nothing"
                )
        return self


class PruningConfig(Section):
    ratios: tuple[Ratio, ...] = Field(
        (0.0, 0.2, 0.4, 0.6), min_length=1, description="share removed from each peer, one entry a peer; 0 is off"
    )
    unit: Literal["channels", "params", "macs"] = Field("channels", description="what the ratios count")
    min_channels: Count = Field(4, description="channels every layer keeps at least")
    round_to: Count = Field(1, description="keep multiples of this many channels (8 or 16 suits GPUs)")
    saliency_images: Annotated[int, Field(ge=2)] = Field(
        256, description="training images the SNIP saliency is taken on"
    )


class OptimConfig(Section):
    name: Literal["sgd", "adamw"] = Field("sgd", description="SGD with momentum, or AdamW")
    learning_rate: Positive = Field(0.1, description="peak learning rate")
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.9, description="SGD momentum")
    nesterov: bool = Field(True, description="Nesterov momentum (SGD)")
    weight_decay: NonNegative = Field(5e-4, description="weight decay on all parameters")
    epochs: Count = Field(30, description="passes over the training images")
    schedule: Literal["cosine", "multistep", "onecycle", "constant"] = Field(
        "cosine", description="course of the learning rate after the warm-up"
    )
    warmup_epochs: NonNegative = Field(0.0, description="epochs of linear warm-up from 0 to the peak")
    milestones: tuple[Count, ...] = Field((), description="epochs after which a multistep schedule decays")
    decay_factor: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.1, description="factor of a multistep decay at each milestone"
    )
    gradient_clip: NonNegative = Field(0.0, description="largest gradient norm; 0 is off")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="autocast type of the training step; float16 needs a GPU"
    )
    channels_last: bool = Field(True, description="store images channels-last, the faster layout")
    compile: bool = Field(False, description="run the training step through torch.compile")
    sync_batchnorm: bool = Field(
        False, description="take BatchNorm statistics over all workers, so that N workers equal one exactly"
    )

    @model_validator(mode="after")
    def _schedule_fits(self) -> OptimConfig:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"optim.warmup_epochs = {self.warmup_epochs} leaves nothing of optim.epochs = {self.epochs}; "
                "warm up for fewer epochs"
            )
        if self.schedule == "multistep" and not self.milestones:
            raise ValueError("optim.schedule = multistep needs optim.milestones, for example [15, 25]")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"optim.milestones = {list(self.milestones)} must increase, for example [15, 25]")
        return self


def _workers(value: Any) -> Any:
    numbers = value if isinstance(value, list) and len(value) == 2 else [value, value]
    ordered = all(type(number) is int for number in numbers) and numbers[0] <= numbers[1]
    if not ordered or numbers[0] < (1 if numbers is value else 0):
        raise ValueError(
            f"scale.workers = {value!r} must be 0 (this process), a number of workers, or [min, max] with "
            "1 <= min <= max, for example [1, 4]"
        )
    return value


class ScaleConfig(Section):
    workers: Annotated[int | list[int], BeforeValidator(_workers)] = Field(
        0, description="training workers: 0 trains in this process, N on N Ray workers, [min, max] is elastic"
    )
    gpu: bool = Field(False, description="one GPU a worker")
    cpus_per_worker: Count | None = Field(
        None, description="CPU threads a worker; null shares the cores evenly, and small images use one thread"
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        3, description="how often Ray restarts lost workers from the last checkpoint before giving up"
    )


class RunConfig(Section):
    storage_path: str = Field(
        "results", description="folder of all runs, or an address such as s3://bucket/folder; all nodes must see it"
    )
    name: Annotated[str, Field(pattern=NAME)] = Field(
        "wml", description="MLflow experiment and the folder of its runs; letters, digits, dot, dash, underscore"
    )
    keep_checkpoints: Count = Field(2, description="newest checkpoints kept; the best by validation is kept besides")
    test_epoch: Literal["last", "best"] = Field(
        "last", description="checkpoint the test accuracy is taken from: the last, or the best by validation"
    )
    system_metrics: bool = Field(False, description="log CPU, memory and GPU load to MLflow")


class Config(Section):
    """Everything a run is. Build it with `load` or `parse`; change it by making another."""

    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = Field(
        0, description="initialisation, splits, batch order and augmentation follow from it"
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    pruning: PruningConfig = PruningConfig()
    method: MethodConfig = MethodConfig()
    wml: WmlConfig = WmlConfig()
    dml: DmlConfig = DmlConfig()
    optim: OptimConfig = OptimConfig()
    scale: ScaleConfig = ScaleConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _one_ratio_a_peer(self) -> Config:
        if len(self.pruning.ratios) != self.num_peers:
            raise ValueError(
                f"pruning.ratios has {len(self.pruning.ratios)} entries but model.sharing = {list(self.model.sharing)} "
                f"makes {self.num_peers} peers; give one ratio a peer (0 leaves a peer whole)"
            )
        if self.optim.precision == "float16" and not self.scale.gpu:
            raise ValueError("optim.precision = float16 needs scale.gpu = true; on a CPU use bfloat16 or float32")
        return self

    @property
    def num_peers(self) -> int:
        return self.model.sharing[-1]

    @property
    def run_id(self) -> str:
        """Name of the run: dataset, backbone, and a hash of everything that determines its result.

        Storage, data folder, number of workers and the sections of other methods do not enter, so a run may move or
        scale and still find its own checkpoint.
        """
        dump = self.model_dump(mode="json", exclude=self._other_methods)
        dump["test_epoch"] = self.run.test_epoch
        del dump["scale"], dump["run"]
        for place_or_speed in ("root", "download", "loader_workers"):
            del dump["data"][place_or_speed]
        digest = hashlib.sha256(json.dumps(dump, sort_keys=True).encode()).hexdigest()[:10]
        backbone = self.model.backbone.rsplit(":", 1)[-1]
        return f"{self.data.name}-{backbone}-{digest}"

    @property
    def run_folder(self) -> Path:
        return to_path(self.run.storage_path) / self.run.name / self.run_id

    def flatten(self) -> dict[str, Any]:
        """Dotted keys to scalars (`wml.alpha`, `pruning.ratios.0`), the names of the MLflow params."""
        return dict(_flatten("", self.dump()))

    def dump(self) -> dict[str, Any]:
        """The config as JSON types, without sections of other methods that are at their defaults."""
        unused = {name for name in self._other_methods if getattr(self, name) == type(getattr(self, name))()}
        return self.model_dump(mode="json", exclude=unused)

    def to_yaml(self) -> str:
        return str(yaml.safe_dump(self.dump(), sort_keys=False))

    @property
    def method_settings(self) -> Section:
        """The section of the chosen method."""
        section: Section = getattr(self, self.method.name)
        return section

    @property
    def _other_methods(self) -> set[str]:
        return set(get_args(MethodName)) - {self.method.name}


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) or (isinstance(value, list) and value):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _flatten(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, value
