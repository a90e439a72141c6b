"""Pruning at initialisation: SNIP saliency -> how many channels each layer keeps -> a physically smaller tree.

Torch-Pruning (imported here alone) says which channels must move together; how many go, and which, is decided here.
The result is a plan of widths, plain data: the same tree cut to the same widths loads the same tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wml_ray.backbones import ImageSpec
from wml_ray.config import PruningConfig, UserError
from wml_ray.costs import BATCHNORM, CONV, WEIGHTED, LayerCost, example, layer_costs, width
from wml_ray.tree import PeerTree, pure_forward

Side = Literal["out", "in"]
Plan = dict[str, list[int]]  # module name -> [output width, input width] of every module whose width changes


def prune(tree: PeerTree, config: PruningConfig, spec: ImageSpec, batches: Sequence[tuple[Tensor, Tensor]]) -> Plan:
    """Remove channels of `tree` in place so that each peer loses at least its ratio, and return the plan.

    `batches` are the (inputs, targets) the saliency is taken on. A peer overshoots its ratio by less than what the
    last channels removed are worth; copies shared with a peer of a smaller ratio keep what that peer keeps.

    Raises:
        UserError: a ratio that `min_channels`, `round_to` and the shared copies put out of reach.
    """
    if not any(config.ratios):
        return {}
    costs = layer_costs(tree, spec)
    heads = head_names(tree, costs, spec)
    groups = channel_groups(tree, heads, spec)
    score(groups, saliency(tree, batches))
    for peer in sorted(range(tree.num_peers), key=lambda peer: config.ratios[peer]):
        PeerBudget(tree, peer, groups, costs, heads, config).fit()
    return _remove(tree, groups)


def apply_plan(tree: PeerTree, plan: Mapping[str, Sequence[int]]) -> None:
    """Cut a freshly built tree to the widths of `plan`; its tensors are then for the caller to load.

    Raises:
        ValueError: the plan does not belong to this network.
    """
    modules = dict(tree.named_modules())
    for name, (out, into) in plan.items():
        module = modules.get(name)
        if not isinstance(module, (*WEIGHTED, *BATCHNORM)) or out > width(module, "out") or into > width(module, "in"):
            raise ValueError(f"the channel plan gives '{name}' {out} x {into} channels, which this network cannot have")
        _narrow(module, torch.arange(out), torch.arange(into))


def head_names(tree: PeerTree, costs: Mapping[str, LayerCost], spec: ImageSpec) -> list[str]:
    """The layers that give the logits: the last weighted layer to run in each copy of the last stage.

    Raises:
        UserError: that layer has not one output a class.
    """
    last_in_copy = {_copy_of(name): name for name in costs if isinstance(tree.get_submodule(name), WEIGHTED)}
    heads = [last_in_copy.get(tree.path(peer)[-1], "") for peer in range(tree.num_peers)]
    for head in heads:
        if not head or costs[head].out != spec.num_classes:
            raise UserError(
                f"the last stage of model.backbone ends in {head or 'no weighted layer'}; it must end in a linear or "
                f"convolution layer with one output a class ({spec.num_classes})"
            )
    return heads


def saliency(tree: PeerTree, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """SNIP's |w * dL/dw| of every parameter (Lee et al. 2019), L the summed cross-entropy of all peers."""
    parameters = {name: p.detach().requires_grad_() for name, p in tree.named_parameters()}
    gradients = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for inputs, targets in batches:
        loss = sum(F.cross_entropy(logits, targets) for logits in pure_forward(tree, parameters, inputs))
        assert isinstance(loss, Tensor)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for name, gradient in zip(parameters, found, strict=True):
            gradients[name] += gradient / len(batches)
    return {name: (p.detach() * gradients[name]).abs() for name, p in parameters.items()}


@dataclass(eq=False)
class ChannelGroup:
    """Channels that go together: one residual stream, or the width between two layers."""

    size: int
    peers: frozenset[int]  # those that run through any member
    members: list[tuple[str, Side, Tensor]]  # module, side, indices there of each channel: (size, indices a channel)
    importance: Tensor = field(default_factory=lambda: torch.empty(0))  # I_f of each channel, (size,)
    kept: int | None = None  # channels that stay; None until the peer that decides has been fitted


