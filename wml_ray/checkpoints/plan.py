"""What the `plan.json` of a checkpoint must hold for its run to be resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from wml_ray.errors import shortened


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Entry(_Part):
    epoch: int
    timestamp_ms: int
    metrics: dict[str, float]


class _Costs(_Part):
    channels: int
    params: int
    macs: int
    channels_drop: float
    params_drop: float
    macs_drop: float


class _Tree(_Part):
    params: int
    macs: int


class _Normalisation(_Part):
    mean: Sequence[float]
    std: Sequence[float]


class _Plan(_Part):
    format: Literal[1]
    run_id: str
    config: dict[str, Any]
    selects: str
    sharing: Sequence[int]
    image_spec: dict[str, int]
    skipped_images: list[str]
    normalisation: _Normalisation
    channels: dict[str, list[int]]
    peers: list[_Costs]
    tree: _Tree
    trainer_layout: str
    created_ms: int
    epoch: int
    metrics: dict[str, float]
    history: list[_Entry]
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    peak_memory_bytes: int = 0
    teacher: dict[str, Any] | None = None


def check_plan(metadata: Mapping[str, Any], state: Mapping[str, Tensor], metrics: Collection[str], peers: int) -> None:
    """Check that a checkpoint's metadata are whole: each key and its type, one entry an epoch with at least these
    metrics, the costs of each peer, and the layout of the trainer's tensors.

    Raises:
        ValueError: they are not; the message names the key.
    """
    try:
        _Plan.model_validate(metadata)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(map(str, problem["loc"]))
        raise ValueError(f"plan.json: {shortened(key)}: {problem['msg'].lower()}") from None
    history = metadata["history"]
    if [entry["epoch"] for entry in history] != list(range(1, metadata["epoch"] + 1)):
        raise ValueError(f"plan.json: history does not have the epochs 1 to {metadata['epoch']}")
    for entry in history:
        if missing := set(metrics) - entry["metrics"].keys():
            raise ValueError(f"plan.json: history: epoch {entry['epoch']} has no {min(missing)}")
    if len(metadata["peers"]) != peers:
        raise ValueError(f"plan.json: peers: there are {len(metadata['peers'])}, not {peers}")
    if metadata["trainer_layout"] != layout(state):
        raise ValueError("trainer.safetensors: names, shapes or dtypes are not those of plan.json")


def layout(tensors: Mapping[str, Tensor]) -> str:
    """A digest of the names, shapes and dtypes of tensors."""
    lines = [f"{name} {tuple(tensor.shape)} {tensor.dtype}\n" for name, tensor in sorted(tensors.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
