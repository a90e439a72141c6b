"""The model card of an exported network, as JSON and as Markdown."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wml_ray.export.network import NetworkInfo
from wml_ray.export.verify import Verification, rows
from wml_ray.report.intervals import wilson_interval

CALLS = {
    "onnx": """\
import json, numpy, onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
images = numpy.zeros({shape}, "uint8")
print(classes[session.run(["logits"], {{"images": images}})[0][0].argmax()])
""",
    "pt2": """\
import torch
network = torch.export.load("model.pt2").module()
classes = {classes}
images = torch.zeros({shape}, dtype=torch.uint8)
print(classes[int(network(images)[0].argmax())])
""",
    "safetensors": """\
import torch, wml_ray
network = wml_ray.load_run("."){choice}
images = torch.zeros({shape}, dtype=torch.uint8)
print(network.classes[int(network(images)[0].argmax())])
""",
}


def make_card(info: NetworkInfo, images: Mapping[str, int], to: str, int8: bool, found: Verification) -> dict[str, Any]:
    """The card as JSON types. `images` are the sizes of the splits; accuracies are shares with 95 % intervals.

    The accuracies are the run's own, in PyTorch; those of the file are in `verification`.
    """
    choice = f".peer({info.choice.removeprefix('peer')})"
    if not info.choice.startswith("peer"):
        choice = f'.ensemble("{info.choice.removeprefix("ensemble_")}")'
    accuracies = {"validation": info.validation_accuracy, "test": info.test_accuracy}
    return {
        "title": info.title,
        "format": f"{to} int8" if int8 else to,
        "input": {
            "name": "images",
            "type": "uint8",
            "shape": ["N", *info.spec.shape],
            "pixels": f"0 to {info.white}, not normalised",
        },
        "data": info.config.data.name,
        "classes": list(info.classes),
        "accuracy": {
            split: {"value": value, "n": images[split], "interval": list(wilson_interval(value, images[split]))}
            for split, value in accuracies.items()
            if value is not None and value == value
        },
        "params": info.params,
        "macs": info.macs,
        "cpu": cpu_name(),
        "verification": asdict(found),
        "run_id": info.run_id,
        "network": info.choice,
        "epoch": info.epoch,
        "config": info.config.dump(),
        "call": CALLS[to].format(shape=(1, *info.spec.shape), classes=list(info.classes), choice=choice),
    }


def write_card(card: Mapping[str, Any], found: Verification, folder: Path) -> None:
    """Write `card.json` and `card.md`."""
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    (folder / "card.md").write_text(card_text(card, found))


def card_text(card: Mapping[str, Any], found: Verification) -> str:
    """The card as Markdown."""
    n, *shape = card["input"]["shape"]
    size = "x".join(map(str, shape))
    lines = [
        f"# {card['title']}",
        "",
        f"An image classifier, trained by wml_ray on `{card['data']}` with the method `{_method(card)}`, exported as "
        f"{card['format']}. It takes {card['input']['type']} images ({n}, {size.replace('x', ', ')}), pixels "
        f"{card['input']['pixels']}, and returns one logit a class.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| accuracy, {split} | {_accuracy(of)} |" for split, of in card["accuracy"].items()),
        f"| params, MACs | {card['params']:,}, {card['macs']:,} |",
        f"| classes | {', '.join(card['classes'])} |",
        f"| run, epoch | {card['run_id']}, {card['epoch']} |",
        "",
        f"## The file against PyTorch, on {card['cpu']}, one thread",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows(found)),
        "",
        "## How to call it",
        "",
        f"```python\n{card['call']}```",
        "",
        "## Config",
        "",
        f"```json\n{json.dumps(card['config'], indent=1)}\n```",
    ]
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    """Name of this machine's CPU."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _method(card: Mapping[str, Any]) -> str:
    return str(card["config"]["method"]["name"])


def _accuracy(of: Mapping[str, Any]) -> str:
    low, high = of["interval"]
    return f"{of['value']:.2%} of {of['n']:,} images (95 % interval {low:.2%} to {high:.2%})"