def channel_groups(tree: PeerTree, heads: Sequence[str], spec: ImageSpec) -> list[ChannelGroup]:
    """The prunable channel groups of the whole tree; a group through anything but plain layers is left out."""
    import torch_pruning

    was_training = tree.training
    graph = torch_pruning.DependencyGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of parameters outside plain layers, which are left whole here
        graph.build_dependency(
            tree, example(tree, spec), forward_fn=lambda model, images: model.logits(images), verbose=False
        )
    tree.train(was_training)
    names = {module: name for name, module in tree.named_modules()}
    ignored = [tree.get_submodule(head) for head in heads]
    found = graph.get_all_groups(ignored_layers=ignored, root_module_types=list(WEIGHTED))
    groups = (_channel_group(tree, graph, group, names) for group in found)
    return [group for group in groups if group is not None]


def _channel_group(tree: PeerTree, graph: Any, found: Any, names: Mapping[nn.Module, str]) -> ChannelGroup | None:
    size = len(found[0].idxs)
    members: list[tuple[str, Side, Tensor]] = []
    for item in found:
        module = item.dep.target.module
        if isinstance(module, nn.Parameter):
            return None
        if module not in names or not any(True for _ in module.parameters()):
            continue  # an addition, an activation, a pooling
        side: Side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        by_channel = torch.tensor(item.root_idxs).argsort(stable=True)
        if not _is_prunable(module) or len(by_channel) % size:
            return None
        if side == "out" and isinstance(module, WEIGHTED) and len(by_channel) != width(module, "out"):
            return None
        members.append((names[module], side, torch.tensor(item.idxs)[by_channel].view(size, -1)))
    peers = frozenset[int]().union(*(tree.peers_through(name) for name, _, _ in members))
    return ChannelGroup(size, peers, members)


def _is_prunable(module: nn.Module) -> bool:
    if isinstance(module, CONV) and module.groups > 1:
        return module.groups == module.in_channels == module.out_channels
    return isinstance(module, (*WEIGHTED, *BATCHNORM))


def score(groups: Sequence[ChannelGroup], saliencies: Mapping[str, Tensor]) -> None:
    """Set I_f: the summed saliency of a filter's weights, averaged over the layers whose channels are tied."""
    for group in groups:
        scores = [
            saliencies[f"{name}.weight"].flatten(1).sum(1).cpu()[indices].sum(1)
            for name, side, indices in group.members
            if side == "out" and saliencies[f"{name}.weight"].dim() > 1
        ]
        group.importance = torch.stack(scores).mean(0)
        assert group.importance.isfinite().all(), f"saliency of {group.members[0][0]} is not finite"


