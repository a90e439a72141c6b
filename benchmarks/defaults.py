"""The experiment behind the defaults of WML: variants of its loss against no distillation, paired by seed.

python benchmarks/defaults.py run [PART/PARTS]    train what defaults.csv does not hold yet, or one part of it
python benchmarks/defaults.py table               print the recorded runs: differences to `none`, 95 % intervals

A run trains one tree on a subset. Learning rates and defaults are chosen on the validation images; the table shows the
test images. Fashion-MNIST is that of Debian's `dataset-fashion-mnist`, averaged down to 14 x 14 pixels.
"""

from __future__ import annotations

import csv
import itertools
import math
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import t as student_t
from torch import Tensor

from wml_ray.config.load import parse_config
from wml_ray.config.schema import Config
from wml_ray.data.dataset import Dataset
from wml_ray.data.in_memory import InMemoryDataset
from wml_ray.data.load import load_dataset
from wml_ray.data.readers import read_images
from wml_ray.data.splits import make_splits
from wml_ray.networks.cnn import cifar_resnet
from wml_ray.networks.spec import ImageSpec, Stages
from wml_ray.training.events import EpochEnd, StepProgress
from wml_ray.training.start import build_method, initial_checkpoint
from wml_ray.training.trainer import Trainer

RECORD = Path(__file__).with_suffix(".csv")
QUANTITIES = ("peers", "smallest", "average", "method")
COLUMNS = ("cell", "variant", "seed", "seconds", *(f"{s}_{q}" for s in ("val", "test") for q in QUANTITIES), "omega")
BASELINE, DEFAULTS = "none", "defaults"
BY_VALIDATION = "omega by validation accuracy"  # acc / (1 - acc) of each peer, after each epoch

DATA = {
    "digits": {"name": "digits", "crop_padding": 1},
    "fashion": {
        "name": "fashion_mnist",
        "root": "/usr/share/datasets/fashion-mnist",
        "validation_fraction": 0.05,
        "crop_padding": 1,
        "flip": True,
    },
}


def resnet8(spec: ImageSpec) -> Stages:
    """One block a stage: a third of the time of ResNet-20, for the many runs of a grid."""
    return cifar_resnet(spec, depth=8)


@dataclass(frozen=True)
class Cell:
    """A task: dataset, budget, tree and ratios."""

    data: str
    epochs: int
    sharing: tuple[int, ...] = (1, 1, 2, 4, 4)
    ratios: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6)
    unit: str = "channels"
    images: int = 6000  # of Fashion-MNIST

    @property
    def name(self) -> str:
        """Its name in the table."""
        tree = "separate" if self.sharing[0] > 1 else "tree"
        images = f" {self.images:,} images" if self.data == "fashion" else ""
        family = f"M = {self.sharing[-1]} {tree}, -{self.ratios[-1]:.0%} {self.unit}"
        return f"{self.data}{images}, {self.epochs} epochs, {family}"

    def config(self, overrides: str, seed: int) -> Config:
        """The config of one run."""
        raw: dict[str, Any] = {
            "seed": seed,
            "data": DATA[self.data] | {"batch_size": 64},
            "model": {"backbone": "defaults:resnet8", "sharing": list(self.sharing)},
            "pruning": {"ratios": list(self.ratios), "unit": self.unit},
            "optim": {"epochs": self.epochs},
        }
        if self.data == "fashion":
            raw["data"]["train_images"] = self.images
        return parse_config(raw, overrides.split())


