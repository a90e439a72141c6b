"""PeerTree: M peers as root-to-leaf paths of one module that holds every copy once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from wml_ray.errors import UserError
from wml_ray.networks.features import Features, pooled_and_logits


class PeerTree(nn.Module):
    """Stages of a backbone with `sharing[s]` copies of stage s; peer i runs through copy `i * sharing[s] // M`.

    Submodules are named `stages.<stage>.<copy>`. A forward pass runs each copy once. With `exits`, peer i runs through
    the first `exits[i]` stages, which have one copy each, and then through its own copy of the last stage.
    """

    def __init__(
        self, build: Callable[[], Mapping[str, nn.Module]], sharing: Sequence[int], exits: Sequence[int] = ()
    ) -> None:
        """`build` returns freshly initialised stages each time it is called. `exits` increase, one a peer, or are none.

        Raises:
            UserError: the number of entries of `sharing` is not the number of stages.
        """
        super().__init__()
        self.sharing = tuple(sharing)
        self.exits = tuple(exits)
        self.divides_gradients = False  # set by trunk_gradient.divide_shared_gradients
        networks = [build() for _ in range(self.num_peers)]
        names = list(networks[0])
        if len(names) != len(self.sharing):
            raise UserError(
                f"model.sharing = {list(self.sharing)} has {len(self.sharing)} entries but the backbone has "
                f"{len(names)} stages ({', '.join(names)}); give one entry a stage"
            )
        self.stages = nn.ModuleDict(
            {
                name: nn.ModuleList(network[name] for network in networks[:copies])
                for name, copies in zip(names, self.sharing, strict=True)
            }
        )

    @property
    def num_peers(self) -> int:
        """The number of peers M."""
        return self.sharing[-1]

    @property
    def shared_stages(self) -> int:
        """Number of stages, from the first on, whose only copy all peers run through; the last stage does not count."""
        return self.exits[0] if self.exits else sum(copies == 1 for copies in self.sharing[:-1])

    def copy_of(self, stage: int, peer: int) -> int:
        """The copy of stage number `stage`, one of its own, that peer `peer` runs through."""
        return peer * self.sharing[stage] // self.num_peers

    def forward(self, inputs: Tensor, own_views: bool = False) -> Tensor:
        """(B, ...) inputs to logits_MBK.

        With `own_views`, peer i runs on part i of (M * B, ...) inputs, and a copy once on the parts of all its peers.
        """
        return torch.stack(self.logits(inputs, own_views))

    def logits(self, inputs: Tensor, own_views: bool = False) -> list[Tensor]:
        """The M peers' logits, (B, K) each, before they are stacked."""
        *_, heads = self._copies()
        entering = self._body(inputs, own_views)
        return [head(tensor) for head, tensor in zip(heads, entering, strict=True)]

    def features(self, inputs: Tensor, own_views: bool = False) -> Features:
        """The logits of `forward`, equal to the bit, with the maps and the peers' features that they are made from."""
        *_, heads = self._copies()
        maps: list[list[Tensor]] = []
        entering = self._body(inputs, own_views, maps)
        pooled, logits = zip(*map(pooled_and_logits, heads, entering), strict=True)
        return Features(maps, list(pooled), torch.stack(logits))

    def path(self, peer: int) -> list[str]:
        """Names of the copies peer `peer` runs through, from the stem to the head."""
        return [f"stages.{name}.{self.copy_of(stage, peer)}" for stage, name in self._stages_on(peer)]

    def peers_through(self, module_name: str) -> frozenset[int]:
        """Peers that run through the copy that holds the submodule or parameter `module_name`."""
        _, stage, copy_index, *_ = module_name.split(".")
        number = list(self.stages).index(stage)
        if self.exits and number < len(self.stages) - 1:
            return frozenset(peer for peer, stages in enumerate(self.exits) if stages > number)
        per_copy = self.num_peers // self.sharing[number]
        return frozenset(range(int(copy_index) * per_copy, (int(copy_index) + 1) * per_copy))

    def peer(self, index: int) -> nn.Sequential:
        """The standalone network of one peer: its own copies of the tensors, outputs equal to the tree's."""
        return nn.Sequential(*self.stages_of(index).values())

    def stages_of(self, peer: int) -> dict[str, nn.Module]:
        """The stages of `peer(peer)` by their names in the tree."""
        names = [name for _, name in self._stages_on(peer)]
        copies = (copy.deepcopy(self.get_submodule(name)) for name in self.path(peer))
        return dict(zip(names, copies, strict=True))

    def _stages_on(self, peer: int) -> list[tuple[int, str]]:
        """Numbers and names of the stages that a peer runs through."""
        stages = list(enumerate(self.stages))
        return [*stages[: self.exits[peer]], stages[-1]] if self.exits else stages

    def _body(self, inputs: Tensor, own_views: bool, maps: list[list[Tensor]] | None = None) -> list[Tensor]:
        """What enters each copy of the last stage; the maps of all stages before it are added to `maps`."""
        *body, heads = self._copies()
        features: list[Tensor] = [inputs]
        entering: list[Tensor] = []
        for number, copies in enumerate(body, start=1):
            features = _run(copies, features, own_views)
            if maps is not None:
                maps.append(features)
            if number in self.exits and own_views:  # the first of the views that are left is that of the exit
                exiting, *others = features[0].chunk(self.num_peers - len(entering))
                entering.append(exiting)
                features = [torch.cat(others)] if others else []
            elif number in self.exits:
                entering.append(features[0])
        return entering if self.exits else _forked(features, len(heads), own_views)

    def _copies(self) -> list[nn.ModuleList]:
        return list(self.stages.values())  # type: ignore[arg-type]


def _run(copies: nn.ModuleList, features: Sequence[Tensor], own_views: bool) -> list[Tensor]:
    return [stage(tensor) for stage, tensor in zip(copies, _forked(features, len(copies), own_views), strict=True)]


def _forked(features: Sequence[Tensor], copies: int, own_views: bool) -> list[Tensor]:
    """The input of each of the `copies` of a stage, from the outputs of the stage before."""
    children = copies // len(features)
    if own_views:
        return [view for tensor in features for view in tensor.chunk(children)]
    return [tensor for tensor in features for _ in range(children)]


@contextmanager
def in_mode(network: nn.Module, training: bool) -> Iterator[None]:
    """Put `network` in training or evaluation mode, and back in the mode it was in at the end."""
    was_training = network.training
    network.train(training)
    try:
        yield
    finally:
        network.train(was_training)


def functional_forward(
    model: nn.Module, parameters: Mapping[str, Tensor], inputs: Tensor, own_views: bool = False
) -> Tensor:
    """Logits_MBK of `model` with `parameters`; its buffers, such as BatchNorm's running statistics, do not change.

    `own_views` is given to the model where it is True.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    outputs = functional_call(model, {**buffers, **parameters}, (inputs,), {"own_views": True} if own_views else {})
    return outputs if isinstance(outputs, Tensor) else torch.stack(list(outputs))


def copy_name(module_name: str) -> str:
    """The copy that holds a submodule: `stages.layer2.0` for `stages.layer2.0.conv1`."""
    return ".".join(module_name.split(".")[:3])


def describe_peers(indices: Sequence[int]) -> str:
    """The words `peer 2` or `peers 0, 3`."""
    return ("peer " if len(indices) == 1 else "peers ") + ", ".join(map(str, indices))
