"""A method of your own: a loss, its settings, and a prediction. own_method.yaml names it.

wml-ray train jobs/own_method.yaml
"""

import torch
import torch.nn.functional as F
from pydantic import Field

from wml_ray import Method, Section


class Settings(Section):
    """The keys that `method.settings` may have, with defaults and ranges."""

    temperature: float = Field(2.0, gt=0)
    weight: float = Field(1.0, ge=0)


class BestTeaches(Method):
    """sum_i [CE(z_i, y) + w KL_T(z_i <- z_b)]: of each image, the peer b with the smallest loss teaches all others."""

    Settings = Settings
    selects = "ensemble_confident"

    def losses(self, outputs, targets_B, context):
        """Terms by name, each a mean over images; their sum is minimised."""
        logits_MBK, temperature = outputs["logits_MBK"], self.settings.temperature
        targets_BM = targets_B.unsqueeze(1).expand(-1, len(logits_MBK))
        losses_BM = F.cross_entropy(logits_MBK.permute(1, 2, 0), targets_BM, reduction="none")
        images_B = torch.arange(len(targets_B), device=targets_B.device)
        teacher_BK = logits_MBK[losses_BM.argmin(1), images_B].detach()
        log_q_MBK, log_p_BK = ((z / temperature).log_softmax(-1) for z in (logits_MBK, teacher_BK))
        kl_MB = (log_p_BK.exp() * (log_p_BK - log_q_MBK)).sum(-1)
        taught = self.settings.weight * temperature**2 * kl_MB.mean(1).sum()
        return {"labels": losses_BM.mean(0).sum(), "best": taught}

    def predictions(self, outputs):
        """The mean of the peers' probabilities, in which confident peers count more than in a mean of logits."""
        return {"ensemble_confident": outputs["logits_MBK"].softmax(-1).mean(0).log()}

    @staticmethod
    def prediction_names(num_peers):
        """The names of `predictions`; without a batch, as a study asks for them before the first trial."""
        return ("ensemble_confident",)
