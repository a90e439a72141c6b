"""The verb `export` as a function: one network of a run as a file that was checked in its own runtime."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wml_ray.data.load import load_dataset
from wml_ray.errors import UserError
from wml_ray.export.card import make_card, write_card
from wml_ray.export.formats import FORMATS
from wml_ray.export.int8 import CALIBRATION_IMAGES, quantise
from wml_ray.export.network import Network
from wml_ray.export.verify import Verification, calibration_images, check, verify

MAX_DROP = 0.02  # in accuracy, of an int8 file
EXPORTS = "exports"


@dataclass(frozen=True)
class Exported:
    """An exported network."""

    folder: Path
    files: tuple[str, ...]
    card: dict[str, Any]  # card.json
    verification: Verification


def export_network(
    network: Network,
    to: str = "onnx",
    out: str | Path | None = None,
    int8: bool = False,
    max_drop: float = MAX_DROP,
) -> Exported:
    """Write a network as `onnx`, `pt2` or `safetensors`, check the file in its own runtime, and add a model card.

    The check runs at least 256 images through the file and through PyTorch. A file in float32 may differ by 1e-4 in
    its logits; an `int8` one, calibrated on training images, may be `max_drop` less accurate on the validation images.
    A file that fails is removed. `out` is a folder, by default `exports/<run id>-<network>-<format>`; files of an
    earlier export in it are replaced.

    Raises:
        UserError: the format is unknown, a library is missing, the dataset is not there, the network cannot be
            exported, or the file fails its check.
    """
    if to not in FORMATS:
        raise UserError(f"--to {to} is unknown; allowed: {', '.join(FORMATS)}")
    if int8 and to != "onnx":
        raise UserError(f"--int8 needs --to onnx, not {to}")
    info, written = network.info, FORMATS[to]
    dataset = load_dataset(info.config, skipped=info.plan["skipped_images"])
    folder = Path(out) if out else Path(EXPORTS) / f"{info.run_id}-{info.choice}-{to}{'-int8' * int8}"
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as temporary:
            staging = Path(temporary)
            written.write(network, staging)
            if int8:
                quantise(staging, calibration_images(dataset, CALIBRATION_IMAGES))
            found = verify(network, written, staging, dataset)
            check(network, found, max_drop if int8 else None)
            sizes = {str(split): len(indices) for split, indices in dataset.splits.items()}
            card = make_card(info, sizes, to, int8, found)
            write_card(card, found, staging)
            for path in staging.iterdir():
                shutil.move(path, folder / path.name)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror or error}); name another folder") from None
    finally:
        for path in created:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    return Exported(folder, (*written.files, "card.json", "card.md"), card, found)
