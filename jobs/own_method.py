"""A method of your own: a loss, its settings, and a prediction. own_method.yaml names it.

wml-ray train jobs/own_method.yaml
"""

import torch

from wml_ray.methods.base import Method
from wml_ray.methods.losses import cross_entropies, divergences
from wml_ray.settings import NonNegative, Positive, Section


class Settings(Section):
    """The keys that `method.settings` may have, with ranges and defaults."""

    temperature: Positive = 2.0
    weight: NonNegative = 1.0


class BestTeaches(Method):
    """sum_i [CE(z_i, y) + w KL_T(z_i <- z_b)]: of each image, the peer b with the smallest loss teaches all others."""

    Settings = Settings
    selects = "ensemble_confident"

    def losses(self, outputs, targets_B, context):
        """Terms by name, each a mean over images; their sum is minimised."""
        logits_MBK = outputs["logits_MBK"]
        log_p_MBK = logits_MBK.detach().log_softmax(-1)
        best_B = log_p_MBK.gather(2, targets_B.expand(len(logits_MBK), -1).unsqueeze(-1)).squeeze(-1).argmax(0)
        teacher_BK = logits_MBK.detach()[best_B, torch.arange(len(targets_B), device=best_B.device)]
        taught_M = divergences(logits_MBK, teacher_BK, self.settings.temperature)
        return {"labels": cross_entropies(logits_MBK, targets_B).sum(), "best": self.settings.weight * taught_M.sum()}

    def predictions(self, outputs):
        """The mean of the peers' probabilities, in which confident peers count more than in a mean of logits."""
        return {"ensemble_confident": outputs["logits_MBK"].softmax(-1).mean(0).log()}

    @staticmethod
    def prediction_names(num_peers):
        """The names of `predictions`; without a batch, as a study asks for them before the first trial."""
        return ("ensemble_confident",)
