"""The one schema of a run: frozen, validated, and the only place where a setting is described."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

MAX_SEED = 2**31 - 1
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_STORAGE_OPTIONS: dict[str, Any] = {"use_listings_cache": False}  # other processes write there too
_OPTIONS_OF: dict[str, dict[str, Any]] = {"s3": {"config_kwargs": {"connect_timeout": 5}}}


class UserError(ValueError):
    """A mistake in what the user gave: one line with the key, the value, what is allowed and the mend."""


class DataMissing(UserError):
    """The dataset is not where the config says it is."""


Ratio = Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


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


class WmlConfig(Section):
    alpha: Share = Field(0.5, description="weight of mutual learning against the labels in Eq. 1")
    weights: Literal["learned", "fixed"] = Field(
        "learned", description="learn the peer weights omega by Eqs. 5 and 7, or keep them equal"
    )
    mirror_step_size: NonNegative = Field(0.1, description="mirror-descent step size eta of Eq. 7")
    inner_steps: Count = Field(20, description="training steps T between two updates of the peer weights")
    inner_step: NonNegative | None = Field(
        None, description="gamma of Eq. 5, the SGD step the gradient looks through; null is the current learning rate"
    )
    unroll: Literal["same_point", "exact"] = Field(
        "same_point", description="where Eq. 5 takes dL2/dtheta: at theta, or exactly at the stepped theta"
    )
    outer_data: Literal["train", "holdout"] = Field(
        "train", description="images of the outer loss: training images, or a slice kept out of training"
    )
    holdout_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = Field(
        0.1, description="share of the training images kept for the outer loss when outer_data is holdout"
    )
    temperature: Positive = Field(1.0, description="temperature tau of the KL term (multiplied by tau squared)")
    kl_direction: Literal["teacher_to_student", "student_to_teacher"] = Field(
        "teacher_to_student", description="KL(p_teacher || p_student), or the other way round"
    )
    stop_gradient_teacher: bool = Field(False, description="let no gradient flow into the teaching peer")


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
    cpus_per_worker: Count | None = Field(None, description="CPU threads a worker; null shares the cores evenly")
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
    wml: WmlConfig = WmlConfig()
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
        """Name of the run: a hash of everything that determines its result, behind two words for people.

        Where the run is stored, where the data lies and how many workers share the work do not enter, so a run may
        move or scale and still find its own checkpoint.
        """
        dump = self.model_dump(mode="json")
        dump["test_epoch"] = self.run.test_epoch
        del dump["scale"], dump["run"]
        for place_or_speed in ("root", "download", "loader_workers"):
            del dump["data"][place_or_speed]
        digest = hashlib.sha256(json.dumps(dump, sort_keys=True).encode()).hexdigest()[:10]
        backbone = self.model.backbone.rsplit(":", 1)[-1]
        return f"{self.data.name}-{backbone}-{digest}"

    @property
    def run_folder(self) -> Path:
        return place(self.run.storage_path) / self.run.name / self.run_id

    def flatten(self) -> dict[str, Any]:
        """Dotted keys to scalars (`wml.alpha`, `pruning.ratios.0`), the names of the MLflow params."""
        return dict(_flatten("", self.model_dump(mode="json")))

    def to_yaml(self) -> str:
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


def place(path: str | Path) -> Path:
    """A path of this machine; or of an address such as s3://bucket/folder, which has the same methods for files.

    Raises:
        UserError: an address of a kind that nobody knows.
    """
    if "://" not in str(path):
        return Path(path)
    from upath import UPath

    try:
        return cast(Path, UPath(path, **_STORAGE_OPTIONS, **_OPTIONS_OF.get(str(path).partition("://")[0], {})))
    except ValueError as error:
        raise UserError(
            f"'{path}' is no address of a storage ({error}); write s3://BUCKET/FOLDER, or a folder"
        ) from None


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) or (isinstance(value, list) and value):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _flatten(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, value


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `key=value` overrides.

    Raises:
        UserError: no such file, not YAML, an unknown key, or a value outside its range.
    """
    try:
        raw = yaml.safe_load(place(path).read_text())
    except OSError as error:
        raise UserError(
            f"config file {path}: {error.strerror or 'not there'}; give the path of a YAML file, see jobs/"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"config file {path} is not valid YAML: {' '.join(str(error).split())}; see jobs/ for examples"
        ) from error
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise UserError(f"config file {path} holds a {type(raw).__name__}; it must hold keys such as `seed: 0`")
    return parse(raw, overrides)