def settings(**changed: object) -> str:
    """Overrides that set every key in question, so that later defaults change no recorded variant."""
    values: dict[str, object] = {
        "wml.balance": "peer",
        "wml.alpha": 0.3,
        "wml.temperature": 3,
        "wml.stop_gradient_teacher": "true",
        "wml.kl_direction": "teacher_to_student",
        "wml.weigh_labels": "true",
        "wml.weights": "fixed",
        "wml.mirror_step_size": 0.1,
        "wml.update_every": 20,
        "wml.ramp": 0,
        "wml.outer_data": "train",
        "wml.outer_share": 1,
        "wml.own_views": "false",
        "model.trunk_gradient": "sum",
        "optim.learning_rate": 0.1,
        "optim.precision": "float32",
    }
    values |= {
        f"wml.{key}" if f"wml.{key}" in values else key.replace("__", "."): value for key, value in changed.items()
    }
    return " ".join(f"{key}={value}" for key, value in values.items())


WML = {"alpha": 0.2, "weights": "learned", "weigh_labels": "false"}
VARIANTS = {
    f"{name}{f', lr {rate}' if rate != 0.1 else ''}": settings(**changed, optim__learning_rate=rate)
    for rate in (0.1, 0.05, 0.2, 0.4)
    for name, changed in {
        BASELINE: {"alpha": 0},
        "none, mean trunk": {"alpha": 0, "model__trunk_gradient": "mean"},
        "alpha 0.1": {"alpha": 0.1},
        "alpha 0.2": {"alpha": 0.2},
        "alpha 0.3": {},
        "alpha 0.5": {"alpha": 0.5},
        "alpha 0.2, tau 1": {"alpha": 0.2, "temperature": 1},
        "alpha 0.3, tau 1": {"temperature": 1},
        "alpha 0.5, tau 1": {"alpha": 0.5, "temperature": 1},
        "alpha 0.3, tau 2": {"temperature": 2},
        "alpha 0.3, not detached": {"stop_gradient_teacher": "false"},
        "alpha 0.3, reverse KL": {"kl_direction": "student_to_teacher"},
        "alpha 0.3, ramp 0.3": {"ramp": 0.3},
        "alpha 0.5, ramp 0.3": {"alpha": 0.5, "ramp": 0.3},
        "alpha 0.3, mean trunk": {"model__trunk_gradient": "mean"},
        "alpha 0.2, reverse KL": {"alpha": 0.2, "kl_direction": "student_to_teacher"},
        "none, own views": {"alpha": 0, "own_views": "true"},
        "alpha 0.2, own views": {"alpha": 0.2, "own_views": "true"},
        DEFAULTS: WML,
        "defaults, eta 1": WML | {"mirror_step_size": 1},
        "defaults, eta 10": WML | {"mirror_step_size": 10},
        "defaults, T 5": WML | {"update_every": 5},
        "defaults, T 80": WML | {"update_every": 80},
        "defaults, outer share 0.25": WML | {"outer_share": 0.25},
        "defaults, bfloat16": WML | {"optim__precision": "bfloat16"},
        "defaults, bfloat16, outer share 0.25": WML | {"outer_share": 0.25, "optim__precision": "bfloat16"},
        "defaults, holdout": WML | {"outer_data": "holdout"},
        "alpha 0.2, labels not weighed": {"alpha": 0.2, "weigh_labels": "false"},
        BY_VALIDATION: {"alpha": 0.2, "weigh_labels": "false"},
        "alpha 0.3, learned": {"weights": "learned"},
        "alpha 0.3, learned, labels not weighed": {"weights": "learned", "weigh_labels": "false"},
        "Eq. 1, alpha 0.5": {
            "balance": "paper",
            "alpha": 0.5,
            "temperature": 1,
            "stop_gradient_teacher": "false",
            "weights": "learned",
        },
    }.items()
}