class PeerBudget:
    """Decides the groups of one peer that no peer of a smaller ratio has decided before it.

    With I_l the mean of I_f over a group and I their mean over the peer's groups, a group loses the share
    min(1, c / (1 + I_l / I)): nothing where c = 0, and always more where importance is less. c is the smallest that
    removes the peer's ratio.
    """

    def __init__(
        self,
        tree: PeerTree,
        peer: int,
        groups: Sequence[ChannelGroup],
        costs: Mapping[str, LayerCost],
        heads: Sequence[str],
        config: PruningConfig,
    ) -> None:
        self.tree, self.peer, self.config = tree, peer, config
        path = set(tree.path(peer))
        self.costs = {name: cost for name, cost in costs.items() if _copy_of(name) in path}
        self.filters = [
            name for name in self.costs if isinstance(tree.get_submodule(name), WEIGHTED) and name not in heads
        ]
        self.groups = [group for group in groups if peer in group.peers]
        self.free = [group for group in self.groups if group.kept is None]
        layer_importance = torch.tensor([float(group.importance.mean()) for group in self.groups], dtype=torch.float64)
        relative = layer_importance / layer_importance.mean().clamp_min(1e-300)
        self.losing = {g: float(1 / (1 + i)) for g, i in zip(self.groups, relative, strict=True)}

    def fit(self) -> None:
        full = self._cost({group: group.size for group in self.groups})
        allowed = full * (1 - self.config.ratios[self.peer]) * (1 + 1e-12)
        low, high = 0.0, 1 / min(self.losing.values(), default=1.0)
        if self._cost(self._kept(low)) <= allowed:
            high = low
        elif self._cost(self._kept(high)) > allowed:
            raise self._out_of_reach(1 - self._cost(self._kept(high)) / max(full, 1))
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (low, middle) if self._cost(self._kept(middle)) <= allowed else (middle, high)
        for group, kept in self._kept(high).items():
            group.kept = kept

    def _kept(self, strength: float) -> dict[ChannelGroup, int]:
        """Channels each group keeps at strength c."""
        kept = {group: group.kept for group in self.groups if group.kept is not None}
        for group in self.free:
            wanted = group.size - int(group.size * min(1.0, strength * self.losing[group]) + 1e-9)
            step = self.config.round_to
            wanted = -(-max(wanted, self.config.min_channels) // step) * step
            kept[group] = min(wanted, group.size)
        return kept

    def _cost(self, kept: Mapping[ChannelGroup, int]) -> int:
        """The peer's channels, params or MACs with these channels kept."""
        widths: dict[tuple[str, Side], int] = {}
        for name, cost in self.costs.items():
            widths[name, "out"], widths[name, "in"] = cost.out, cost.into
        for group, channels in kept.items():
            for name, side, indices in group.members:
                if (name, side) in widths:
                    widths[name, side] -= (group.size - channels) * indices.shape[1]
        if self.config.unit == "channels":
            return sum(widths[name, "out"] for name in self.filters)
        count = LayerCost.params if self.config.unit == "params" else LayerCost.macs
        return sum(count(cost, widths[name, "out"], widths[name, "in"]) for name, cost in self.costs.items())

    def _out_of_reach(self, reachable: float) -> UserError:
        ratio, unit = self.config.ratios[self.peer], self.config.unit
        return UserError(
            f"pruning.ratios.{self.peer} = {ratio} is out of reach: peer {self.peer} can lose at most "
            f"{int(reachable * 1000) / 1000} of its {unit} with model.sharing = {list(self.tree.sharing)} (a "
            f"shared copy keeps what the smallest ratio leaves), pruning.min_channels = {self.config.min_channels} and "
            f"pruning.round_to = {self.config.round_to}; lower this ratio, or loosen one of these"
        )


def _remove(tree: PeerTree, groups: Sequence[ChannelGroup]) -> Plan:
    modules = dict(tree.named_modules())
    stays: dict[tuple[str, Side], Tensor] = {}
    for group in groups:
        if group.kept is None or group.kept == group.size:
            continue
        removed = group.importance.argsort(descending=True, stable=True)[group.kept :]
        for name, side, indices in group.members:
            mask = stays.setdefault((name, side), torch.ones(width(modules[name], side), dtype=torch.bool))
            mask[indices[removed].flatten()] = False
    plan: Plan = {}
    for name, module in modules.items():
        if (name, "out") in stays or (name, "in") in stays:
            out = stays.get((name, "out"), torch.ones(width(module, "out"), dtype=torch.bool))
            into = stays.get((name, "in"), torch.ones(width(module, "in"), dtype=torch.bool))
            _narrow(module, out.nonzero().flatten(), into.nonzero().flatten())
            plan[name] = [width(module, "out"), width(module, "in")]
    return plan


def _narrow(module: nn.Module, out: Tensor, into: Tensor) -> None:
    """Keep the output channels `out` and the input channels `into` of one layer."""
    pairs = True  # whether the weight has an input side of its own
    if isinstance(module, BATCHNORM):
        module.num_features, pairs = len(out), False
    elif isinstance(module, CONV) and module.groups > 1:
        module.out_channels = module.in_channels = module.groups = len(out)
        pairs = False
    elif isinstance(module, CONV):
        module.out_channels, module.in_channels = len(out), len(into)
    else:
        assert isinstance(module, nn.Linear)
        module.out_features, module.in_features = len(out), len(into)
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(module, name, None)
        if tensor is None:
            continue
        kept = tensor.detach()[out.to(tensor.device)]
        if pairs and name == "weight":
            kept = kept[:, into.to(tensor.device)]
        kept = kept.contiguous()
        setattr(module, name, nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept)


def _copy_of(module_name: str) -> str:
    """`stages.layer2.0.conv1` -> `stages.layer2.0`."""
    return ".".join(module_name.split(".")[:3])
