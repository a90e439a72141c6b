"""A network as tensors and a plan of its own: a checkpoint of its peer, or of the whole tree for an ensemble."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wml_ray.checkpoints.checkpoint import Checkpoint, epoch_folder, write_checkpoint
from wml_ray.export.network import Network
from wml_ray.networks.costs import count_macs, count_params


def write_standalone(network: Network, folder: Path) -> None:
    """Write `model.safetensors`, `plan.json` and their digests; `load_standalone` reads them bit-equal.

    Raises:
        OSError: the folder cannot be written.
    """
    info, tree = network.info, network.tree
    plan = dict(info.plan)
    if tree.num_peers == 1 and "network" not in plan:
        plan |= _of_peer(plan, int(info.choice.removeprefix("peer")), list(tree.stages))
    plan |= {
        "network": {"choice": info.choice, "weights": network.weights_M.tolist()},
        "run_config": info.config.dump(),
        "classes": list(info.classes),
        "history": plan["history"][-1:],
        "tree": {"params": count_params(tree), "macs": count_macs(tree, info.spec)},
    }
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        checkpoints = Path(temporary)
        write_checkpoint(Checkpoint(info.epoch, tree.state_dict(), {}, plan), checkpoints, keep=1)
        for path in epoch_folder(checkpoints, info.epoch).iterdir():
            shutil.move(path, folder / path.name)


def _of_peer(plan: Mapping[str, Any], peer: int, stages: Sequence[str]) -> dict[str, Any]:
    """The parts of a tree's plan that differ in that of one peer alone."""
    sharing, config = plan["sharing"], plan["config"]
    of_stages = [*sharing[: len(stages) - 1], sharing[-1]]  # an exit leaves out the stages between
    own_copy = {stage: str(peer * copies // sharing[-1]) for stage, copies in zip(stages, of_stages, strict=True)}
    channels = {}
    for module, widths in plan["channels"].items():
        _, stage, copy, *inner = module.split(".")
        if copy == own_copy.get(stage):
            channels[".".join(["stages", stage, "0", *inner])] = widths
    exits = config["model"].get("exits") or []
    alone, kept = [1] * len(config["model"]["sharing"]), [1] * len(stages)
    return {
        "config": {
            **{key: config[key] for key in ("seed", "data")},
            "model": {**config["model"], "sharing": alone, "exits": exits[peer : peer + 1]},
            "pruning": {**config["pruning"], "ratios": [config["pruning"]["ratios"][peer]]},
            "method": {"name": "independent"},
        },
        "sharing": kept,
        "channels": channels,
        "peers": [plan["peers"][peer]],
    }
