"""Each method's loss and its gradients against the slow twin."""

import math

import pytest
import torch
from family import SPEC, batch, teacher_for, tree_for
from methods import slow_methods

from wml_ray.config.schema import Config
from wml_ray.methods.base import StepContext
from wml_ray.methods.registry import METHODS, build

CASES = [
    ("independent", {}),
    ("dml", {}),
    ("dml", {"temperature": 3.0, "weight": 0.4}),
    ("dml", {"weight": 0.0}),
    ("cl_ilr", {}),
    ("cl_ilr", {"temperature": 3.0, "alpha": 0.8}),
    ("kdcl", {}),
    ("kdcl", {"temperature": 1.5, "alpha": 0.2}),
    ("kd", {}),
    ("kd", {"temperature": 1.0, "alpha": 0.3}),
    ("peer_to_peer", {}),
    ("peer_to_peer", {"temperature": 1.0, "teacher_weight": 0.7, "mutual_weight": 0.3}),
    ("rkd", {}),
    ("rkd", {"distance_weight": 2.0, "angle_weight": 0.5}),
    ("fitnets", {}),
    ("fitnets", {"weight": 0.3, "stage": 1}),
    ("ctsl_mkt", {}),
    ("one", {}),
    ("one", {"temperature": 1.5, "weight": 0.4, "ramp": 0.8}),
    ("okddip", {}),
    ("okddip", {"leader": 1, "weight": 0.4, "stop_gradient_teacher": True, "key_width": 3}),
    ("pcl", {}),
    ("pcl", {"temperature": 1.5, "weight": 0.4, "ramp": 0.8}),
    ("ffl", {}),
    ("ffl", {"temperature": 1.5, "weight": 0.4, "ramp": 0.8}),
    ("ffsd", {}),
    ("ffsd", {"leader": 1, "weight": 0.4, "diversity_weight": 5.0, "decoder_weight": 3.0, "ramp": 0.8}),
    ("self_distillation", {}),
    (
        "self_distillation",
        {"label_weight": 0.5, "divergence_weight": 0.5, "feature_weight": 0.3, "temperature": 1.5},
    ),
    ("boc_kd", {}),
    ("boc_kd", {"label_weight": 1.0, "map_weight": 0.3, "mutual_weight": 0.6, "temperature": 3.0}),
    ("ctsl_mkt", {"mutual_weight": 0.4, "angle_weight": 3.0, "self_weight": 2.0, "temperature": 1.5}),
]
"""A method and the settings that differ from its defaults."""

IMAGES = 5


def method_of(name, settings):
    section = getattr(Config(), name)
    return build(
        name, tree_for(name), type(section)(**{**section.model_dump(), **settings}), SPEC, 0, teacher_for(name)
    ).double()


def outputs_of(method):
    """The outputs of a random batch as leaves in float64, so that the loss can be differentiated by each."""
    with torch.no_grad():
        outputs = method(batch(IMAGES * method.num_views)[0])
    return {
        name: (3 * tensor).requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in outputs.items()
    }


@pytest.mark.parametrize("epoch", [0, 1, 7])
@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_loss_and_gradients_equal_the_slow_twin(name, settings, epoch):
    method, targets = method_of(name, settings), batch(IMAGES)[1]
    outputs, context = outputs_of(method), StepContext(step=4 * epoch, epoch=epoch, total_epochs=10, learning_rate=0.1)
    ours = sum(method.losses(outputs, targets, context).values())
    twin = slow_methods.TWINS[name](method, outputs, targets, context)
    torch.testing.assert_close(ours, twin, rtol=1e-10, atol=0)
    own = [p for name, p in method.named_parameters() if not name.startswith("tree.") and p.requires_grad]
    leaves = [tensor for tensor in outputs.values() if tensor.requires_grad] + own
    for one, other in zip(_gradients(ours, leaves), _gradients(twin, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def _gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def test_every_method_but_wml_has_a_twin_and_a_case():
    assert set(slow_methods.TWINS) == {name for name, _ in CASES} == METHODS.keys() - {"wml"}


def test_the_ramp_rises_from_exp_minus_5_to_1_and_stays_there():
    values = [StepContext(0, epoch, 10, 0.1).ramp(0.4) for epoch in range(11)]
    assert values[0] == math.exp(-5)
    assert math.isclose(values[2], math.exp(-1.25))
    assert values[:5] == sorted(set(values[:5]))
    assert values[4:] == [1.0] * 7
