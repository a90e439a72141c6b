"""Run the benchmarks, print their ratios beside the limits, and write results.json.

python benchmarks/run.py [weights|kl|step|ray|search|start ...]; without names, all of them.
"""

from __future__ import annotations

import json
import math
import operator
import platform
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import interleaved_medians_s

RESULTS = Path(__file__).parent / "results.json"
Row = tuple[str, float, str]  # name, ratio or seconds, limit


def weights(record: dict[str, Any]) -> Iterator[Row]:
    from mathematics import weight_gradient_against_backward_passes

    times_s = record["weight_gradient_s"] = weight_gradient_against_backward_passes()
    before = None
    for peers, t in times_s.items():
        limit = "< 1" if int(peers) >= 4 else ""
        yield f"M = {peers}: same_point / (M + 1 backward passes)", t["same_point"] / t["backward_passes"], limit
        yield f"M = {peers}: exact / (M + 1 backward passes)", t["exact"] / t["backward_passes"], limit
        yield f"M = {peers}: same_point, in training steps", t["same_point"] / t["training_step"], "<= 1.5"
        in_bfloat16 = t["same_point, bfloat16"] / t["training_step, bfloat16"]
        yield f"M = {peers}: the same, both in bfloat16", in_bfloat16, "<= 1.5"
        yield f"M = {peers}: the same, outer_share = 1", t["same_point, whole"] / t["training_step"], "<= 2.5"
        yield f"M = {peers}: exact, in training steps", t["exact"] / t["training_step"], "<= 2.5"
        if before is not None:
            yield f"M = {peers}: same_point, against half the peers", t["same_point"] / before["same_point"], "<= 2.3"
            yield f"M = {peers}: exact, against half the peers", t["exact"] / before["exact"], "<= 2.3"
        before = t


def kl(record: dict[str, Any]) -> Iterator[Row]:
    from mathematics import kl_term

    times_s = record["kl_term_s"] = kl_term()
    for peers, seconds in times_s.items():
        half = times_s.get(str(int(peers) // 2))
        if half is not None:
            yield f"M = {peers}: KL term, against half the peers", seconds / half, ""
    growth = times_s["32"] / times_s["2"]
    yield "KL term: M = 32 against M = 2 (16 times the peers)", growth, "<= 18"


def step(record: dict[str, Any]) -> Iterator[Row]:
    from training_step import tree_against_separate_networks

    found = record["training_step"] = tree_against_separate_networks()
    yield "step of the pruned tree / 4 ResNet-32", found["seconds"]["tree"] / found["seconds"]["separate"], "< 0.6"
    memory = found["peak_bytes"]
    yield "peak memory of the pruned tree / 4 ResNet-32", memory["tree"] / memory["separate"], "< 0.6"


def ray(record: dict[str, Any]) -> Iterator[Row]:
    from ray_overhead import images_per_second

    speeds = record["images_per_second"] = images_per_second()
    one = speeds["1 worker"]
    yield "Ray Train with 1 worker / plain loop, images/s", one / speeds["plain loop"], ">= 0.97"
    yield "2 workers of 1 thread / 1 of 1 thread, images/s", speeds["2 workers"] / one, ">= 1.7"
    yield "the same with optim.sync_batchnorm", speeds["2 workers, sync_batchnorm"] / one, ""


def search(record: dict[str, Any]) -> Iterator[Row]:
    import samplers
    import search as study

    starts_s = record["warm_start_s"] = study.warm_start()
    yield "trial asked for to first training step, warm, seconds", starts_s["reused actor"], "<= 1"
    cost_s = record["tune_cost_s"] = study.tune_cost()
    yield "20 trials one at a time: Ray Tune / bare loop", cost_s["Ray Tune"] / cost_s["bare loop"], "<= 1.15"
    for sampler in ("random", "nsga2", "tpe"):
        trials_s = record[f"many_trials_s_{sampler}"] = study.many_trials(sampler)
        growth = trials_s["last 100"] / trials_s["first 100"]
        yield f"driver, a trial, {sampler}: last 100 of 1000 / first 100", growth, "<= 1.3"
    found = record["epochs_to_the_best_of_random"] = samplers.epochs_to_the_best_of_random()
    name = f"epochs of TPE + ASHA / of random, to its best: median of {len(found)} seeds"
    yield name, samplers.median_share(found, "tpe+asha"), "<= 0.3"


def start(record: dict[str, Any]) -> Iterator[Row]:
    program = str(Path(sys.executable).with_name("wml-ray"))
    quickstart = str(Path(__file__).parents[1] / "jobs" / "quickstart.yaml")
    commands = {"--help": ["--help"], "plan": ["plan", quickstart]}
    calls = {
        name: partial(subprocess.run, [program, *words], stdout=subprocess.DEVNULL, check=True)
        for name, words in commands.items()
    }
    times_s = record["start_s"] = interleaved_medians_s(calls)
    yield "wml-ray --help, seconds", times_s["--help"], "< 0.5"
    yield "wml-ray plan jobs/quickstart.yaml, seconds", times_s["plan"], "<= 4"


def main() -> None:
    chosen = [globals()[name] for name in sys.argv[1:]] or [weights, kl, step, ray, search, start]
    record: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine, ratios = _machine(), record.setdefault("ratios", {})
    print(machine, flush=True)
    for benchmark in chosen:
        record.setdefault("machines", {})[benchmark.__name__] = machine
        for name, value, limit in benchmark(record):
            rounded = round(value, 4) if math.isfinite(value) else None  # JSON has no infinity
            ratios[name] = {"value": rounded, "limit": limit, "met": _met(value, limit)}
            mark = "" if ratios[name]["met"] else "   MISSED"
            print(f"{name:<56} {value:8.3f}   {limit}{mark}", flush=True)
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")


def _met(value: float, limit: str) -> bool:
    """True if a ratio is within a limit such as "<= 2.5"; an empty limit is always met."""
    comparison, _, bound = limit.partition(" ")
    compare = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}.get(comparison)
    return compare is None or compare(value, float(bound))


def _machine() -> str:
    cpus = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in cpus if line.startswith("model name")), platform.processor())
    count = sum(line.startswith("processor") for line in cpus)
    return f"{name}, {count} cores, torch {torch.__version__}, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
