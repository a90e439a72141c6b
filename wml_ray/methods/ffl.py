"""FFL (Kim et al., ICPR 2020): a classifier on the fused last maps of all peers teaches them, and learns from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wml_ray.methods.base import Method, Outputs, StepContext
from wml_ray.methods.checks import check_maps, check_no_exits
from wml_ray.methods.feature_settings import FflConfig
from wml_ray.methods.losses import average_ensemble, cross_entropies, divergences
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec


class Ffl(Method):
    """sum_i CE(z_i, y) + CE(z_f, y) + w r [sum_i KL_T(z_i <- z_f) + KL_T(z_f <- mean_i z_i)].

    z_f are the logits of the fused maps, which are not detached: CE(z_f, y) trains the peers too. No gradient flows
    into the teachers of the divergences. r is the ramp.
    """

    selects: ClassVar[str] = "fused"
    settings: FflConfig

    def __init__(self, tree: PeerTree, settings: FflConfig, spec: ImageSpec) -> None:
        super().__init__(tree, settings, spec)
        check_no_exits(tree, "ffl", "as it fuses the last maps of all peers, which are of one size")
        maps = self.shapes(tree, spec).maps[-1:]
        last = maps[0] if maps else []
        check_maps(last, "ffl")
        self.fusion = fusion([tensor.shape[1] for tensor in last], spec.num_classes)

    def forward(self, inputs: Tensor) -> Outputs:
        """The logits of the peers and of their fused last maps; a map that peers share is there once."""
        features = self.tree.features(inputs)
        return {"logits_MBK": features.logits_MBK, "fused_BK": self.fusion(torch.cat(features.maps[-1], dim=1))}

    def losses(self, outputs: Outputs, targets_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        """The cross-entropies, that of the fused classifier, and w r times the divergences of peers and classifier."""
        logits_MBK, fused_BK, settings = outputs["logits_MBK"], outputs["fused_BK"], self.settings
        taught_M = divergences(logits_MBK, fused_BK.detach(), settings.temperature)
        mean_BK = average_ensemble(logits_MBK.detach())
        share = settings.weight * context.ramp(settings.ramp)
        return {
            "labels": cross_entropies(logits_MBK, targets_B).sum(),
            "fused_labels": F.cross_entropy(fused_BK, targets_B),
            "mutual": share * taught_M.sum(),
            "fused": share * divergences(fused_BK.unsqueeze(0), mean_BK, settings.temperature).sum(),
        }

    def predictions(self, outputs: Outputs) -> dict[str, Tensor]:
        """The classifier of the fused maps."""
        return {"fused": outputs["fused_BK"]}

    @staticmethod
    def prediction_names(num_peers: int) -> tuple[str, ...]:
        return ("fused",)


def fusion(widths: Sequence[int], num_classes: int) -> nn.Sequential:
    """Concatenated maps of these widths to logits, by a separable convolution to the widest."""
    return nn.Sequential(*separable(sum(widths), max(widths)), *classifier(max(widths), num_classes))


def separable(into: int, out: int) -> nn.Sequential:
    """Maps of width `into` to maps of width `out`: a 3x3 convolution by channel and a 1x1 convolution."""
    return nn.Sequential(
        nn.Conv2d(into, into, 3, padding=1, groups=into, bias=False),
        nn.BatchNorm2d(into),
        nn.ReLU(),
        nn.Conv2d(into, out, 1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    )


def classifier(width: int, num_classes: int) -> nn.Sequential:
    """Maps to logits, by the mean over positions."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
