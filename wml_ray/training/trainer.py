"""One worker's training in plain PyTorch, without cluster, tracking or files; `report` is its only output."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wml_ray.config.schema import Config
from wml_ray.data.dataset import Dataset
from wml_ray.data.splits import Split, seed_for
from wml_ray.distributed import WorkerRank, mean_of_workers
from wml_ray.errors import UserError
from wml_ray.methods.base import Batch, Method, NonFinite, StepContext
from wml_ray.methods.losses import cross_entropies
from wml_ray.networks.sync_batchnorm import convert_sync_batchnorm
from wml_ray.training.divergence import DivergenceMonitor, diverged
from wml_ray.training.evaluation import evaluate
from wml_ray.training.events import EpochEnd, MidEpochState, OnEvent, Preempted, StepProgress
from wml_ray.training.optimizer import learning_rate, make_optimizer
from wml_ray.training.precision import forward, resolve_precision
from wml_ray.training.state import (
    below,
    load_method,
    load_optimizer,
    load_scaler,
    optimizer_state,
    prefixed,
    scaler_state,
)

PROGRESS_INTERVAL_S = 0.5  # seconds between two progress reports
STEPS_BETWEEN_PREEMPTION_CHECKS = 25  # a notice of preemption usually comes a minute ahead
STEPS_BETWEEN_LOSS_CHECKS_ON_GPU = 50

SaveMidEpoch = Callable[[MidEpochState], None]


def check_batch_shares(config: Config, dataset: Dataset, num_workers: int) -> None:
    """Check that each worker receives at least the two images of a batch that BatchNorm needs.

    Raises:
        UserError: too many workers for the batch size.
    """
    smallest = dataset.outer_batch_size  # at most data.batch_size
    if smallest < 2 * num_workers:
        outer = smallest < config.data.batch_size
        batches, larger = ("outer batches", "wml.outer_share") if outer else ("batches", "data.batch_size")
        raise UserError(
            f"scale.workers = {num_workers} is too many for {batches} of {smallest} images: BatchNorm needs two images "
            f"a worker; use fewer workers or a larger {larger}"
        )


class Trainer:
    """The training loop of one worker: method, optimiser, and the number of epochs and steps done."""

    def __init__(
        self,
        config: Config,
        method: Method,
        dataset: Dataset,
        device: torch.device,
        worker: WorkerRank | None = None,
        precision: str | None = None,
    ) -> None:
        """`method` holds the pruned tree, equal on every worker; with several, torch.distributed is initialised.

        `precision` is the type that the run began with; None chooses it for `device`.

        Raises:
            UserError: too many workers for the batch size.
        """
        self.config, self.dataset, self.device = config, dataset, device
        self.worker = worker or WorkerRank()
        check_batch_shares(config, dataset, self.worker.world_size)
        memory_format = torch.channels_last if config.optim.channels_last else torch.contiguous_format
        self.method = method.to(device=device, memory_format=memory_format).train()  # type: ignore[call-overload]
        self.tree = self.method.tree
        if config.optim.sync_batchnorm and self.worker.world_size > 1:
            convert_sync_batchnorm(self.method)
        self.optimizer = make_optimizer(config.optim, self.method)
        self.precision = precision or resolve_precision(config.optim.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "float16")
        self.epoch = 0  # epochs done
        self.step = 0  # steps done of the next epoch
        self._loss_sums: dict[str, Tensor] = {}  # of each term, over those steps
        self._model = self._wrapped()
        self._monitor = DivergenceMonitor(method, STEPS_BETWEEN_LOSS_CHECKS_ON_GPU if device.type == "cuda" else 1)

    @property
    def total_steps(self) -> int:
        """Training steps of the whole run."""
        return self.config.optim.epochs * self.dataset.steps_per_epoch

    def fit(self, report: OnEvent, preempted: Preempted | None = None, save: SaveMidEpoch | None = None) -> None:
        """Train the remaining epochs. `save` is called on all workers when `preempted` returns True.

        Raises:
            Diverged: a loss, a parameter or a quantity of the method is not finite.
        """
        while self.epoch < self.config.optim.epochs:
            training_metrics = self._train_epoch(report, preempted, save)
            self._monitor.check_parameters(self._context(self.step - 1))
            self._average_buffers()
            training_metrics["train/learning_rate"] = self._context(self.step - 1).learning_rate
            self.epoch, self.step, self._loss_sums = self.epoch + 1, 0, {}
            report(EpochEnd(self.epoch, self.evaluate("validation") | self.method.metrics() | training_metrics))

    def evaluate(self, split: Split) -> dict[str, float]:
        """Accuracies on a split, under their MLflow names; in float32, as networks are exported."""
        prefix = {"validation": "val", "test": "test"}[split]
        batches = self.dataset.evaluation_batches(split, self.worker)
        return evaluate(self.method, batches).metrics(prefix)

    def train_step(self, context: StepContext, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step. Returns the terms of this worker's loss, scaled so that their mean over workers is the
        loss of the whole batch.
        """
        inputs, targets = batch
        for group in self.optimizer.param_groups:
            group["lr"] = context.learning_rate
        outputs = forward(self._model, inputs, self.precision)
        share = len(targets) * self.worker.world_size / self.config.data.batch_size
        terms = {name: term * share for name, term in self.method.losses(outputs, targets, context).items()}
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(reduce(add, terms.values())).backward()
        if self.config.optim.gradient_clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.method.parameters(), self.config.optim.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._monitor.record(context, cross_entropies(outputs["logits_MBK"].detach(), targets))
        return {name: term.detach() for name, term in terms.items()}

    def model_state(self) -> dict[str, Tensor]:
        """The tensors of the deployed tree, by name."""
        return dict(self.method.deployed_state())

    def state(self) -> dict[str, Tensor]:
        """All further tensors that a resumed run needs."""
        return {
            **prefixed("method", self.method.own_state()),
            **prefixed("loss_sum", self._loss_sums),
            **optimizer_state(self.method, self.optimizer),
            **scaler_state(self.scaler),
            "epoch": torch.tensor(self.epoch),
            "step": torch.tensor(self.step),
        }

    def load_state(self, model: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Continue from the tensors that `model_state` and `state` returned."""
        load_method(self.method, model, state)
        load_optimizer(self.method, self.optimizer, state)
        load_scaler(self.scaler, state)
        self.epoch, self.step = int(state["epoch"]), int(state["step"])
        self._loss_sums = {name: tensor.to(self.device).clone() for name, tensor in below("loss_sum", state).items()}

    def _train_epoch(self, report: OnEvent, preempted: Preempted | None, save: SaveMidEpoch | None) -> dict[str, float]:
        """Mean losses and images a second, over all workers."""
        steps, first = self.dataset.steps_per_epoch, self.step
        torch.manual_seed(seed_for(self.config.seed, "dropout", self.epoch, self.worker.rank, first))
        outer_batches = self._outer_batches()
        start_s = last_report_s = time.perf_counter()
        for batch in self.dataset.train_batches(self.epoch, self.worker, first, self.method.num_views):
            context = self._context(self.step)
            terms = self.train_step(context, batch)
            for name, term in terms.items():
                self._loss_sums[name] = self._loss_sums.get(name, 0.0) + term.double()
            self._after_step(context, batch, outer_batches(context))
            self.step += 1
            if self.worker.rank == 0 and time.perf_counter() - last_report_s >= PROGRESS_INTERVAL_S:
                last_report_s = time.perf_counter()
                loss = float(reduce(add, terms.values()))
                report(StepProgress(self.epoch + 1, context.step + 1, self.total_steps, loss))
            check_due = self.step % STEPS_BETWEEN_PREEMPTION_CHECKS == 0 and self.step < steps
            if preempted and save and check_due and preempted():
                self._synchronise()
                save(MidEpochState(self.epoch, self.step))
        self._monitor.check_losses()
        # sorted, as a checkpoint returns the terms in the order of their names: a resumed epoch adds them in that order
        means = {name: float(mean_of_workers(total)) / steps for name, total in sorted(self._loss_sums.items())}
        metrics = {"train/loss": sum(means.values())}
        if len(means) > 1:
            metrics |= {f"train/loss_{name}": mean for name, mean in means.items()}
        images = (steps - first) * self.config.data.batch_size
        return metrics | {"train/images_per_second": images / (time.perf_counter() - start_s)}

    def _outer_batches(self) -> Callable[[StepContext], Batch | None]:
        """The outer batch of a step of this epoch, or None where the method receives none."""
        interval = self.method.outer_batch_interval
        if interval is None:
            return lambda context: None
        begin = self.epoch * self.dataset.steps_per_epoch
        used = (begin + self.step) // interval - begin // interval
        batches = self.dataset.outer_batches(self.epoch, self.worker, used)
        return lambda context: next(batches) if (context.step + 1) % interval == 0 else None

    def _after_step(self, context: StepContext, batch: Batch, outer_batch: Batch | None) -> None:
        try:
            self.method.after_step(context, batch, outer_batch)
        except NonFinite as error:
            self._monitor.check_losses()  # on a GPU the loss that caused it may not have been checked yet
            raise diverged(str(error), context) from None

    def _synchronise(self) -> None:
        """Make everything that a checkpoint holds finite and equal on all workers."""
        self._monitor.check_losses()
        self._monitor.check_parameters(self._context(self.step - 1))
        self._average_buffers()
        self._loss_sums = {name: mean_of_workers(total) for name, total in self._loss_sums.items()}

    def _average_buffers(self) -> None:
        """Give every worker the mean of the workers' running statistics, so that all evaluate the same network."""
        for name, buffer in self.method.named_buffers():
            if buffer.is_floating_point() and "." in name:  # the method's own are equal, and averaging would round them
                buffer.copy_(mean_of_workers(buffer))

    def _context(self, step: int) -> StepContext:
        """The context of step `step` of the current epoch."""
        number = self.epoch * self.dataset.steps_per_epoch + step
        rate = learning_rate(self.config.optim, number, self.dataset.steps_per_epoch)
        return StepContext(number, self.epoch, self.config.optim.epochs, rate, self.precision)

    def _wrapped(self) -> nn.Module:
        model: nn.Module = self.method
        if self.config.optim.compile:
            model = torch.compile(model)  # type: ignore[assignment]
        if self.worker.world_size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            model = DistributedDataParallel(
                model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        return model
