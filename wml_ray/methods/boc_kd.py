"""BOC-KD (Walawalkar et al., ECCV 2020): compressed peers learn from the mean of all and from the maps of the whole."""

from __future__ import annotations

from torch import Tensor, nn

from wml_ray.errors import UserError
from wml_ray.methods.base import Method, Outputs, StepContext
from wml_ray.methods.checks import check_maps
from wml_ray.methods.feature_settings import BocKdConfig
from wml_ray.methods.losses import average_ensemble, cross_entropies, divergences
from wml_ray.networks.costs import count_params
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec


class BocKd(Method):
    """a sum_i CE(z_i, y) + b sum_(s,c) MSE(adapter(F_s,c), F_s,0) + c sum_i KL_T(z_i <- mean_j z_j).

    (s, c) are the copies off the path of peer 0, the head left out; F_s,c are their maps, F_s,0 is that of peer 0. No
    gradient flows into the maps of peer 0 and the mean. An adapter is a 1x1 convolution.
    """

    settings: BocKdConfig

    def __init__(self, tree: PeerTree, settings: BocKdConfig, spec: ImageSpec) -> None:
        super().__init__(tree, settings, spec)
        params = [count_params(tree.peer(index)) for index in range(tree.num_peers)]
        if params[0] < max(params):
            raise UserError(
                f"method.name = boc_kd needs the largest network as peer 0, whose maps teach, but peer "
                f"{params.index(max(params))} has {max(params):,} parameters and peer 0 {params[0]:,}; let "
                "pruning.ratios begin with the smallest, usually 0"
            )
        maps = self.shapes(tree, spec).maps
        self.adapters = nn.ModuleDict()
        for stage, copies in enumerate(maps):
            for copy in range(1, len(copies)):
                check_maps([copies[0], copies[copy]], "boc_kd")
                self.adapters[f"{stage}_{copy}"] = nn.Conv2d(copies[copy].shape[1], copies[0].shape[1], 1)

    def forward(self, inputs: Tensor) -> Outputs:
        """The logits and, in training, the maps of peer 0 and those of the other copies through their adapters."""
        if not self.training:
            return super().forward(inputs)
        features = self.tree.features(inputs)
        outputs = {"logits_MBK": features.logits_MBK}
        for stage, copies in enumerate(features.maps):
            outputs[f"map{stage}"] = copies[0]
            for copy in range(1, len(copies)):
                outputs[f"adapted{stage}_{copy}"] = self.adapters[f"{stage}_{copy}"](copies[copy])
        return outputs

    def losses(self, outputs: Outputs, targets_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        """a times the cross-entropies, b times the maps' squared distances, c times the divergences from the mean."""
        logits_MBK, settings = outputs["logits_MBK"], self.settings
        maps = logits_MBK.new_zeros(())
        for name in self.adapters:
            teacher = outputs[f"map{name.partition('_')[0]}"].detach()
            maps = maps + (outputs[f"adapted{name}"] - teacher).square().mean()
        from_mean_M = divergences(logits_MBK, average_ensemble(logits_MBK.detach()), settings.temperature)
        return {
            "labels": settings.label_weight * cross_entropies(logits_MBK, targets_B).sum(),
            "maps": settings.map_weight * maps,
            "mutual": settings.mutual_weight * from_mean_M.sum(),
        }
