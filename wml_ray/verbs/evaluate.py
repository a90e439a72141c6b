"""The verb `evaluate` as a function: the networks of a run on its test images, or on a folder of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wml_ray.data.images import labelled_images
from wml_ray.data.load import load_dataset
from wml_ray.export.images import pixels_of
from wml_ray.export.network import Network, NetworkInfo, checked_choice, network_name
from wml_ray.report.evaluation import Array, Evaluation, agreement, evaluate_logits
from wml_ray.verbs.run import Run

if TYPE_CHECKING:
    import pandas as pd

BATCH = 64
Batches = Iterator[tuple[Tensor, Tensor]]
"""Pixels (B, C, H, W) and labels (B,)."""

OnImages = Callable[[int, int], None]
"""Called with the numbers of images done and to be done."""


class EvaluationResult(NamedTuple):
    """The evaluation of each network, and the share of images on which each pair of peers agrees."""

    networks: list[Evaluation]
    agreement: pd.DataFrame


def evaluate(
    run: Run,
    data: str | Path | None = None,
    networks: Sequence[int | str] | None = None,
    epoch: int | None = None,
    on_images: OnImages | None = None,
) -> EvaluationResult:
    """Evaluate networks of a run on its test images, or on a folder `data` with a folder of images for each class.

    `networks` are numbers of peers and `ensemble`, `average` or `weighted`; all peers and the ensemble by default. The
    agreement is that of all peers. Images of a folder may have any size; they are rotated, resized and cropped as the
    run's test images were.

    Raises:
        UserError: no such peer, epoch or folder, a class of the folder is none of the run's, or an unreadable
            image.
    """
    whole = run.ensemble(epoch=epoch)  # its tree holds all peers, and runs once for all that is evaluated
    weights = [_weights(whole, choice) for choice in networks or [*range(whole.tree.num_peers), "ensemble"]]
    total, batches = _folder(Path(data), whole.info) if data else _test_images(whole.info)
    logits_MNK, labels_N = _run(whole, batches, total, on_images)
    found = [
        evaluate_logits(name, whole.classes, np.einsum("m,mnk->nk", weights_M, logits_MNK), labels_N)
        for name, weights_M in weights
    ]
    peers = {f"peer{index}": logits_NK.argmax(-1) for index, logits_NK in enumerate(logits_MNK)}
    return EvaluationResult(found, agreement(peers))


def _weights(whole: Network, choice: int | str) -> tuple[str, Array]:
    """The name of a network, and the weights (M,) of the peers' logits in its own. `whole` is the default ensemble."""
    choice, num_peers = checked_choice(whole.info.config, choice), whole.tree.num_peers
    if isinstance(choice, int):
        return network_name(choice), np.eye(num_peers, dtype=np.float32)[choice]
    equal = np.full(num_peers, 1 / num_peers, dtype=np.float32)
    return network_name(choice), whole.weights_M.numpy() if choice == "weighted" else equal


def _run(whole: Network, batches: Batches, total: int, on_images: OnImages | None) -> tuple[Array, Array]:
    """Logits (M, N, K) of all peers, and labels (N,)."""
    logits, labels, done = [], [], 0
    for images, targets in batches:
        with torch.no_grad():
            logits.append(whole.peer_logits(images).numpy())
        labels.append(targets.numpy())
        done += len(targets)
        if on_images:
            on_images(done, total)
    return np.concatenate(logits, axis=1), np.concatenate(labels)


def _test_images(info: NetworkInfo) -> tuple[int, Batches]:
    """Number and batches of the run's test images."""
    dataset = load_dataset(info.config, skipped=info.plan["skipped_images"])
    indices = dataset.splits["test"]
    return len(indices), (dataset.pixels(part) for part in indices.split(BATCH))


def _folder(folder: Path, info: NetworkInfo) -> tuple[int, Batches]:
    """Number and batches of the images in a folder of class folders."""
    samples = labelled_images(folder, info.classes)

    def batches() -> Batches:
        for start in range(0, len(samples), BATCH):
            part = samples[start : start + BATCH]
            pixels = [pixels_of(path, info.config.data, info.spec) for path, _ in part]
            yield torch.stack(pixels), torch.tensor([label for _, label in part])

    return len(samples), batches()
