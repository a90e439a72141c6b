"""The interface of a method: the losses of the peers of a tree, and the predictions made with them."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from wml_ray.networks.costs import example
from wml_ray.networks.features import Features
from wml_ray.networks.peer_tree import PeerTree, in_mode
from wml_ray.networks.spec import ImageSpec
from wml_ray.settings import Section

Batch = tuple[Tensor, Tensor]
"""Inputs (B, ...) and targets (B,); inputs of a training batch are (M * B, ...) where the peers have own views."""

Outputs = dict[str, Tensor]
"""Tensors by name; "logits_MBK" is among them."""


class StepContext(NamedTuple):
    """The position of a training step in its run. Steps and epochs are counted over the whole run."""

    step: int  # steps done before this one
    epoch: int  # epochs done
    total_epochs: int
    learning_rate: float
    precision: str = "float32"  # type of the forward pass: float32, bfloat16 or float16

    def ramp(self, share: float) -> float:
        """exp(-5 (1 - e / R)^2) at epoch e, with R = `share` of all epochs; 1 from R on (Laine & Aila, ICLR 2017)."""
        epochs = share * self.total_epochs
        return math.exp(-5.0 * (1.0 - self.epoch / epochs) ** 2) if self.epoch < epochs else 1.0


class Teacher(Protocol):
    """A frozen network of P peers, for inputs normalised as those of the run; no gradient flows into or through it.

    It is no module: no state dict, optimiser, DistributedDataParallel or `train()` reaches it.
    """

    tree: PeerTree

    def logits(self, inputs: Tensor) -> Tensor:
        """(B, ...) inputs to logits (P, B, K)."""

    def features(self, inputs: Tensor) -> Features:
        """(B, ...) inputs to the features of the teacher's tree."""


class NonFinite(ArithmeticError):
    """A quantity of the method is not finite; the message names it."""


class Method(nn.Module):
    """A method of training a peer tree. A loss-only method overrides `losses` alone.

    The training loop calls `forward` under autocast, inside torch.compile and DistributedDataParallel, and everything
    else outside of them, on outputs in float32 or more.
    """

    selects: ClassVar[str] = "ensemble_average"
    """The prediction that is logged as `val/accuracy/method` and decides which epoch is best."""

    Settings: ClassVar[type[Section]] = Section
    """The class of `settings` of a user's own method; methods of the package have sections of the config."""

    deploys: ClassVar[str] = "tree"
    """The submodule, a tree like `tree`, that is evaluated and deployed: its tensors are `model.safetensors`."""

    outer_batch_interval: int | None = None
    """After every so many steps, `after_step` receives a batch of the outer split."""

    own_views: bool = False
    """In training, each peer receives an augmented view of its own: inputs are (M * B, ...), the views of peer 0 first,
    and targets (B,). Outer and evaluation batches have one view."""

    extra_copies: int = 0
    """Tensors of the size of all parameters that `after_step` holds at a time, for the estimate of memory."""

    def __init__(self, tree: PeerTree, settings: Section, spec: ImageSpec) -> None:
        """`tree` is already pruned; `settings` is the method's own section of the config.

        Modules, parameters and buffers that a subclass registers are trained, saved and resumed with the tree. A buffer
        registered on the method itself must be equal on all workers; buffers of its modules are averaged over them.
        """
        super().__init__()
        self.tree = tree
        self.settings = settings

    def forward(self, inputs: Tensor) -> Outputs:
        """(B, ...) inputs to the outputs that `losses` and `predictions` need; (M * B, ...) inputs with own views."""
        return {"logits_MBK": self.tree(inputs, self.own_views_now)}

    @property
    def own_views_now(self) -> bool:
        """True where inputs hold a view for each peer: in training, if the method wants them."""
        return self.own_views and self.training

    @property
    def num_views(self) -> int:
        """Views of each image in a training batch."""
        return self.tree.num_peers if self.own_views else 1

    def losses(self, outputs: Outputs, targets_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        """Terms by name, each of shape (), a mean over this worker's images; their sum is minimised."""
        raise NotImplementedError

    def predictions(self, outputs: Outputs) -> dict[str, Tensor]:
        """Logits (B, K) by name, besides those of the peers and of `ensemble_average`; names as `prediction_names`."""
        return {}

    @staticmethod
    def prediction_names(num_peers: int) -> tuple[str, ...]:
        """Names of `predictions`, known without a batch."""
        return ()

    def metrics(self) -> dict[str, float]:
        """Further metrics of an epoch, under their MLflow names; names as `metric_names`."""
        return {}

    @staticmethod
    def metric_names(num_peers: int) -> tuple[str, ...]:
        """Names of `metrics`, known without a run."""
        return ()

    def after_step(self, context: StepContext, batch: Batch, outer_batch: Batch | None) -> None:
        """Called after each optimiser step with the batch it was taken on.

        Raises:
            NonFinite: a quantity of the method is not finite.
        """

    def deployed_state(self) -> dict[str, Tensor]:
        """Parameters and buffers of the deployed tree, named as in `tree`."""
        return dict(self.get_submodule(self.deploys).state_dict())

    def own_state(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, without those of the deployed tree."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(f"{self.deploys}.")}

    @staticmethod
    @torch.no_grad()
    def shapes(tree: PeerTree, spec: ImageSpec) -> Features:
        """The features of one black image in evaluation mode: the widths and sizes for modules of a method."""
        with in_mode(tree, training=False):
            return tree.features(example(tree, spec))


class TaughtMethod(Method):
    """A method with a frozen teacher. Its `forward` may ask the teacher in training mode only."""

    needs_features: ClassVar[bool] = False
    """The teacher is one network of several stages, for its maps and its feature."""

    starts_as_teacher: ClassVar[bool] = False
    """The teacher is the whole tree of an independent run of the same family, and the peers start with its tensors."""

    teacher: Teacher

    def __init__(self, tree: PeerTree, settings: Section, spec: ImageSpec, teacher: Teacher) -> None:
        super().__init__(tree, settings, spec)
        self.teacher = teacher
