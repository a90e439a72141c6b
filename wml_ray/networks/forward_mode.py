"""Forward-mode differentiation of BatchNorm by the fused kernels of its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class FusedBatchNormTangents(TorchFunctionMode):
    """Within it, the tangent of a BatchNorm in training mode is computed by two fused kernels.

    PyTorch's rule for the same value is a chain of elementwise operations, each of which reads and writes all
    activations; on a CPU it takes most of a tangent pass under autocast. Running statistics are not updated, and no
    backward pass goes through the BatchNorm.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and kwargs["training"]:  # it names all but its first three arguments here
            return _normalised(args[0], kwargs["weight"], kwargs["bias"], kwargs["eps"])
        return func(*args, **kwargs)


def _normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if weight is None:  # without a float32 weight the kernel would keep statistics of bfloat16 inputs in bfloat16
        weight = x.new_ones(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    normalised: Tensor = _TrainingBatchNorm.apply(x, weight, bias, eps)[0]
    return normalised


class _TrainingBatchNorm(torch.autograd.Function):
    """y = w x_hat + b with x_hat = (x - mean) / sqrt(var + eps) over the batch; forward mode only."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, _, ctx.eps = inputs
        _, mean_C, inverse_std_C = output
        ctx.save_for_forward(x, weight, mean_C, inverse_std_C)
        ctx.mark_non_differentiable(mean_C, inverse_std_C)

    @staticmethod
    def jvp(
        ctx: Any, x_tangent: Tensor, weight_tangent: Tensor, bias_tangent: Tensor | None, eps_tangent: None
    ) -> tuple[Tensor, None, None]:
        """dy = w dx_hat + x_hat dw + db.

        The Jacobian of x_hat is symmetric, so the kernel of the backward pass computes w dx_hat from dx; the other two
        terms are a BatchNorm with known statistics. Tensors without a tangent have one of zeros here.
        """
        x, weight, mean_C, inverse_std_C = ctx.saved_tensors
        tangent: Tensor = torch.ops.aten.native_batch_norm_backward(
            x_tangent, x, weight, None, None, mean_C, inverse_std_C, True, ctx.eps, [True, False, False]
        )[0]
        variance_C = inverse_std_C.pow(-2)  # with eps
        tangent += torch.native_batch_norm(x, weight_tangent, bias_tangent, mean_C, variance_C, False, 0.0, 0.0)[0]
        return tangent, None, None