TREE_4, TREE_2, TREE_8 = (1, 1, 2, 4, 4), (1, 1, 2, 2, 2), (1, 1, 4, 8, 8)
MILD_4, MILD_2, MILD_8 = (0.0, 0.2, 0.4, 0.6), (0.0, 0.5), (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6)
# A shared copy keeps what its whole peer needs, so a tree cannot lose 0.9 of a peer's MACs; separate networks can.
DEEP_4, DEEP_2, DEEP_8 = (0.0, 0.4, 0.6, 0.7), (0.0, 0.7), (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7)
EXTREME_4, EXTREME_2, EXTREME_8 = (0.0, 0.5, 0.75, 0.9), (0.0, 0.9), (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9)
SCREEN, LONG, FEW = Cell("fashion", 10), Cell("fashion", 30), Cell("fashion", 30, images=2000)
FAMILIES = (
    (TREE_4, MILD_4),
    ((4,) * 5, MILD_4),
    ((4,) * 5, EXTREME_4, "macs"),
    (TREE_2, MILD_2),
    ((2,) * 5, EXTREME_2, "macs"),
    (TREE_8, MILD_8),
)
ON_DIGITS_ONLY = (
    (TREE_4, DEEP_4),
    (TREE_2, DEEP_2),
    ((2,) * 5, MILD_2),
    (TREE_8, DEEP_8),
    ((8,) * 5, MILD_8),
    ((8,) * 5, EXTREME_8, "macs"),
)
GRID = [
    *(Cell("digits", epochs, *family) for epochs in (30, 10) for family in FAMILIES),
    *(Cell("fashion", epochs, *family, images=2000) for epochs in (30, 10) for family in FAMILIES),
    *(Cell("digits", epochs, *family) for epochs in (30, 10) for family in ON_DIGITS_ONLY),
]
AXES = (
    "none, own views",
    "alpha 0.2, own views",
    "none, lr 0.2",
    "alpha 0.2",
    "alpha 0.2, reverse KL",
    "alpha 0.2, labels not weighed",
    "defaults, eta 1",
    "defaults, eta 10",
    "defaults, holdout",
    "defaults, outer share 0.25",
    "defaults, bfloat16",
    BY_VALIDATION,
    "alpha 0.3, learned",
    "defaults, lr 0.2",
    "none, lr 0.4",
    "defaults, lr 0.4",
    "none, own views, lr 0.2",
    "alpha 0.2, own views, lr 0.2",
    "none, lr 0.05",
    "defaults, lr 0.05",
    "none, mean trunk, lr 0.2",
    "alpha 0.3, mean trunk",
    "alpha 0.3, not detached",
    "alpha 0.5, ramp 0.3",
    "alpha 0.5",
    "Eq. 1, alpha 0.5",
    "defaults, T 5",
    "defaults, T 80",
    "defaults, bfloat16, outer share 0.25",
)
SEEDS = (0, 1, 2)
PLAN: list[tuple[Cell, tuple[str, ...], tuple[int, ...]]] = [
    *((cell, (BASELINE, DEFAULTS), SEEDS) for cell in GRID[:18]),
    (FEW, AXES, SEEDS),
    *((cell, (BASELINE, DEFAULTS), SEEDS) for cell in GRID[18:]),
]


def run(cell: Cell, variant: str, seed: int) -> dict[str, Any]:
    """Train one tree, and return its row of the record."""
    config = cell.config(VARIANTS[variant], seed)
    dataset = _dataset(config)
    start = initial_checkpoint(config, dataset)
    trainer = Trainer(
        config, build_method(config, dataset.spec, start.metadata["channels"]), dataset, torch.device("cpu")
    )
    trainer.load_state(start.model, start.state)
    ends: list[EpochEnd] = []

    def report(event: StepProgress | EpochEnd) -> None:
        if isinstance(event, EpochEnd):
            ends.append(event)
            if variant == BY_VALIDATION:
                odds_M = torch.tensor([(a + 1e-3) / (1 - a + 1e-3) for a in _peers(event.metrics, "val")])
                trainer.method.log_weights_M.copy_((odds_M / odds_M.sum()).log())

    start_s = time.perf_counter()
    trainer.fit(report)
    row: dict[str, Any] = {"cell": cell.name, "variant": variant, "seed": seed}
    row["seconds"] = round(time.perf_counter() - start_s, 1)
    for split, metrics in (("val", ends[-1].metrics), ("test", trainer.evaluate("test"))):
        peers = _peers(metrics, split)
        found = (
            statistics.fmean(peers),
            peers[-1],
            *(metrics[f"{split}/accuracy/{n}"] for n in ("ensemble_average", "method")),
        )
        row |= {f"{split}_{quantity}": round(value, 5) for quantity, value in zip(QUANTITIES, found, strict=True)}
    row["omega"] = " ".join(f"{value:.3f}" for name, value in ends[-1].metrics.items() if name.startswith("weights/"))
    return row


