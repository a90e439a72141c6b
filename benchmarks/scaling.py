"""Predicted and measured time of a training step on 1, 2, 4 and 8 gloo workers, each behind a link of its own.

python benchmarks/scaling.py [MBIT ...]        as root on Linux; 100 and 300 Mbit/s by default

A worker runs in a network namespace; a token bucket (tc tbf) limits what its link sends. The links, a bridge between
them, and the namespaces disappear with the process. All-reduces are those of wml_ray: DistributedDataParallel in
`Trainer.train_step`, and `mean_over_workers` as an update of omega calls it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from wml_ray.config.load import parse_config
from wml_ray.data.load import load_dataset
from wml_ray.distributed import WorkerRank, mean_over_workers, sum_of_workers
from wml_ray.methods.base import StepContext
from wml_ray.training.prediction import BACKWARD_SHARE, Network, exposed_s, gradient_buckets
from wml_ray.training.start import build_method, initial_checkpoint
from wml_ray.training.trainer import Trainer

WORKERS = (1, 2, 4, 8)
ROUNDS = 7
ETHERNET = 8934 / 9014  # payload of a frame of 9,000 bytes over TCP


def main() -> None:
    rates_mbit = [int(word) for word in sys.argv[1:] if word.isdigit()] or [100, 300]
    if "--inside" not in sys.argv:
        command = [sys.executable, __file__, *map(str, rates_mbit), "--inside"]
        sys.exit(subprocess.run(["unshare", "--net", "--mount", *command], check=False).returncode)
    _make_links(max(WORKERS))
    print("| workers | Mbit/s | what | compute ms | predicted ms | measured ms | error |")
    print("| ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for rate in rates_mbit:
        for rank in range(max(WORKERS)):
            limit = f"tc -n worker{rank} qdisc replace dev eth0 root tbf rate {rate}mbit burst 64kb latency 1s"
            subprocess.run(limit.split(), check=True)
        for workers in WORKERS:
            for row in _rows(_measure(workers), workers, rate):
                print(row, flush=True)


def _make_links(workers: int) -> None:
    """A namespace for each worker, with the interface eth0 at a bridge."""
    commands = ["mount -t tmpfs none /run", "mkdir /run/netns", "ip link add name bridge0 mtu 9000 type bridge"]
    commands += ["ip link set bridge0 up"]
    for rank in range(workers):
        name, port = f"worker{rank}", f"port{rank}"
        commands += [
            f"ip netns add {name}",
            f"ip link add name {port} mtu 9000 type veth peer name eth0 mtu 9000 netns {name}",
            f"ip link set {port} master bridge0 up",
            f"ip -n {name} addr add 10.0.0.{rank + 1}/24 dev eth0",
            f"ip -n {name} link set lo up",
            f"ip -n {name} link set eth0 up",
        ]
    for command in commands:
        subprocess.run(command.split(), check=True)


def _measure(workers: int) -> dict[str, Any]:
    """The medians of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        program = [sys.executable, "-W", "ignore", __file__, "--worker"]
        processes = [
            subprocess.Popen(
                ["ip", "netns", "exec", f"worker{rank}", *program, str(rank), str(workers), folder], env=environment
            )
            for rank in range(workers)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            sys.exit("a worker failed")
        found: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
        return found


def _rows(found: dict[str, Any], workers: int, rate_mbit: int) -> list[str]:
    times_s, rows = found["seconds"], []
    link = Network(workers, rate_mbit / 1000 * ETHERNET, found["latency_s"])
    reduced_s = link.all_reduce_s(4 * found["numbers"])
    backward_s = BACKWARD_SHARE * times_s["step alone"]
    step_s = times_s["step alone"] + exposed_s(found["buckets"], backward_s, link)
    for name, alone_s, predicted_s, measured_s in (
        ("all-reduce of the gradients", 0.0, reduced_s, times_s["all-reduce"]),
        ("step", times_s["step alone"], step_s, times_s["step"]),
        ("update of omega", times_s["update alone"], times_s["update alone"] + reduced_s, times_s["update"]),
    ):
        if workers > 1 or alone_s:
            error = f"{100 * (predicted_s / measured_s - 1):+.0f} %"
            numbers = " | ".join(f"{1e3 * value:.1f}" for value in (alone_s, predicted_s, measured_s))
            rows.append(f"| {workers} | {rate_mbit} | {name} | {numbers} | {error} |")
    return rows


def _work(rank: int, workers: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers)
    config = parse_config({"data": {"batch_size": 64}, "model": {"backbone": "resnet32"}})
    dataset, worker = load_dataset(config), WorkerRank(rank, workers)
    channels = initial_checkpoint(config, dataset).metadata["channels"]
    context = StepContext(0, 0, 1, learning_rate=0.0)
    batch = next(dataset.train_batches(0, worker))
    trainers = {}
    for kind, of in (("step alone", WorkerRank()), ("step", worker)):
        trainers[kind] = Trainer(config, build_method(config, dataset.spec, channels), dataset, torch.device("cpu"), of)
    method = trainers["step"].method
    gradients = [torch.zeros_like(parameter) for parameter in method.parameters()]
    calls: dict[str, Callable[[], object]] = {
        "step alone": lambda: trainers["step alone"].train_step(context, batch),
        "step": lambda: trainers["step"].train_step(context, batch),
        "update alone": lambda: _alone(lambda: method.after_step(context, batch, batch)),
        "update": lambda: method.after_step(context, batch, batch),
        "all-reduce": lambda: mean_over_workers(gradients, batch[1]),
        "message": lambda: sum_of_workers(torch.zeros(workers)),
    }
    times_s = _interleaved_medians_s(calls)
    latency_s = times_s["message"] / (2 * (workers - 1)) if workers > 1 else 0.0
    if rank == 0:
        numbers = sum(gradient.numel() for gradient in gradients)
        found = {"seconds": times_s, "latency_s": latency_s, "buckets": gradient_buckets(method), "numbers": numbers}
        (folder / "result.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _alone(call: Callable[[], object]) -> None:
    """Run `call` as one worker would, without any exchange."""
    with patch("wml_ray.distributed.world_size", lambda: 1):
        call()


def _interleaved_medians_s(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median over the rounds of the slowest worker's seconds, after two rounds that do not count.

    All workers begin a call together, so that they share the cores alike in calls with and without exchange.
    """
    slowest_s: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 2):
        for name, call in calls.items():
            dist.barrier()
            start_s = time.perf_counter()
            call()
            taken_s = torch.tensor([time.perf_counter() - start_s])
            dist.all_reduce(taken_s, dist.ReduceOp.MAX)
            if turn > 1:
                slowest_s[name].append(float(taken_s))
    return {name: statistics.median(values) for name, values in slowest_s.items()}


if __name__ == "__main__":
    if "--worker" in sys.argv:
        _work(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
