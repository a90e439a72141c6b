"""One worker's training in plain PyTorch: it knows no cluster, no tracker and no file; `report` is its only way out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wml_ray.batchnorm import synchronise
from wml_ray.config import Config, OptimConfig, UserError
from wml_ray.data import Batch, Dataset, Shard, Split, seed_for
from wml_ray.metrics import evaluate
from wml_ray.objective import KlOptions, cross_entropies, inner_loss
from wml_ray.tree import PeerTree
from wml_ray.weights import log_mirror_descent, weight_gradient

TICK_S = 0.5  # seconds between two progress reports
STEPS_BETWEEN_LOOKS = 25  # whether the machine is to go: a minute's notice is usual
STEPS_BETWEEN_CHECKS_ON_GPU = 50  # reading a loss stops the GPU's queue, so it is not done every step


@dataclass(frozen=True)
class Tick:
    """Progress inside an epoch: training steps done of all there are."""

    epoch: int
    step: int
    total_steps: int
    loss: float


@dataclass(frozen=True)
class EpochEnd:
    """An epoch is done: its number from 1, and its metrics under their MLflow names."""

    epoch: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class MidEpoch:
    """So many epochs and steps of the next one are done, and the machine may soon be gone: time for a checkpoint."""

    epoch: int
    step: int


Report = Callable[[Tick | EpochEnd], None]
Leaving = Callable[
    [], bool
]  # whether the machine may soon be gone; asked on all workers at once, all are told the same


class Diverged(RuntimeError):
    """A loss, a parameter or a peer weight turned non-finite; the message says which, where and what helps."""


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of training step `step` (from 0), a function of the step alone, so there is no state to resume."""
    total = config.epochs * steps_per_epoch
    warmup = config.warmup_epochs * steps_per_epoch
    if config.schedule == "onecycle":  # Smith & Topin 2019: up over the warm-up (30 % by default), then down
        top = max((warmup or 0.3 * total) - 1, 1e-9)
        start, end = config.learning_rate / 25, config.learning_rate / 25e4
        if step < top:
            return _cosine(start, config.learning_rate, step / top)
        return _cosine(config.learning_rate, end, (step - top) / max(total - 1 - top, 1e-9))
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    if config.schedule == "cosine":
        return _cosine(config.learning_rate, 0.0, (step - warmup) / (total - warmup))
    if config.schedule == "multistep":
        decays = sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
        return config.learning_rate * config.decay_factor**decays
    return config.learning_rate


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def check_shares(config: Config, dataset: Dataset, num_workers: int) -> None:
    """Raises:
    UserError: a batch has fewer than two images a worker, which BatchNorm needs.
    """
    smallest = min(config.data.batch_size, len(dataset.splits["outer"]))
    if smallest < 2 * num_workers:
        raise UserError(
            f"scale.workers = {num_workers} is too many for batches of {smallest} images: BatchNorm needs two images a "
            "worker; use fewer workers or a larger data.batch_size"
        )


def initial_state(num_peers: int) -> dict[str, Tensor]:
    """The state of a trainer before its first step: equal weights, no momentum."""
    equal = torch.full((num_peers,), -math.log(num_peers), dtype=torch.float64)
    return {"log_weights": equal, "epoch": torch.tensor(0), "step": torch.tensor(0), "loss_sum": torch.tensor(0.0)}


