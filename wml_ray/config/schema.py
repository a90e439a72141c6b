"""The schema of a run's settings: types, ranges, defaults and descriptions, from which their documentation is made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, model_validator

from wml_ray.config.model import MAX_PEERS, ModelConfig
from wml_ray.config.nested import flatten, functions_named_in
from wml_ray.config.scale import ScaleConfig
from wml_ray.errors import shortened
from wml_ray.methods import settings as methods
from wml_ray.methods.feature_settings import (
    BocKdConfig,
    FflConfig,
    FfsdConfig,
    OkddipConfig,
    OneConfig,
    PclConfig,
    SelfDistillationConfig,
)
from wml_ray.methods.settings import is_own_method, unused_sections
from wml_ray.settings import (
    MAX_INTEGER,
    NAME,
    Address,
    Count,
    CountOrZero,
    NonNegative,
    Positive,
    Ratio,
    Section,
    Text,
)
from wml_ray.storage.paths import to_path

MAX_PIXELS = 100_000_000


class DataConfig(Section):
    """The dataset, its splits, and the augmentation."""

    name: Literal["digits", "fashion_mnist", "cifar10", "cifar100", "imagefolder", "shards"] = Field(
        "digits", description="dataset; `digits` is part of scikit-learn and needs no download"
    )
    root: Address = Field(
        "data", description="folder of the dataset; of `shards` also an address such as s3://bucket/set"
    )
    download: bool = Field(False, description="download the dataset into `data.root` if it is not there")
    batch_size: Annotated[Count, Field(ge=2, le=2**16)] = Field(
        64, description="images per training step, summed over all workers; from 2 to 65,536"
    )
    validation_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = Field(
        0.1,
        description="share of the training images used for validation instead, drawn by the seed; between 0 and 0.5",
    )
    resolution: Annotated[Count, Field(ge=8, le=4096)] = Field(
        224,
        description="width and height of the images in pixels, from 8 to 4,096; `imagefolder` and `shards` only",
    )
    crop_padding: Annotated[CountOrZero, Field(le=64)] = Field(
        0,
        description="pixels of zero padding, at most 64, before a random crop to the original size; 0 is off; not for "
        "`imagefolder` or `shards`",
    )
    flip: bool = Field(False, description="mirror half of the training images horizontally, at random")
    cutout: Annotated[CountOrZero, Field(le=4096)] = Field(
        0,
        description="side in pixels of a random square that is set to the mean; 0 is off; not for `imagefolder` "
        "or `shards`",
    )
    loader_workers: Annotated[CountOrZero, Field(le=256)] = Field(
        2, description="processes that load images, per training worker, at most 256; `imagefolder` and `shards` only"
    )
    skip_bad: bool = Field(
        False, description="leave out images that cannot be decoded: decodes all before training; `imagefolder` only"
    )
    max_pixels: Count = Field(
        MAX_PIXELS,
        description="images with more pixels are refused by their header, unread; `imagefolder` and `shards` only",
    )
    cache_gb: NonNegative = Field(
        10.0, description="largest size in GB of the local copies of remote `shards` on a node; 0 keeps none"
    )
    cache_path: Text = Field("~/.cache", description="folder on each node that holds these copies")
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


def _number_or_auto(value: Any) -> Any:
    if value == "auto" or (type(value) is int and 1 <= value <= MAX_INTEGER):
        return value
    raise ValueError(f"pruning.round_to = {shortened(repr(value))} must be a whole number from 1 on, or auto")


class PruningConfig(Section):
    """The share removed from each peer at initialisation."""

    ratios: tuple[Ratio, ...] = Field(
        (0.0, 0.2, 0.4, 0.6),
        min_length=1,
        max_length=MAX_PEERS,
        description="share removed from each peer, from 0 to below 1, one entry per peer; 0 keeps the peer whole",
    )
    unit: Literal["channels", "params", "macs"] = Field("channels", description="unit that the ratios are shares of")
    min_channels: Count = Field(4, description="fewest channels that a layer keeps")
    round_to: Annotated[Count | Literal["auto"], BeforeValidator(_number_or_auto)] = Field(
        1,
        description="number of which every layer keeps a multiple of channels; `auto`: 16, the width that fills the "
        "kernels of CPUs and GPUs, in layers that keep at least 16, and any number in narrower ones",
    )
    saliency_images: Annotated[Count, Field(ge=2, le=2**16)] = Field(
        256, description="training images for the saliency that decides which channels are removed; from 2 to 65,536"
    )


class OptimConfig(Section):
    """The optimiser, its schedule, and the arithmetic of the training step."""

    name: Literal["sgd", "adamw"] = Field("sgd", description="optimizer")
    learning_rate: Annotated[Positive, Field(le=100.0)] = Field(
        0.1, description="learning rate after the warm-up, above 0, at most 100"
    )
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.9, description="momentum of `sgd`, from 0 to below 1")
    nesterov: bool = Field(True, description="Nesterov momentum for `sgd`")
    weight_decay: Annotated[NonNegative, Field(le=10.0)] = Field(
        5e-4, description="weight decay of all parameters, from 0 to 10"
    )
    epochs: Annotated[Count, Field(le=100_000)] = Field(
        30, description="passes over the training images, at most 100,000"
    )
    schedule: Literal["cosine", "multistep", "onecycle", "constant"] = Field(
        "cosine", description="schedule of the learning rate after the warm-up"
    )
    warmup_epochs: NonNegative = Field(
        0.0, description="epochs in which the learning rate rises linearly from 0, fewer than `optim.epochs`"
    )
    milestones: tuple[Count, ...] = Field(
        (), max_length=100, description="increasing epochs after which `multistep` lowers the learning rate"
    )
    decay_factor: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.1, description="factor on the learning rate at each milestone of `multistep`, between 0 and 1"
    )
    gradient_clip: NonNegative = Field(0.0, description="largest norm of the gradient; 0 is off")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="floating-point type of the training step; `auto` is bfloat16 where the device computes it "
        "natively, else float32; `float16` needs a GPU",
    )
    channels_last: bool = Field(True, description="memory layout with channels last, which is faster")
    compile: bool = Field(False, description="compile the training step with torch.compile")
    sync_batchnorm: bool = Field(
        False,
        description="compute BatchNorm statistics over all workers: any number of workers gives the same result",
    )

    @model_validator(mode="after")
    def _schedule_fits(self) -> OptimConfig:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"optim.warmup_epochs = {self.warmup_epochs} must be less than optim.epochs = "
                f"{self.epochs}; warm up for fewer epochs"
            )
        if self.schedule == "multistep" and not self.milestones:
            raise ValueError("optim.schedule = multistep needs optim.milestones, for example [15, 25]")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(
                f"optim.milestones = {shortened(list(self.milestones))} must increase, for example [15, 25]"
            )
        return self


class RunConfig(Section):
    """Storage, name, checkpoints and tracking of a run."""

    storage_path: Address = Field(
        "results", description="folder of all runs, or an address such as s3://bucket/folder, that all nodes can reach"
    )
    name: Annotated[str, Field(pattern=NAME)] = Field(
        "wml",
        description="MLflow experiment and folder of its runs: a name of letters, digits, dot, dash, underscore",
    )
    keep_checkpoints: Count = Field(
        2, description="number of newest checkpoints to keep; the best by validation is kept too"
    )
    test_epoch: Literal["last", "best"] = Field(
        "last", description="epoch whose checkpoint is tested: the last, or the best by validation"
    )
    system_metrics: bool = Field(False, description="log the load of CPU, memory and GPU to MLflow")
    study: str | None = Field(
        None,
        max_length=200,
        description="study and trial that this config comes from, such as wml-smoke/7; set by `wml-ray tune`",
    )


class Config(Section):
    """All settings of a run. Made by `load_config` or `parse_config`; `with_values` makes a changed copy."""

    seed: Annotated[int, Field(ge=0, le=MAX_INTEGER)] = Field(
        0, description="seed of initialisation, splits, batch order and augmentation"
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    pruning: PruningConfig = PruningConfig()
    method: methods.MethodConfig = methods.MethodConfig()
    teacher: methods.TeacherConfig = methods.TeacherConfig()
    wml: methods.WmlConfig = methods.WmlConfig()
    independent: methods.IndependentConfig = methods.IndependentConfig()
    dml: methods.DmlConfig = methods.DmlConfig()
    cl_ilr: methods.ClIlrConfig = methods.ClIlrConfig()
    one: OneConfig = OneConfig()
    okddip: OkddipConfig = OkddipConfig()
    pcl: PclConfig = PclConfig()
    ffl: FflConfig = FflConfig()
    ffsd: FfsdConfig = FfsdConfig()
    kdcl: methods.KdclConfig = methods.KdclConfig()
    kd: methods.KdConfig = methods.KdConfig()
    peer_to_peer: methods.PeerToPeerConfig = methods.PeerToPeerConfig()
    rkd: methods.RkdConfig = methods.RkdConfig()
    fitnets: methods.FitnetsConfig = methods.FitnetsConfig()
    ctsl_mkt: methods.CtslMktConfig = methods.CtslMktConfig()
    self_distillation: SelfDistillationConfig = SelfDistillationConfig()
    boc_kd: BocKdConfig = BocKdConfig()
    optim: OptimConfig = OptimConfig()
    scale: ScaleConfig = ScaleConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _one_ratio_a_peer(self) -> Config:
        if len(self.pruning.ratios) != self.num_peers:
            raise ValueError(
                f"pruning.ratios has {len(self.pruning.ratios)} entries but model.sharing = "
                f"{shortened(list(self.model.sharing))} makes {self.num_peers} peers; give one ratio per peer "
                "(0 keeps a peer whole)"
            )
        if self.optim.precision == "float16" and not self.scale.gpu:
            raise ValueError("optim.precision = float16 needs scale.gpu = true; on a CPU use bfloat16 or float32")
        self.teacher.check(self.method.name)
        return self

    @property
    def num_peers(self) -> int:
        """The number of peers M."""
        return self.model.sharing[-1]

    @property
    def run_id(self) -> str:
        """Name of the run: dataset, backbone, and a hash of everything that determines its result.

        Storage, data folder, number of workers and unused sections do not enter, so a run may move or scale and still
        find its own checkpoint; `teacher.run` enters by its last part, so that the teacher may move too, and
        `model.pretrained` by its content.

        Raises:
            UserError: the file `model.pretrained` cannot be read.
        """
        dump = self.model_dump(mode="json", exclude=unused_sections(self.method.name))
        if "teacher" in dump:
            dump["teacher"]["run"] = self.teacher.run_id
        if not is_own_method(self.method.name):
            del dump["method"]["settings"]
        dump["model"]["pretrained"] = self.model.pretrained_digest
        dump["test_epoch"] = self.run.test_epoch
        del dump["scale"], dump["run"]
        if not self.model.exits:
            del dump["model"]["exits"]
        for key in ("root", "download", "loader_workers", "cache_gb", "cache_path"):
            del dump["data"][key]
        digest = hashlib.sha256(json.dumps(dump, sort_keys=True).encode()).hexdigest()[:10]
        backbone = self.model.backbone.rsplit(":", 1)[-1]
        return f"{self.data.name}-{backbone}-{digest}"

    @property
    def run_folder(self) -> Path:
        """The folder of the run, `<storage_path>/<name>/<run_id>`."""
        return to_path(self.run.storage_path) / self.run.name / self.run_id

    def flatten(self) -> dict[str, Any]:
        """Dotted keys to scalars (`wml.alpha`, `pruning.ratios.0`), the names of the MLflow params."""
        return dict(flatten("", self.dump()))

    def dump(self) -> dict[str, Any]:
        """The config as JSON types, without unused sections that are at their defaults."""
        sections = unused_sections(self.method.name)
        unused = {name for name in sections if getattr(self, name) == type(getattr(self, name))()}
        dump = self.model_dump(mode="json", exclude=unused)
        if not self.method.settings:
            del dump["method"]["settings"]
        return dump

    def to_yaml(self) -> str:
        """The config as YAML, as `dump` gives it."""
        return str(yaml.safe_dump(self.dump(), sort_keys=False))

    @property
    def method_settings(self) -> Section | dict[str, Any]:
        """The section of the chosen method; of a user's own, `method.settings`, which its class validates."""
        if is_own_method(self.method.name):
            return self.method.settings
        section: Section = getattr(self, self.method.name)
        return section

    @property
    def user_functions(self) -> dict[str, str]:
        """The keys that name a user's own `package.module:function`, and these names."""
        return functions_named_in(self.model_dump(mode="json"))