def parse(raw: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Validate nested settings, with `key=value` overrides applied on top.

    Raises:
        UserError: an unknown key, or a value outside its range.
    """
    merged = json.loads(json.dumps(raw, default=str))
    merged = {key: value for key, value in merged.items() if value is not None or key not in Config.model_fields}
    for override in overrides:
        _apply_override(merged, override)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise UserError(one_line(error, known_keys())) from None


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Another config, with dotted keys set to `values`.

    Raises:
        UserError: an unknown key, or a value outside its range.
    """
    raw = config.model_dump(mode="json")
    for key, value in values.items():
        _set(raw, key, value)
    return parse(raw)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override '{override}' must read key=value, for example wml.alpha=0.3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override '{override}': the value is not valid YAML") from error
    _set(raw, key, value)


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node: Any = raw
    for parent in parents:
        node = _child(node, parent, key)
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            raise UserError(f"unknown key '{key}': the list has entries 0 to {len(node) - 1}")
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"unknown key '{key}': {'.'.join(parents)} is a single value, it has no '{last}' inside")


def _child(node: Any, name: str, key: str) -> Any:
    if isinstance(node, dict):
        if name not in node and name in Config.model_fields:
            node[name] = {}
        if name not in node and name == "ratios":
            node[name] = list(PruningConfig().ratios)
        if name not in node and name == "sharing":
            node[name] = list(ModelConfig().sharing)
        if name in node:
            return node[name]
    raise UserError(f"unknown key '{key}'{_did_you_mean(key)}")


def known_keys() -> dict[str, Any]:
    """Every dotted config key and its pydantic field, in the order of the schema."""
    keys: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            keys.update({f"{name}.{key}": inner for key, inner in section.model_fields.items()})
        else:
            keys[name] = field
    return keys


def describe() -> str:
    """The table of config keys as Markdown: key, default, meaning."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for key, field in known_keys().items():
        default = yaml.safe_dump(field.default, default_flow_style=True).removesuffix("...\n").strip()
        rows.append(f"| `{key}` | `{default}` | {_choices(field)}{field.description} |")
    return "\n".join(rows)


def _choices(field: Any) -> str:
    options = getattr(field.annotation, "__args__", ())
    if options and all(isinstance(option, str) for option in options):
        return " \\| ".join(f"`{option}`" for option in options) + ": "
    return ""


def _did_you_mean(key: str) -> str:
    section = key.split(".")[0]
    siblings = [known for known in known_keys() if known.startswith(f"{section}.")]
    last_words = {known.rpartition(".")[2]: known for known in siblings or known_keys()}
    close = get_close_matches(key.rpartition(".")[2], last_words, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{last_words[close[0]]}'?"
    return f"; allowed: {', '.join(siblings or Config.model_fields)}"


def one_line(error: ValidationError, fields: Mapping[str, Any]) -> str:
    """The first mistake in one line; `fields` are the known (dotted) keys with their pydantic fields."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"] if not (isinstance(part, str) and "[" in part))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'{_did_you_mean(key)}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{message}{more}"
    field = fields.get(key) or fields.get(key.rpartition(".")[0])
    meaning = f" ({field.description})" if field is not None else ""
    return f"{key} = {first['input']!r}: {message[0].lower()}{message[1:]}{meaning}{more}"
