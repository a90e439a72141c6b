"""Losses of the methods' public code on the same inputs; published_losses.json says how they were obtained."""

import json
import math
from pathlib import Path

import pytest
import torch
from family import SPEC, pruned_tree

from wml_ray.config.schema import Config
from wml_ray.methods.base import StepContext
from wml_ray.methods.registry import build

PUBLISHED = json.loads((Path(__file__).parent / "published_losses.json").read_text())
LOGITS = torch.tensor(PUBLISHED["inputs"]["logits_MBK"], dtype=torch.float64)
TARGETS = torch.tensor(PUBLISHED["inputs"]["targets_B"])
ON_LOGITS = [case for case in PUBLISHED["cases"] if case["inputs"] == ["logits_MBK"]]


def method_of(case):
    section = type(getattr(Config(), case["method"]))
    return build(case["method"], pruned_tree(), section(**case["settings"]), SPEC, seed=0)


@pytest.mark.parametrize("case", ON_LOGITS, ids=lambda case: f"{case['method']} of {case['repository']}")
def test_a_loss_on_logits_equals_that_of_the_public_code(case):
    logits = LOGITS.clone().requires_grad_()
    context = StepContext(step=0, epoch=case["epoch"], total_epochs=case["total_epochs"], learning_rate=0.1)
    loss = sum(method_of(case).losses({"logits_MBK": logits}, TARGETS, context).values())
    assert math.isclose(loss.item(), case["loss"], rel_tol=1e-10)
    assert math.isclose(loss.item(), case.get("loss_with_their_constant", case["loss"]), rel_tol=1e-6)
    if "gradient_logits_MBK" in case:
        theirs = torch.tensor(case["gradient_logits_MBK"], dtype=torch.float64)
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], theirs, rtol=1e-8, atol=1e-9)