def _peers(metrics: Mapping[str, float], split: str) -> list[float]:
    return [value for name, value in metrics.items() if name.startswith(f"{split}/accuracy/peer")]


def _dataset(config: Config) -> Dataset:
    if config.data.name == "digits":
        return load_dataset(config)
    images, labels, num_train = _small_fashion()
    splits = make_splits(config, labels, num_train, len(labels) - num_train)
    return InMemoryDataset(config, ImageSpec(1, 14, 10), splits, images, labels, torch.device("cpu"))


@cache
def _small_fashion() -> tuple[Tensor, Tensor, int]:
    pixels, classes, num_train = read_images(SCREEN.config("", 0).data)
    parts = torch.from_numpy(pixels).split(10_000)
    return (
        torch.cat([F.avg_pool2d(part.float(), 2).round().byte() for part in parts]),
        torch.from_numpy(classes),
        num_train,
    )


def recorded() -> list[dict[str, str]]:
    """The rows of defaults.csv."""
    if not RECORD.exists():
        return []
    with RECORD.open(newline="") as file:
        return list(csv.DictReader(file))


def run_plan(part: int, parts: int) -> None:
    """Train the planned runs that are not recorded, every `parts`-th of them from `part` on."""
    planned = dict.fromkeys(
        (cell, variant, seed) for cell, variants, seeds in PLAN for variant, seed in itertools.product(variants, seeds)
    )
    for cell, variant, seed in itertools.islice(planned, part, None, parts):
        if (cell.name, variant, str(seed)) in {(row["cell"], row["variant"], row["seed"]) for row in recorded()}:
            continue
        row = run(cell, variant, seed)
        new = not RECORD.exists()
        with RECORD.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)


def table(split: str = "test") -> str:
    """One row a cell and variant: `none` in percent, and the differences to it of the others, in points."""
    lines = [f"| cell | variant | seeds | {' | '.join(QUANTITIES)} |", "| --- | --- | --- | --- | --- | --- | --- |"]
    rows = recorded()
    for cell in dict.fromkeys(row["cell"] for row in rows):
        of = {(row["variant"], row["seed"]): row for row in rows if row["cell"] == cell}
        for variant in dict.fromkeys(variant for variant, _ in of):
            seeds = [seed for name, seed in of if name == variant and (BASELINE, seed) in of]
            cells = []
            for quantity in QUANTITIES:
                key = f"{split}_{quantity}"
                values = [100 * float(of[variant, seed][key]) for seed in seeds]
                if variant == BASELINE:
                    cells.append(f"{statistics.fmean(values):.2f}")
                else:
                    base = [100 * float(of[BASELINE, seed][key]) for seed in seeds]
                    cells.append(_interval([value - other for value, other in zip(values, base, strict=True)]))
            lines.append(f"| {cell} | {variant} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(differences: list[float]) -> str:
    if len(differences) < 2:
        return " ".join(f"{value:+.2f}" for value in differences)
    half = (
        float(student_t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / math.sqrt(len(differences))
    )
    return f"{statistics.fmean(differences):+.2f} ± {half:.2f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["run"]:
        part, _, parts = (sys.argv[2] if len(sys.argv) > 2 else "0/1").partition("/")
        run_plan(int(part), int(parts))
    elif sys.argv[1:2] == ["table"]:
        print(table(*sys.argv[2:]))
    else:
        print(__doc__)
