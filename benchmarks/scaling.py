"""Predicted and measured time of a training step on 2, 4 and 8 gloo workers, each behind a link of its own.

python benchmarks/scaling.py [BACKBONE MBIT COMPUTE_S]...      as root, on Linux

A worker is a process in a network namespace; a token bucket (tc tbf) limits what its link sends. Links and namespaces
disappear with the program. The all-reduces are those of a training: of DistributedDataParallel in `Trainer.train_step`,
and `mean_over_workers` of all gradients, as an update of omega calls it. Only the computation is replaced: forward and
backward pass sleep, as the workers share the cores of one machine.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wml_ray.config.load import parse_config
from wml_ray.config.schema import Config
from wml_ray.data.dataset import Dataset
from wml_ray.data.load import load_dataset
from wml_ray.distributed import WorkerRank, mean_over_workers, sum_of_workers
from wml_ray.methods.base import Outputs, StepContext
from wml_ray.methods.wml import Wml
from wml_ray.training.prediction import BACKWARD_SHARE, Network, exposed_s, gradient_buckets
from wml_ray.training.start import build_method, initial_checkpoint
from wml_ray.training.trainer import Trainer

CASES = ["resnet32", "20", "2", "resnet18_cifar", "200", "2"]
WORKERS = (2, 4, 8)
ROUNDS = 3
PAYLOAD = 8948 / 9014  # of an Ethernet frame of 9,000 bytes with TCP
SLEEPS = 12  # of a backward pass, spread over the parameters
CLASSES = 10  # of digits
CLONE_NEWNET = 0x40000000


class Sleeping(Wml):
    """WML whose passes sleep for `compute_s` in place of the computation; gradients are zeros in the usual order."""

    compute_s = 0.0

    def forward(self, inputs: Tensor) -> Outputs:
        time.sleep((1 - BACKWARD_SHARE) * self.compute_s)
        parameters = list(self.parameters())
        every = -(-len(parameters) // SLEEPS)
        total = torch.zeros(())
        for index, parameter in enumerate(parameters):
            total = _Sleep.apply(total, parameter, 0.0 if index % every else BACKWARD_SHARE * self.compute_s / SLEEPS)
        return {"logits_MBK": total.expand(self.tree.num_peers, len(inputs), CLASSES)}

    def losses(self, outputs: Outputs, targets_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        return {"inner": outputs["logits_MBK"].mean()}


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, parameter: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        ctx.save_for_backward(parameter)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        time.sleep(ctx.seconds)
        return gradient, torch.zeros_like(ctx.saved_tensors[0]), None


def main() -> None:
    if os.environ.get("WML_LINKS") is None:
        command = ["unshare", "--net", "--mount", sys.executable, *sys.argv]
        sys.exit(subprocess.run(command, env={**os.environ, "WML_LINKS": "1"}, check=False).returncode)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    words = sys.argv[1:] or CASES
    _make_links(max(WORKERS))
    print("| tree | MB | Mbit/s | workers | message ms | of a step | predicted s | measured s | error |")
    print("| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |")
    for backbone, rate, compute in zip(words[::3], words[1::3], words[2::3], strict=True):
        for rank in range(max(WORKERS)):
            limit = f"tc -n worker{rank} qdisc replace dev eth0 root tbf rate {rate}mbit burst 64kb latency 1s"
            subprocess.run(limit.split(), check=True)
        raw = {"data": {"batch_size": 64}, "model": {"backbone": backbone}, "pruning": {"saliency_images": 8}}
        config = parse_config(raw)
        dataset = load_dataset(config)
        channels = initial_checkpoint(config, dataset).metadata["channels"]
        tree = build_method(config, dataset.spec, channels).tree
        method = Sleeping(tree, config.wml, dataset.spec)
        method.compute_s = float(compute)
        for workers in WORKERS:
            found = _measure(config, dataset, method, workers)
            for row in _rows(found, workers, float(rate) / 1000):
                print(f"| {backbone} {row}", flush=True)


def _make_links(workers: int) -> None:
    """A namespace for each worker, whose interface eth0 is at a bridge."""
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
            # a share of the gradients fits: the links stay busy while a worker waits for a core
            *(f"ip netns exec {name} sysctl -qw net.ipv4.tcp_{side}=4096,{2**24},{2**25}" for side in ("wmem", "rmem")),
        ]
    for command in commands:
        subprocess.run([word.replace(",", " ") for word in command.split()], check=True)


def _measure(config: Config, dataset: Dataset, method: Sleeping, workers: int) -> dict[str, Any]:
    """Medians in seconds over the rounds, of the slowest worker in each; and the bytes."""
    context = multiprocessing.get_context("fork")  # the workers share what was imported and pruned
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"

        def work(rank: int) -> None:
            _enter_namespace(f"/run/netns/worker{rank}")
            dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers)
            found = _work(config, dataset, method, rank)
            if rank == 0:
                (Path(folder) / "result.json").write_text(json.dumps(found))
            dist.destroy_process_group()

        processes = [context.Process(target=work, args=(rank,)) for rank in range(workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit("a worker failed")
        result: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
        return result


def _enter_namespace(path: str) -> None:
    file = os.open(path, os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(file, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns", path)


def _work(config: Config, dataset: Dataset, method: Sleeping, rank: int) -> dict[str, Any]:
    workers = dist.get_world_size()
    worker, context = WorkerRank(rank, workers), StepContext(0, 0, 1, learning_rate=0.0)
    batch = next(dataset.train_batches(0, worker))
    alone = Trainer(config, method, dataset, torch.device("cpu"))
    together = Trainer(config, method, dataset, torch.device("cpu"), worker)
    gradients = [torch.zeros_like(parameter) for parameter in method.parameters()]
    times_s = _interleaved_medians_s(
        {
            "message": lambda: sum_of_workers(torch.zeros(workers)),
            "all-reduce": lambda: mean_over_workers(gradients, batch[1]),
            "alone": lambda: alone.train_step(context, batch),
            "step": lambda: together.train_step(context, batch),
        }
    )
    return {**times_s, "message": times_s["message"] / (2 * (workers - 1)), "buckets": gradient_buckets(method)}


def _interleaved_medians_s(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    slowest_s: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 2):  # DistributedDataParallel makes its buckets in the first two
        for name, call in calls.items():
            dist.barrier()
            start_s = time.perf_counter()
            call()
            taken_s = torch.tensor([time.perf_counter() - start_s])
            dist.all_reduce(taken_s, dist.ReduceOp.MAX)
            if turn > 1:
                slowest_s[name].append(float(taken_s))
    return {name: statistics.median(values) for name, values in slowest_s.items()}


def _rows(found: dict[str, Any], workers: int, rate_gbit: float) -> list[str]:
    network, buckets = Network(workers, rate_gbit * PAYLOAD, found["message"]), found["buckets"]
    exposed = exposed_s(buckets, BACKWARD_SHARE * found["alone"], network)
    lines = {
        "all-reduce alone": (network.all_reduce_s(sum(buckets)), found["all-reduce"]),
        "all-reduce exposed": (exposed, found["step"] - found["alone"]),
        "whole step": (found["alone"] + exposed, found["step"]),
    }
    start = f"| {sum(buckets) / 1e6:.1f} | {1000 * rate_gbit:.0f} | {workers} | {1e3 * found['message']:.2f}"
    return [
        f"{start} | {name} | {predicted:.2f} | {measured:.2f} | {100 * (predicted / measured - 1):+.0f} % |"
        for name, (predicted, measured) in lines.items()
    ]


if __name__ == "__main__":
    main()
