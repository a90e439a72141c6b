"""One worker's training in plain PyTorch: it knows no cluster, no tracker and no file; `report` is its only way out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wml_ray.config.schema import Config
from wml_ray.data.dataset import Batch, Dataset
from wml_ray.data.splits import Split, seed_for
from wml_ray.distributed import WorkerRank
from wml_ray.errors import Diverged, UserError
from wml_ray.methods.hypergradient import log_mirror_descent, weight_gradient
from wml_ray.methods.losses import KlOptions, cross_entropies, inner_loss
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.sync_batchnorm import convert_sync_batchnorm
from wml_ray.training.evaluation import evaluate
from wml_ray.training.events import EpochEnd, MidEpochState, OnEvent, Preempted, StepProgress
from wml_ray.training.optimizer import learning_rate, make_optimizer

PROGRESS_INTERVAL_S = 0.5  # seconds between two progress reports
STEPS_BETWEEN_PREEMPTION_CHECKS = 25  # whether the machine is to go: a minute's notice is usual
STEPS_BETWEEN_LOSS_CHECKS_ON_GPU = 50  # reading a loss stops the GPU's queue, so it is not done every step


def check_batch_shares(config: Config, dataset: Dataset, num_workers: int) -> None:
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
        self, config: Config, tree: PeerTree, dataset: Dataset, device: torch.device, worker: WorkerRank | None = None
    ) -> None:
        """`tree` is already pruned, and the same on every worker; with several, torch.distributed is initialised.

        Raises:
            UserError: more workers than images in a batch.
        """
        self.config, self.dataset, self.device = config, dataset, device
        self.worker = worker or WorkerRank()
        check_batch_shares(config, dataset, self.worker.world_size)
        self.tree = tree.to(device=device, memory_format=self._memory_format).train()  # type: ignore[call-overload]
        if config.optim.sync_batchnorm and self.worker.world_size > 1:
            convert_sync_batchnorm(self.tree)
        self.optimizer = make_optimizer(config.optim, self.tree)
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
        self, report: OnEvent, preempted: Preempted | None = None, save: Callable[[MidEpochState], None] | None = None
    ) -> None:
        """Train the epochs that are left. When `preempted` says so, `save` is called on all workers.

        Raises:
            Diverged: something turned non-finite.
        """
        while self.epoch < self.config.optim.epochs:
            loss, images_per_second = self._train_epoch(report, preempted, save)
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
            found = evaluate(self.tree, self.dataset.evaluation_batches(split, self.worker), self.weights_M)
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
        self, report: OnEvent, preempted: Preempted | None, save: Callable[[MidEpochState], None] | None
    ) -> tuple[float, float]:
        """Mean inner loss and images a second, over all workers."""
        steps, wml, first = self.dataset.steps_per_epoch, self.config.wml, self.step
        begin = self.epoch * steps
        torch.manual_seed(seed_for(self.config.seed, "dropout", self.epoch, self.worker.rank, first))
        learns = wml.weights == "learned" and self.tree.num_peers > 1
        updates_done = (begin + first) // wml.update_every - begin // wml.update_every
        outer_batches = self.dataset.outer_batches(self.epoch, self.worker, updates_done) if learns else None
        start_s = last_tick_s = time.perf_counter()
        batches = self.dataset.train_batches(self.epoch, self.worker, first)
        for step, batch in enumerate(batches, begin + first):
            loss = self._train_step(step, batch)
            self._loss_sum += loss
            if outer_batches is not None and (step + 1) % wml.update_every == 0:
                self._update_weights(step, batch, next(outer_batches))
            self.step += 1
            if time.perf_counter() - last_tick_s >= PROGRESS_INTERVAL_S and self.worker.rank == 0:
                last_tick_s = time.perf_counter()
                report(StepProgress(self.epoch + 1, step + 1, self.total_steps, float(loss)))
            if (
                preempted
                and save
                and self.step % STEPS_BETWEEN_PREEMPTION_CHECKS == 0
                and self.step < steps
                and preempted()
            ):
                self._agree()
                save(MidEpochState(self.epoch, self.step))
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
        if self.worker.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.worker.world_size
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
        loss = loss * (len(targets) * self.worker.world_size / self.config.data.batch_size)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.config.optim.gradient_clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.tree.parameters(), self.config.optim.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._losses.append((step, rate, cross_entropies(logits_MBK.detach().float(), targets)))
        if self.device.type != "cuda" or len(self._losses) >= STEPS_BETWEEN_LOSS_CHECKS_ON_GPU:
            self._check_losses()
        return loss.detach()

    def _update_weights(self, step: int, inner_batch: Batch, outer_batch: Batch) -> None:
        """Eqs. 5 and 7. Always in float32: a tangent in eight bits of mantissa is mostly noise."""
        wml, rate = self.config.wml, self._learning_rate(step)
        unroll_learning_rate = rate if wml.unroll_learning_rate is None else wml.unroll_learning_rate
        gradient_M = weight_gradient(
            self.tree,
            inner_batch,
            outer_batch,
            self.weights_M,
            wml.alpha,
            unroll_learning_rate,
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
        if self.worker.world_size == 1:
            return
        for buffer in self.tree.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.worker.world_size

    def _wrapped(self) -> nn.Module:
        model: nn.Module = self.tree
        if self.config.optim.compile:
            model = torch.compile(model)  # type: ignore[assignment]
        if self.worker.world_size > 1:
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


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


def _peers(indices: list[int]) -> str:
    return ("peer " if len(indices) == 1 else "peers ") + ", ".join(map(str, indices))