class Trainer:
    """Everything that changes while a family trains: parameters, optimiser, omega, and how far it has come."""

    def __init__(
        self, config: Config, tree: PeerTree, dataset: Dataset, device: torch.device, shard: Shard | None = None
    ) -> None:
        """`tree` is already pruned, and the same on every worker; with several, torch.distributed is initialised.

        Raises:
            UserError: more workers than images in a batch.
        """
        self.config, self.dataset, self.device = config, dataset, device
        self.shard = shard or Shard()
        check_shares(config, dataset, self.shard.world_size)
        self.tree = tree.to(device=device, memory_format=self._memory_format).train()  # type: ignore[call-overload]
        if config.optim.sync_batchnorm and self.shard.world_size > 1:
            synchronise(self.tree)
        self.optimizer = _optimizer(config.optim, self.tree)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.optim.precision == "float16")
        self.log_weights_M = initial_state(tree.num_peers)["log_weights"].to(device)
        self.epoch = 0  # epochs done
        self.step = 0  # steps done of the next one
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # over those steps
        self.model = self._wrapped()
        self._losses: list[tuple[int, float, Tensor]] = []  # (step, learning rate, losses_M) not yet looked at

    @property
    def weights_M(self) -> Tensor:
        """omega, (M,) float64 on the simplex."""
        return self.log_weights_M.exp()

    @property
    def total_steps(self) -> int:
        return self.config.optim.epochs * self.dataset.steps_per_epoch

    def fit(
        self, report: Report, leaving: Leaving | None = None, save: Callable[[MidEpoch], None] | None = None
    ) -> None:
        """Train the epochs that are left. When `leaving` says so, `save` is called on all workers.

        Raises:
            Diverged: something turned non-finite.
        """
        while self.epoch < self.config.optim.epochs:
            loss, images_per_second = self._train_epoch(report, leaving, save)
            self._check_parameters()
            self._average_buffers()
            self.epoch, self.step = self.epoch + 1, 0
            self._loss_sum.zero_()
            metrics = self.evaluate("validation")
            metrics |= {f"weights/peer{i}": w for i, w in enumerate(self.weights_M.tolist())}
            metrics |= {"train/loss": loss, "train/images_per_second": images_per_second}
            metrics["train/learning_rate"] = self._learning_rate(self.epoch * self.dataset.steps_per_epoch - 1)
            report(EpochEnd(self.epoch, metrics))

    def evaluate(self, split: Split) -> dict[str, float]:
        """Accuracies on a split, under their MLflow names."""
        prefix = {"validation": "val", "test": "test"}[split]
        with self._autocast():
            found = evaluate(self.tree, self.dataset.evaluation_batches(split, self.shard), self.weights_M)
        return found.metrics(prefix)

    def model_state(self) -> dict[str, Tensor]:
        return dict(self.tree.state_dict())

    def state(self) -> dict[str, Tensor]:
        """What besides the model's tensors a resumed run needs, as named tensors.

        Batch order, augmentation, dropout and learning rate follow from seed and step, so they need no state.
        """
        tensors = {"log_weights": self.log_weights_M, "epoch": torch.tensor(self.epoch)}
        tensors |= {"step": torch.tensor(self.step), "loss_sum": self._loss_sum}
        for name, parameter in self.tree.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
        for key, value in self.scaler.state_dict().items():
            tensors[f"scaler/{key}"] = torch.tensor(value, dtype=torch.float64)
        return tensors

    def load_state(self, model: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        self.tree.load_state_dict(model)
        self.log_weights_M = state["log_weights"].to(self.device)
        self.epoch, self.step = int(state["epoch"]), int(state["step"])
        self._loss_sum = state["loss_sum"].to(self._loss_sum).clone()
        parameters = dict(self.tree.named_parameters())
        for name, value in _below("optimizer", state).items():
            key, _, parameter_name = name.partition("/")
            parameter = parameters[parameter_name]
            if value.shape == parameter.shape:  # in the parameter's own layout, without which a step is slower
                value = torch.empty_like(parameter).copy_(value)
            self.optimizer.state[parameter][key] = value.detach()
        scaler = {key: float(value) for key, value in _below("scaler", state).items()}
        if scaler:
            counts = {key: int(scaler[key]) for key in ("growth_interval", "_growth_tracker")}
            self.scaler.load_state_dict({**scaler, **counts})

    def _train_epoch(
        self, report: Report, leaving: Leaving | None, save: Callable[[MidEpoch], None] | None
    ) -> tuple[float, float]:
        """Mean inner loss and images a second, over all workers."""
        steps, wml, first = self.dataset.steps_per_epoch, self.config.wml, self.step
        begin = self.epoch * steps
        torch.manual_seed(seed_for(self.config.seed, "dropout", self.epoch, self.shard.rank, first))
        learns = wml.weights == "learned" and self.tree.num_peers > 1
        updates_done = (begin + first) // wml.inner_steps - begin // wml.inner_steps
        outer_batches = self.dataset.outer_batches(self.epoch, self.shard, updates_done) if learns else None
        start_s = last_tick_s = time.perf_counter()
        batches = self.dataset.train_batches(self.epoch, self.shard, first)
        for step, batch in enumerate(batches, begin + first):
            loss = self._train_step(step, batch)
            self._loss_sum += loss
            if outer_batches is not None and (step + 1) % wml.inner_steps == 0:
                self._update_weights(step, batch, next(outer_batches))
            self.step += 1
            if time.perf_counter() - last_tick_s >= TICK_S and self.shard.rank == 0:
                last_tick_s = time.perf_counter()
                report(Tick(self.epoch + 1, step + 1, self.total_steps, float(loss)))
            if leaving and save and self.step % STEPS_BETWEEN_LOOKS == 0 and self.step < steps and leaving():
                self._agree()
                save(MidEpoch(self.epoch, self.step))
        self._check_losses()
        mean_loss = float(self._over_workers(self._loss_sum)) / steps
        return mean_loss, (steps - first) * self.config.data.batch_size / (time.perf_counter() - start_s)

    def _agree(self) -> None:
        """Make what a checkpoint holds the same on all workers, and see that it is finite."""
        self._check_losses()
        self._check_parameters()
        self._average_buffers()
        self._loss_sum = self._over_workers(self._loss_sum)

    def _over_workers(self, value: Tensor) -> Tensor:
        """The mean of the workers' values."""
        if self.shard.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.shard.world_size
        return value

    def _train_step(self, step: int, batch: Batch) -> Tensor:
        """One descent on Eq. 1. The loss returned is this worker's, scaled so that the workers' mean is the batch's."""
        inputs, targets = batch
        rate = self._learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self._autocast():
            logits_MBK = self.model(inputs)
        loss = inner_loss(logits_MBK, targets, self.weights_M, self.config.wml.alpha, **self._kl_options)
        loss = loss * (len(targets) * self.shard.world_size / self.config.data.batch_size)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.config.optim.gradient_clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.tree.parameters(), self.config.optim.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._losses.append((step, rate, cross_entropies(logits_MBK.detach().float(), targets)))
        if self.device.type != "cuda" or len(self._losses) >= STEPS_BETWEEN_CHECKS_ON_GPU:
            self._check_losses()
        return loss.detach()

    def _update_weights(self, step: int, inner_batch: Batch, outer_batch: Batch) -> None:
        """Eqs. 5 and 7. Always in float32: a tangent in eight bits of mantissa is mostly noise."""
        wml, rate = self.config.wml, self._learning_rate(step)
        inner_step = rate if wml.inner_step is None else wml.inner_step
        gradient_M = weight_gradient(
            self.tree,
            inner_batch,
            outer_batch,
            self.weights_M,
            wml.alpha,
            inner_step,
            unroll=wml.unroll,
            **self._kl_options,
        )
        self.log_weights_M = log_mirror_descent(self.log_weights_M, gradient_M, wml.mirror_step_size)
        if not self.log_weights_M.isfinite().all():
            self._check_losses()  # on a GPU the loss that caused it may not have been looked at yet
            peers = [i for i, g in enumerate(gradient_M.tolist()) if not math.isfinite(g)]
            raise self._diverged(f"the gradient of the weight of {_peers(peers)}", step, rate)

    def _check_losses(self) -> None:
        for step, rate, losses_M in self._losses:
            bad = [i for i, loss in enumerate(losses_M.tolist()) if not math.isfinite(loss)]
            if bad:
                raise self._diverged(f"the loss of {_peers(bad)}", step, rate)
        self._losses.clear()

    def _check_parameters(self) -> None:
        named = list(self.tree.named_parameters())
        norms = torch.stack(torch._foreach_norm([p.detach() for _, p in named])).tolist()
        bad = [name for (name, _), norm in zip(named, norms, strict=True) if not math.isfinite(norm)]
        if bad:
            peers = sorted(frozenset[int]().union(*(self.tree.peers_through(name) for name in bad)))
            step = self.epoch * self.dataset.steps_per_epoch + self.step - 1
            raise self._diverged(f"a parameter of {_peers(peers)} ({bad[0]})", step, self._learning_rate(step))

    def _diverged(self, what: str, step: int, rate: float) -> Diverged:
        epoch = step // self.dataset.steps_per_epoch + 1
        return Diverged(
            f"training diverged: {what} is not finite at epoch {epoch}, step {step + 1}, learning rate {rate:.4g}; "
            "lower optim.learning_rate, lengthen optim.warmup_epochs, or set optim.gradient_clip=1"
        )

    def _average_buffers(self) -> None:
        """Give every worker the mean of the workers' running statistics, so that all evaluate the same network."""
        if self.shard.world_size == 1:
            return
        for buffer in self.tree.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.shard.world_size

    def _wrapped(self) -> nn.Module:
        model: nn.Module = self.tree
        if self.config.optim.compile:
            model = torch.compile(model)  # type: ignore[assignment]
        if self.shard.world_size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            model = DistributedDataParallel(
                model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        return model

    def _learning_rate(self, step: int) -> float:
        return learning_rate(self.config.optim, step, self.dataset.steps_per_epoch)

    def _autocast(self) -> AbstractContextManager[None]:
        precision = self.config.optim.precision
        return torch.autocast(self.device.type, getattr(torch, precision), enabled=precision != "float32")

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.config.optim.channels_last else torch.contiguous_format

    @property
    def _kl_options(self) -> KlOptions:
        wml = self.config.wml
        return KlOptions(
            temperature=wml.temperature,
            kl_direction=wml.kl_direction,
            stop_gradient_teacher=wml.stop_gradient_teacher,
        )


def _optimizer(config: OptimConfig, tree: PeerTree) -> torch.optim.Optimizer:
    if config.name == "adamw":
        return torch.optim.AdamW(tree.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        tree.parameters(),
        config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov and config.momentum > 0,
        weight_decay=config.weight_decay,
    )


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


def _peers(indices: list[int]) -> str:
    return ("peer " if len(indices) == 1 else "peers ") + ", ".join(map(str, indices))
