"""BatchNorm over all workers' images, with reverse- and forward-mode differentiation, on CPU and GPU.

torch.nn.SyncBatchNorm has neither forward mode, which Eq. 5 needs, nor a CPU path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wml_ray.distributed import gather_rows, rank, sum_of_workers
from wml_ray.networks.costs import BATCHNORM


def convert_sync_batchnorm(network: nn.Module) -> None:
    """Replace every BatchNorm of `network` by one over all workers, in place; names and tensors stay."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BATCHNORM) and not isinstance(child, SyncBatchNorm):
                setattr(parent, name, SyncBatchNorm(child))


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose batch is the global batch: the images of all workers, in shares of any size."""

    def __init__(self, local: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__(local.num_features, local.eps, local.momentum, local.affine, local.track_running_stats)
        self.weight, self.bias = local.weight, local.bias
        self.running_mean, self.running_var = local.running_mean, local.running_var
        self.num_batches_tracked = local.num_batches_tracked
        self.after = nn.Sequential(*local.children())  # the activation inside timm's BatchNormAct2d
        self.train(local.training)

    def _check_input_dim(self, input: Tensor) -> None:  # any number of dimensions: it replaces BatchNorm1d, 2d and 3d
        pass

    def forward(self, input: Tensor) -> Tensor:
        """`input` (B, C, ...) normalised with the statistics of the global batch, or with the running statistics."""
        if not self.training:
            return self._activated(super().forward(input))
        values = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input  # as BatchNorm does
        own_var_C, own_mean_C = torch.var_mean(values, [0, *range(2, input.dim())], correction=0)
        count = own_mean_C.new_tensor([input.numel() / self.num_features])
        rows = _AllGather.apply(torch.cat([own_mean_C, own_var_C, count]))
        mean_WC, var_WC, count_W1 = rows.split([self.num_features, self.num_features, 1], dim=1)
        share_W1 = count_W1 / count_W1.sum()
        mean_C = (share_W1 * mean_WC).sum(0)
        var_C = (share_W1 * (var_WC + (mean_WC - mean_C) ** 2)).sum(0)
        self._track(mean_C.detach(), var_C.detach(), count_W1.detach().sum())
        scale_C = torch.rsqrt(var_C + self.eps)
        if self.affine:
            scale_C = scale_C * self.weight
        shift_C = -mean_C * scale_C
        if self.affine:
            shift_C = shift_C + self.bias
        shape = (1, -1, *[1] * (input.dim() - 2))
        normalised: Tensor = values * scale_C.view(shape) + shift_C.view(shape)
        return self._activated(normalised.to(input.dtype))

    def _activated(self, outputs: Tensor) -> Tensor:
        active: Tensor = self.after(outputs)
        return active

    @torch.no_grad()
    def _track(self, mean_C: Tensor, var_C: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean_C, momentum)
        self.running_var.lerp_(var_C * (count / (count - 1).clamp_min(1)), momentum)


class _AllGather(torch.autograd.Function):
    """Rows of all workers, (W, n) from (n,); linear, so forward mode gathers tangents and backward sums gradients."""

    @staticmethod
    def forward(ctx: Any, row: Tensor) -> Tensor:
        return gather_rows(row)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return gather_rows(tangent)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_of_workers(gradient)[rank()]
