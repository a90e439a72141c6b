"""Relations between the features of the images of a batch (Park et al., CVPR 2019), for networks of any widths.

Relations are those among a worker's own images. Distances come from differences: the expanded square
|a|^2 - 2ab + |b|^2 loses the digits of near images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def distances(features_BD: Tensor) -> Tensor:
    """Euclidean distances of all pairs, over the mean of the positive ones, (B, B)."""
    distance_BB = torch.cdist(features_BD, features_BD, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distance_BB.sum() / (distance_BB > 0).sum().clamp_min(1)
    return distance_BB / torch.where(mean > 0, mean, 1.0)


def angles(features_BD: Tensor) -> Tensor:
    """cos of the angle at image b between images i and j, (B, B, B) indexed b, i, j; 0 where two of them are equal.

    Holds B^3 numbers. The gradient of equal images is 0.
    """
    difference_BBD = features_BD[None] - features_BD[:, None]
    length_BB1 = torch.linalg.vector_norm(difference_BBD, dim=2, keepdim=True)
    unit_BBD = difference_BBD / torch.where(length_BB1 > 0, length_BB1, 1.0)
    return unit_BBD @ unit_BBD.transpose(1, 2)


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between the relations of two networks, a mean over all pairs or triples; no gradient into `teacher`."""
    return F.smooth_l1_loss(student, teacher.detach())
