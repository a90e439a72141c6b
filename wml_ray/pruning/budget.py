"""The number of channels each group keeps so that a peer loses its ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd

import torch

from wml_ray.config.schema import PruningConfig
from wml_ray.errors import UserError
from wml_ray.networks.costs import WEIGHTED, LayerCost
from wml_ray.networks.peer_tree import PeerTree, copy_name
from wml_ray.pruning.channels import ChannelGroup, Side

KERNEL_CHANNELS = 16
"""Channels that a vector of AVX-512 holds; two vectors of AVX2, and two of the 8 that a GPU's tensor cores ask for."""


class PeerBudget:
    """Decides the channels kept in those groups of one peer that no peer of a smaller ratio shares.

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
        self.costs = {name: cost for name, cost in costs.items() if copy_name(name) in path}
        self.filters = [
            name for name in self.costs if isinstance(tree.get_submodule(name), WEIGHTED) and name not in heads
        ]
        self.groups = [group for group in groups if peer in group.peers]
        self.free = [group for group in self.groups if group.kept is None]
        layer_importance = torch.tensor([float(group.importance.mean()) for group in self.groups], dtype=torch.float64)
        relative = layer_importance / layer_importance.mean().clamp_min(1e-300)
        self.losing = {g: float(1 / (1 + i)) for g, i in zip(self.groups, relative, strict=True)}

    def fit(self) -> None:
        """Set `kept` of the groups.

        Raises:
            UserError: the ratio is out of reach.
        """
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
            fewest = -(-self.config.min_channels // group.unit)
            kept[group] = min(self._rounded(max(wanted, fewest), group.unit), group.size)
        return kept

    def _rounded(self, kept: int, unit: int) -> int:
        """`kept`, counted in units of channels, rounded up as `round_to` says."""
        multiple = KERNEL_CHANNELS if self.config.round_to == "auto" else self.config.round_to
        step = multiple // gcd(multiple, unit)
        narrow = self.config.round_to == "auto" and kept < step
        return kept if narrow else -(-kept // step) * step

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
