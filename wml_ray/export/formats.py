"""The formats of an exported network: how its file is written, and how it is run in its own runtime."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wml_ray.checkpoints.checkpoint import FILES
from wml_ray.errors import UserError, one_line, root_cause
from wml_ray.export.network import Network, load_standalone
from wml_ray.export.standalone import write_standalone
from wml_ray.training.threads import torch_threads

Array = np.ndarray[Any, np.dtype[Any]]
Runner = Callable[[Array], Array]
"""Pixels (B, C, H, W) uint8 to logits (B, K), with one CPU thread."""

INPUT, OUTPUT = "images", "logits"
OPSET = 20
EXAMPLE_IMAGES = 2  # a batch of one would make the number of images a constant


@dataclass(frozen=True)
class Format:
    """One format: the files it writes, and the functions that write and run them."""

    files: tuple[str, ...]
    write: Callable[[Network, Path], None]  # into a folder
    open: Callable[[Path], Runner]  # the files of a folder


def write_onnx(network: Network, folder: Path) -> None:
    """Write `model.onnx`: uint8 `images` (N, C, H, W) to `logits` (N, K), any N, classes and origin in its metadata.

    Raises:
        UserError: a library is missing, or ONNX has no operator for a layer.
    """
    onnx, *_ = (require(library, "onnx") for library in ("onnx", "onnxscript", "onnxruntime"))
    batch = torch.export.Dim("batch", min=1)
    with _quiet(), _explained(network, "onnx"):
        program = torch.onnx.export(
            network,
            (_example(network),),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: batch},),
            opset_version=OPSET,
            verbose=False,
        )
        model = program.model_proto  # type: ignore[union-attr]
    onnx.helper.set_model_props(model, origin_of(network))
    onnx.checker.check_model(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def open_onnx(folder: Path) -> Runner:
    """Open `model.onnx` in onnxruntime on the CPU."""
    onnxruntime = require("onnxruntime", "onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run([OUTPUT], {INPUT: images})[0])


def write_pt2(network: Network, folder: Path) -> None:
    """Write `model.pt2`, a torch.export program: uint8 images (N, C, H, W) to logits (N, K), any N.

    Raises:
        UserError: a layer cannot be exported.
    """
    with _quiet(), _explained(network, "pt2"):
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(network, (_example(network),), dynamic_shapes=({0: batch},))
        torch.export.save(program, folder / "model.pt2", extra_files={"origin.json": json.dumps(origin_of(network))})


def open_pt2(folder: Path) -> Runner:
    """Open `model.pt2` in PyTorch."""
    with _quiet():
        return torch_runner(torch.export.load(folder / "model.pt2").module())


def open_standalone(folder: Path) -> Runner:
    """Open the tensors and plan of a folder."""
    return torch_runner(load_standalone(folder, trust=True))


def torch_runner(module: torch.nn.Module) -> Runner:
    """A module in PyTorch, such as the network itself."""

    def run(images: Array) -> Array:
        with torch.no_grad(), torch_threads(1):
            return np.asarray(module(torch.from_numpy(images)).numpy())

    return run


def origin_of(network: Network) -> dict[str, str]:
    """Classes and provenance of a network, as the metadata of its file."""
    info = network.info
    return {
        "classes": json.dumps(list(info.classes)),
        "title": info.title,
        "run_id": info.run_id,
        "network": info.choice,
        "epoch": str(info.epoch),
        "validation_accuracy": f"{info.validation_accuracy:.6f}",
        "pixels": f"uint8, 0 to {info.white}, {'RGB' if info.spec.channels == 3 else 'grey'}",
        "config": json.dumps(info.config.dump()),
    }


def require(module: str, extra: str) -> Any:
    """An optional library.

    Raises:
        UserError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is not installed ({error}); pip install 'wml_ray[{extra}]'") from None


def _example(network: Network) -> torch.Tensor:
    return torch.zeros(EXAMPLE_IMAGES, *network.info.spec.shape, dtype=torch.uint8)


@contextmanager
def _explained(network: Network, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # exporters raise many types; each means that this network cannot be exported
        others = ", ".join(key for key in FORMATS if key != name)
        raise UserError(
            f"{network.info.title} cannot be exported to {name} ({one_line(root_cause(error))}); try --to {others}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' own progress and warnings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


FORMATS = {
    "onnx": Format(("model.onnx",), write_onnx, open_onnx),
    "pt2": Format(("model.pt2",), write_pt2, open_pt2),
    "safetensors": Format(FILES, write_standalone, open_standalone),
}
