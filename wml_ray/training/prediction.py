"""The predicted time of a training step on several workers: computation, and the all-reduces that it waits for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from wml_ray.config.schema import Config
from wml_ray.data.dataset import Dataset
from wml_ray.distributed import WorkerRank
from wml_ray.errors import UserError
from wml_ray.methods.base import Batch, Method, StepContext
from wml_ray.methods.wml import Wml
from wml_ray.networks.costs import BATCHNORM
from wml_ray.training.latency import time_calls
from wml_ray.training.threads import torch_threads, training_threads
from wml_ray.training.trainer import Trainer

FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20  # of DistributedDataParallel: a bucket ends where it is as large
BACKWARD_SHARE = 2 / 3  # of the computation of a step
LATENCY_S = 50e-6  # of a message between two machines over TCP
STEPS, STEPS_S = 10, 5.0  # steps that are timed, and for at most how long; three at least


@dataclass(frozen=True)
class Network:
    """The links between the workers of a training: each worker has one, of equal bandwidth in both directions."""

    workers: int
    bandwidth_gbit: float  # 1e9 bits a second
    latency_s: float = LATENCY_S

    def all_reduce_s(self, num_bytes: float) -> float:
        """Seconds of a ring all-reduce: 2 (N - 1) messages one after another, each of 1 / N of the bytes.

        That is 2 (N - 1) / N bytes / bandwidth + 2 (N - 1) latency (Patarasuk & Yuan, JPDC 2009).
        """
        return 2 * (self.workers - 1) * self._message_s(num_bytes / self.workers)

    def all_gather_s(self, num_bytes: float) -> float:
        """Seconds until every worker has the `num_bytes` of each: N - 1 messages around a ring."""
        return (self.workers - 1) * self._message_s(num_bytes)

    def _message_s(self, num_bytes: float) -> float:
        return self.latency_s + 8 * num_bytes / (self.bandwidth_gbit * 1e9)


@dataclass(frozen=True)
class UpdatePrediction:
    """An update of omega on one of several workers. Nothing overlaps with its all-reduces."""

    every: int  # steps
    all_reduces: int  # of all gradients of the tree
    compute_s: float
    all_reduce_s: float


@dataclass(frozen=True)
class StepPrediction:
    """A training step on one of several workers, in seconds."""

    network: Network
    images: int  # of a worker
    device: str  # on which the computation was measured; empty if it was not
    compute_s: float  # forward, backward and optimiser
    gradient_bytes: int
    gradient_s: float  # the all-reduce of the gradients
    exposed_s: float  # the part of `gradient_s` after the backward pass; the rest overlaps with that
    statistics_s: float  # the collectives of optim.sync_batchnorm
    update: UpdatePrediction | None

    @property
    def step_s(self) -> float:
        """A step, with its share of an update of omega."""
        update_s = (self.update.compute_s + self.update.all_reduce_s) / self.update.every if self.update else 0.0
        return self.compute_s + self.exposed_s + self.statistics_s + update_s

    @property
    def computing(self) -> float:
        """The share of the time in which a worker computes."""
        update_s = self.update.compute_s / self.update.every if self.update else 0.0
        return (self.compute_s + update_s) / self.step_s


def network_of(config: Config, bandwidth_gbit: float) -> Network:
    """The links between the workers of a run, of the most workers if it is elastic.

    Raises:
        UserError: the bandwidth is no positive number, or the run has one worker.
    """
    workers = config.scale.worker_range[1]
    if not (math.isfinite(bandwidth_gbit) and bandwidth_gbit > 0):
        raise UserError(f"--bandwidth-gbit = {bandwidth_gbit:g} is not a bandwidth; give Gbit/s, such as 10")
    if workers < 2:
        raise UserError(
            f"--bandwidth-gbit needs several workers, but scale.workers = {config.scale.workers}; set scale.workers=2 "
            "or more"
        )
    return Network(workers, bandwidth_gbit)


def predict_step(config: Config, method: Method, dataset: Dataset, network: Network) -> StepPrediction:
    """The training step of `method` on the workers of `network`.

    The computation is measured in this process, on a worker's share of a batch. Where the run uses GPUs and this
    machine has none, only the communication is predicted. `method` is moved to the device; its parameters stay.
    """
    gpu = config.scale.gpu
    device = "" if gpu and not torch.cuda.is_available() else "cuda" if gpu else "cpu"
    worker = WorkerRank(0, network.workers)
    compute_s, update_compute_s = measure_step_s(config, method, dataset, worker, device) if device else (0.0, 0.0)
    buckets = gradient_buckets(method)
    update = None
    if method.outer_batch_interval:
        count = 2 if isinstance(method, Wml) and method.settings.unroll == "exact" else 1
        tree_bytes = sum(p.nbytes for p in method.tree.parameters() if p.requires_grad)
        all_reduces_s = count * network.all_reduce_s(tree_bytes)
        update = UpdatePrediction(method.outer_batch_interval, count, update_compute_s, all_reduces_s)
    return StepPrediction(
        network=network,
        images=-(-config.data.batch_size // network.workers),
        device=device,
        compute_s=compute_s,
        gradient_bytes=sum(buckets),
        gradient_s=sum(map(network.all_reduce_s, buckets)),
        exposed_s=exposed_s(buckets, BACKWARD_SHARE * compute_s, network),
        statistics_s=_statistics_s(method, network) if config.optim.sync_batchnorm else 0.0,
        update=update,
    )


def gradient_buckets(method: Method) -> list[int]:
    """Bytes of the buckets that DistributedDataParallel all-reduces, in the order in which they are ready.

    A backward pass computes gradients in about the reverse order of the parameters.
    """
    buckets, limit = [0], FIRST_BUCKET_BYTES
    for parameter in reversed([p for p in method.parameters() if p.requires_grad]):
        if buckets[-1] >= limit:
            buckets.append(0)
            limit = BUCKET_BYTES
        buckets[-1] += parameter.nbytes
    return buckets


def exposed_s(buckets: Sequence[int], backward_s: float, network: Network) -> float:
    """Seconds between the end of the backward pass and the end of the last all-reduce.

    Buckets are all-reduced one after another, each as soon as it is ready; a bucket is ready when the same share of the
    backward pass is over as of all bytes. So the last bucket never overlaps.
    """
    ready, end_s = 0, 0.0
    for num_bytes in buckets:
        ready += num_bytes
        end_s = max(end_s, backward_s * ready / sum(buckets)) + network.all_reduce_s(num_bytes)
    return end_s - backward_s


def measure_step_s(
    config: Config, method: Method, dataset: Dataset, worker: WorkerRank, device: str
) -> tuple[float, float]:
    """Median seconds of a training step on as many images as `worker` has of a batch, and of an update of omega.

    Images are noise, nothing is exchanged, and no parameter changes.
    """
    trainer = Trainer(config, method, dataset, torch.device(device))
    context = StepContext(0, 0, config.optim.epochs, learning_rate=0.0, precision=trainer.precision)
    batch = _noise(dataset, len(worker.share_of(torch.arange(config.data.batch_size))), method.num_views, device)
    outer_batch = _noise(dataset, len(worker.share_of(torch.arange(dataset.outer_batch_size))), 1, device)

    def step() -> None:
        trainer.train_step(context, batch)
        method.after_step(context, batch, None)

    def update() -> None:
        method.after_step(context, batch, outer_batch)

    calls = (step, update) if method.outer_batch_interval else (step,)
    medians_s = []
    with torch_threads(training_threads(config)):
        for call in calls:
            call()  # the first one allocates
            medians_s.append(median(time_calls(call, trainer.device, STEPS, STEPS_S)))
    return medians_s[0], medians_s[1] if len(medians_s) > 1 else 0.0


def _noise(dataset: Dataset, images: int, views: int, device: str) -> Batch:
    spec, generator = dataset.spec, torch.Generator().manual_seed(0)
    inputs = torch.randn(images * views, *spec.shape, generator=generator)
    layout = torch.channels_last if dataset.config.optim.channels_last else torch.contiguous_format
    targets = torch.randint(spec.num_classes, (images,), generator=generator)
    return inputs.to(device, memory_format=layout), targets.to(device)


def _statistics_s(method: Method, network: Network) -> float:
    """Seconds of the collectives of SyncBatchNorm: in each layer an all-gather forward and an all-reduce backward."""
    widths = [module.num_features for module in method.modules() if isinstance(module, BATCHNORM)]
    rows = [4 * (2 * width + 1) for width in widths]  # bytes of a worker's means, variances and count
    return sum(network.all_gather_s(row) + network.all_reduce_s(network.workers * row) for row in rows)
