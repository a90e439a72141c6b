"""On a CUDA GPU: skipped where there is none."""

import pytest
import torch
from family import at_rate, batch, eq_1, pruned_tree, tiny_config
from runs import ignore, only_run

from wml_ray.methods.hypergradient import weight_gradient
from wml_ray.verbs.train import train

pytestmark = pytest.mark.gpu

OMEGA = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("unroll", ["exact", "same_point"])
def test_the_weight_gradient_equals_that_on_the_cpu(unroll):
    inner, outer = batch(8, 1), batch(6, 2)
    settings = eq_1(alpha=0.4, unroll=unroll)
    expected = weight_gradient(pruned_tree(), inner, outer, OMEGA, settings, at_rate(0.3))
    moved = [tuple(part.cuda() for part in pair) for pair in (inner, outer)]
    found = weight_gradient(pruned_tree().cuda(), *moved, OMEGA.cuda(), settings, at_rate(0.3))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-8, atol=1e-10)


def test_in_bfloat16_and_channels_last_the_weight_gradient_is_near_that_in_float32():
    tree = pruned_tree().float().cuda().to(memory_format=torch.channels_last)
    batches = [
        (x.float().cuda().to(memory_format=torch.channels_last), y.cuda()) for x, y in (batch(32, 1), batch(32, 2))
    ]
    settings = eq_1(alpha=0.4, unroll="same_point")
    single, half = (
        weight_gradient(tree, *batches, OMEGA.cuda(), settings, at_rate(0.3)._replace(precision=precision))
        for precision in ("float32", "bfloat16")
    )
    assert (half - single).norm() < 0.02 * single.norm()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_run_on_the_gpu_learns(workplace, precision):
    outcome = train(tiny_config("scale.gpu=true", f"optim.precision={precision}", "optim.epochs=4"), ignore)
    assert outcome.record["device"] == "cuda"
    assert outcome.record["predictions"]["ensemble_weighted"]["test_accuracy"] > 0.6
    assert only_run().info.status == "FINISHED"


def test_a_compiled_step_learns(workplace):
    outcome = train(tiny_config("scale.gpu=true", "optim.compile=true", "optim.epochs=4"), ignore)
    assert outcome.record["predictions"]["ensemble_weighted"]["test_accuracy"] > 0.6


@pytest.mark.slow
def test_one_ray_worker_trains_on_the_gpu(workplace):
    outcome = train(tiny_config("scale.gpu=true", "scale.workers=1", "optim.epochs=2"), ignore)
    assert outcome.record["device"] == "cuda"
