"""Tangents of networks with BatchNorm by fused kernels."""

from contextlib import nullcontext

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call

from wml_ray.networks.forward_mode import FusedBatchNormTangents

NETWORKS = {
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (5, 3, 6, 6)),
    "input": (lambda: nn.Sequential(nn.BatchNorm2d(3, eps=0.1), nn.Conv2d(3, 4, 3)), (5, 3, 6, 6)),
    "without affine": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), (5, 3, 6, 6)),
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


def test_the_fused_tangent_under_autocast_is_within_the_rounding_of_bfloat16():
    network, inputs = made("convolution")
    network, inputs = network.float(), inputs.float()
    expected = tangent(network, inputs, nullcontext()).tangent
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tangent(network, inputs, FusedBatchNormTangents()).tangent
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - expected).norm() < 0.02 * expected.norm()
