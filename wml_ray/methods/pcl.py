"""PCL (Wu & Gong, AAAI 2021): peers on views of their own learn from a classifier on all features and from averages.

The averages are exponential moving averages of the peers' parameters. They are what is evaluated and deployed.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wml_ray.methods.base import Batch, Method, Outputs, StepContext
from wml_ray.methods.feature_settings import PclConfig
from wml_ray.methods.losses import cross_entropies, divergences, divergences_from_others
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec


class Pcl(Method):
    """sum_i [CE(z_i, y) + w r (KL_T(z_i <- z_e) + mean_{j != i} KL_T(z_i <- zbar_j))] + CE(z_e, y).

    z_e = Linear(concatenated features of all peers), which are not detached; zbar_j are the logits of the average of
    peer j. No gradient flows into the teachers of the divergences. r is the ramp.
    """

    deploys: ClassVar[str] = "average"
    own_views = True
    settings: PclConfig

    def __init__(self, tree: PeerTree, settings: PclConfig, spec: ImageSpec) -> None:
        super().__init__(tree, settings, spec)
        self.average = copy.deepcopy(tree).requires_grad_(False)
        width = sum(pooled.shape[1] for pooled in self.shapes(tree, spec).pooled)
        self.classifier = nn.Linear(width, spec.num_classes)

    def forward(self, inputs: Tensor) -> Outputs:
        """The logits of the peers in training, of the averages in evaluation; those of the classifier, and in training
        of the averages on the peers' views.
        """
        features = self.tree.features(inputs, self.own_views_now)
        with torch.no_grad():
            average_MBK = self.average(inputs, self.own_views_now)
        classifier_BK = self.classifier(torch.cat(features.pooled, dim=1))
        if not self.training:
            return {"logits_MBK": average_MBK, "classifier_BK": classifier_BK}
        return {"logits_MBK": features.logits_MBK, "classifier_BK": classifier_BK, "average_MBK": average_MBK}

    def losses(self, outputs: Outputs, targets_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        """The cross-entropies, that of the classifier, and w r times the divergences from classifier and averages."""
        logits_MBK, classifier_BK, settings = outputs["logits_MBK"], outputs["classifier_BK"], self.settings
        from_classifier_M = divergences(logits_MBK, classifier_BK.detach(), settings.temperature)
        from_averages_M = divergences_from_others(logits_MBK, settings.temperature, outputs["average_MBK"])
        share = settings.weight * context.ramp(settings.ramp)
        return {
            "labels": cross_entropies(logits_MBK, targets_B).sum(),
            "classifier_labels": F.cross_entropy(classifier_BK, targets_B),
            "classifier": share * from_classifier_M.sum(),
            "averages": share * from_averages_M.sum(),
        }

    @torch.no_grad()
    def after_step(self, context: StepContext, batch: Batch, outer_batch: Batch | None) -> None:
        """average <- a average + (1 - a) parameters, a = min(1 - 1 / (t + 1), decay): a plain mean at first.

        Running statistics of BatchNorm are not averaged; in training the averages collect their own.
        """
        decay = min(1.0 - 1.0 / (context.step + 1), self.settings.decay)
        torch._foreach_lerp_(list(self.average.parameters()), list(self.tree.parameters()), 1.0 - decay)

    def predictions(self, outputs: Outputs) -> dict[str, Tensor]:
        """The classifier on the features of all peers."""
        return {"ensemble_classifier": outputs["classifier_BK"]}

    @staticmethod
    def prediction_names(num_peers: int) -> tuple[str, ...]:
        return ("ensemble_classifier",)
