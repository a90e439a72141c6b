"""An exported network held against the network in PyTorch, on images of its validation split."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wml_ray.data.dataset import Dataset
from wml_ray.errors import UserError, one_line
from wml_ray.export.formats import Array, Format, Runner, torch_runner
from wml_ray.export.network import Network

MIN_IMAGES, MAX_IMAGES = 256, 2048
BATCH = 64
LATENCY_BATCHES = (1, 32)
LATENCY_REPEATS, LATENCY_S = 100, 1.0  # at most so many calls, and so long, three calls at least
MAX_LOGIT_DIFFERENCE = 1e-4  # of formats that compute in float32


@dataclass(frozen=True)
class Verification:
    """What an exported file computes, in its own runtime and with one CPU thread, against PyTorch."""

    images: int  # compared: the validation images, and training images where there are fewer than 256
    logit_difference: float  # the largest
    equal_predictions: float  # share
    validation_images: int
    accuracy: float  # on the validation images
    torch_accuracy: float
    latency_ms: dict[str, float]  # by the number of images in a batch: median of repeated calls
    torch_latency_ms: dict[str, float]
    bytes: int  # of the files


def verify(network: Network, exported: Format, folder: Path, dataset: Dataset) -> Verification:
    """Load the files in `folder` again and hold them against `network`.

    Raises:
        UserError: the runtime refuses the files.
    """
    try:
        run = exported.open(folder)
    except UserError:
        raise
    except Exception as error:  # runtimes raise many types; each means that the file is of no use
        raise UserError(
            f"the runtime of the exported {network.info.title} cannot load it ({one_line(error)}); nothing was kept: "
            "try another format with --to"
        ) from error
    images, labels, num_validation = _images(dataset)
    ours, theirs = (_logits(runner, images) for runner in (torch_runner(network), run))
    predicted, expected = theirs.argmax(-1), ours.argmax(-1)
    correct = (predicted == labels)[:num_validation], (expected == labels)[:num_validation]
    return Verification(
        images=len(images),
        logit_difference=float(np.abs(ours - theirs).max()),
        equal_predictions=float((predicted == expected).mean()),
        validation_images=num_validation,
        accuracy=float(correct[0].mean()),
        torch_accuracy=float(correct[1].mean()),
        latency_ms=_latencies(run, images),
        torch_latency_ms=_latencies(torch_runner(network), images),
        bytes=sum((folder / name).stat().st_size for name in exported.files),
    )


def check(network: Network, found: Verification, max_drop: float | None) -> None:
    """Check the limits: of the logits, or of the drop in accuracy of an int8 file if `max_drop` is given.

    Raises:
        UserError: a limit is missed.
    """
    if max_drop is None:
        if not found.logit_difference <= MAX_LOGIT_DIFFERENCE:
            raise UserError(
                f"the exported {network.info.title} differs from PyTorch by up to {found.logit_difference:.2g} in its "
                f"logits, more than {MAX_LOGIT_DIFFERENCE:g}; nothing was kept: try another format with --to"
            )
    elif found.torch_accuracy - found.accuracy > max_drop:
        raise UserError(
            f"in int8, {network.info.title} has {found.accuracy:.2%} instead of {found.torch_accuracy:.2%} on "
            f"{found.validation_images:,} validation images, more than --max-drop {max_drop:g} below; nothing was "
            "kept: export it without --int8, or allow a larger drop"
        )


def calibration_images(dataset: Dataset, count: int) -> Array:
    """`count` training images (fewer if there are fewer), spread over the split."""
    return _pixels(dataset, dataset.splits["train"], count)[0]


def _images(dataset: Dataset) -> tuple[Array, Array, int]:
    """Images to compare on and their labels; the validation images, whose number is the third, are first."""
    images, labels = _pixels(dataset, dataset.splits["validation"], MAX_IMAGES)
    num_validation = len(images)
    if num_validation < MIN_IMAGES:
        more = _pixels(dataset, dataset.splits["train"], MIN_IMAGES - num_validation)
        images, labels = np.concatenate([images, more[0]]), np.concatenate([labels, more[1]])
    return images, labels, num_validation


def _pixels(dataset: Dataset, split: torch.Tensor, count: int) -> tuple[Array, Array]:
    """At most `count` images of a split, evenly spread, as a folder of images is ordered by class."""
    positions = torch.linspace(0, len(split) - 1, min(count, len(split))).round().long()
    images, labels = dataset.pixels(split[positions])
    return images.cpu().numpy(), labels.cpu().numpy()


def _logits(run: Runner, images: Array) -> Array:
    return np.concatenate([run(images[start : start + BATCH]) for start in range(0, len(images), BATCH)])


def _latencies(run: Runner, images: Array) -> dict[str, float]:
    return {str(size): _latency_ms(run, images[:size]) for size in LATENCY_BATCHES}


def _latency_ms(run: Runner, batch: Array) -> float:
    run(batch)
    times_s: list[float] = []
    while len(times_s) < 3 or (len(times_s) < LATENCY_REPEATS and sum(times_s) < LATENCY_S):
        start_s = time.perf_counter()
        run(batch)
        times_s.append(time.perf_counter() - start_s)
    return 1000 * statistics.median(times_s)


def rows(found: Verification) -> list[tuple[str, Any]]:
    """The verification as (name, value) pairs for a table."""
    accuracy = f"{found.accuracy:.2%} of {found.validation_images:,} images, in PyTorch {found.torch_accuracy:.2%}"
    return [
        ("largest difference of logits", f"{found.logit_difference:.2g} on {found.images:,} images"),
        ("equal predictions", f"{found.equal_predictions:.2%}"),
        ("validation accuracy", accuracy),
        *((f"latency, batch {size}", _against(found, size)) for size in found.latency_ms),
        ("size", f"{found.bytes:,} bytes"),
    ]


def _against(found: Verification, size: str) -> str:
    return f"{found.latency_ms[size]:.3f} ms, in PyTorch {found.torch_latency_ms[size]:.3f} ms"
