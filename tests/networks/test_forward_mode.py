"""Tangents of networks with BatchNorm by fused kernels."""

from contextlib import nullcontext

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call

from wml_ray.networks.forward_mode import FusedBatchNormTangents


class ShiftedBatchNorm(nn.BatchNorm2d):
    """A BatchNorm with a bias and no weight."""

    def __init__(self, width):
        super().__init__(width)
        self.register_parameter("weight", None)


NETWORKS = {
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (5, 3, 6, 6)),
    "input": (lambda: nn.Sequential(nn.BatchNorm2d(3, eps=0.1), nn.Conv2d(3, 4, 3)), (5, 3, 6, 6)),
    "without affine": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), (5, 3, 6, 6)),
    "bias alone": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), ShiftedBatchNorm(4)), (5, 3, 6, 6)),
    "vectors": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), (7, 3)),
}


def tangent(network, inputs, mode, fixed=()):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad(), forward_ad.dual_level(), mode:
        duals = {}
        for name, p in network.named_parameters():
            direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            duals[name] = p.detach() if name in fixed else forward_ad.make_dual(p.detach(), direction)
        return forward_ad.unpack_dual(functional_call(network, duals, (inputs,)))


def made(name):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    network = make().double()
    for p in network.parameters():
        nn.init.normal_(p)
    return network, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_fused_tangent_is_that_of_pytorch(name, training):
    network, inputs = made(name)
    network.train(training)
    for fixed in ((), {"0.weight", "1.bias"}, {"1.weight"}):
        expected, fused = (tangent(network, inputs, m, fixed) for m in (nullcontext(), FusedBatchNormTangents()))
        torch.testing.assert_close(fused.primal, expected.primal, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(fused.tangent, expected.tangent, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["convolution", "without affine", "bias alone"])
def test_under_autocast_values_and_tangents_are_within_the_rounding_of_bfloat16(name):
    network, inputs = made(name)
    network, inputs = network.float(), inputs.float() + 5  # far from 0: bfloat16 statistics would be too coarse
    expected = tangent(network, inputs, nullcontext())
    with torch.autocast("cpu", torch.bfloat16):
        own, fused = (tangent(network, inputs, mode) for mode in (nullcontext(), FusedBatchNormTangents()))
    assert fused.tangent.dtype == torch.bfloat16
    torch.testing.assert_close(fused.primal, own.primal, rtol=0.02, atol=0.02, check_dtype=False)
    assert (fused.tangent.float() - expected.tangent).norm() < 0.05 * expected.tangent.norm()
