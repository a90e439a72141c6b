"""Losses of the methods' public code on the same inputs; published_losses.json says how they were obtained."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from family import SPEC, enumerate_names, exits_of_one_network, stages, teacher_for

from wml_ray.config.schema import Config
from wml_ray.methods.base import StepContext
from wml_ray.methods.feature_settings import SelfDistillationConfig
from wml_ray.methods.registry import build
from wml_ray.networks.peer_tree import PeerTree

PUBLISHED = json.loads((Path(__file__).parent / "published_losses.json").read_text())
LOGITS = torch.tensor(PUBLISHED["inputs"]["logits_MBK"], dtype=torch.float64)
TARGETS = torch.tensor(PUBLISHED["inputs"]["targets_B"])
ON_LOGITS = [case for case in PUBLISHED["cases"] if case["inputs"] == ["logits_MBK"]]


def method_of(case, sharing=(4, 4, 4, 4)):
    section = type(getattr(Config(), case["method"]))
    tree = PeerTree(lambda: dict(enumerate_names(stages(SPEC))), sharing)
    return build(case["method"], tree, section(**case["settings"]), SPEC, 0, teacher_for(case["method"]))


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


def test_kd_equals_that_of_public_code():
    (case,) = (case for case in PUBLISHED["cases"] if case["method"] == "kd")
    logits, context = LOGITS.clone().requires_grad_(), StepContext(0, case["epoch"], case["total_epochs"], 0.1)
    teacher = torch.tensor(PUBLISHED["inputs"]["ema_logits_MBK"][0], dtype=torch.float64)
    loss = sum(method_of(case).losses({"logits_MBK": logits, "teacher_BK": teacher}, TARGETS, context).values())
    assert math.isclose(loss.item(), case["loss"], rel_tol=1e-10)
    theirs = torch.tensor(case["gradient_logits_MBK"], dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], theirs, rtol=1e-8, atol=1e-9)


def test_rkd_equals_that_of_its_authors():
    (case,) = (case for case in PUBLISHED["cases"] if case["method"] == "rkd")
    *students, teacher = torch.tensor(PUBLISHED["inputs"]["pooled_MBC"], dtype=torch.float64)
    pooled = {f"pooled{peer}": student.requires_grad_() for peer, student in enumerate(students)}
    outputs = {"logits_MBK": LOGITS[:3], **pooled, "teacher_pooled": teacher}
    context = StepContext(0, case["epoch"], case["total_epochs"], 0.1)
    loss = sum(method_of(case, sharing=[3, 3, 3, 3]).losses(outputs, TARGETS, context).values())
    assert math.isclose(loss.item(), case["loss"], rel_tol=1e-6)
    gradients = torch.stack(torch.autograd.grad(loss, list(pooled.values())))
    torch.testing.assert_close(
        gradients, torch.tensor(case["gradient_pooled_MBC"], dtype=torch.float64), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize(
    "case",
    [case for case in PUBLISHED["cases"] if case["method"] == "self_distillation"],
    ids=lambda case: case["repository"],
)
def test_self_distillation_equals_the_public_code_of_sd_and_scan(case):
    """Without the term of features in the code of SD."""
    pooled = torch.tensor(PUBLISHED["inputs"]["pooled_MBC"], dtype=torch.float64).requires_grad_()
    logits = LOGITS.clone().requires_grad_()
    settings = SelfDistillationConfig(**case["settings"])
    method = build("self_distillation", exits_of_one_network(), settings, SPEC, 0)
    outputs = {"logits_MBK": logits, **{f"adapted{i}": pooled[i] for i in range(3)}, "last_BD": pooled[3]}
    loss = sum(method.losses(outputs, TARGETS, StepContext(0, case["epoch"], case["total_epochs"], 0.1)).values())
    assert math.isclose(loss.item(), case["loss"], rel_tol=1e-10)
    for leaf, name in ((logits, "logits_MBK"), (pooled, "pooled_MBC")):
        theirs = torch.tensor(case[f"gradient_{name}"], dtype=torch.float64)
        torch.testing.assert_close(torch.autograd.grad(loss, leaf, retain_graph=True)[0], theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["fitnets", "boc_kd"])
def test_a_loss_on_maps_equals_that_of_the_public_code(name):
    """The adapters are two 1x1 convolutions, and the last stage has a copy for each peer."""
    (case,) = (case for case in PUBLISHED["cases"] if case["method"] == name)
    given = {key: torch.tensor(PUBLISHED["inputs"][key], dtype=torch.float64) for key in case["inputs"]}
    logits, maps, taught = (given[key].requires_grad_() for key in ("logits_MBK", "last_maps_MBCHW", "leader_map_BCHW"))
    pairs = zip(maps, given["pointwise_weight"].split(2, dim=1), strict=True)
    adapted = [F.conv2d(one, weight) for one, weight in pairs]
    if name == "fitnets":
        num_peers, outputs = 2, {"hint0": adapted[0], "hint1": adapted[1], "teacher_map": taught}
    else:
        num_peers, outputs = 3, {"adapted2_1": adapted[0], "adapted2_2": adapted[1], "map2": taught}
    outputs["logits_MBK"] = logits[:num_peers]
    method = method_of(case, sharing=[1, 1, num_peers, num_peers])
    loss = sum(method.losses(outputs, TARGETS, StepContext(0, case["epoch"], case["total_epochs"], 0.1)).values())
    assert math.isclose(loss.item(), case["loss"], rel_tol=1e-10)
    of_logits, of_maps, of_taught = torch.autograd.grad(loss, (logits, maps, taught), allow_unused=True)
    for ours, key in ((of_logits[:num_peers], "logits_MBK"), (of_maps, "last_maps_MBCHW")):
        theirs = torch.tensor(case[f"gradient_{key}"], dtype=torch.float64)
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    assert of_taught is None
