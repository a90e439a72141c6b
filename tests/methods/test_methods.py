"""Each method against its slow twin, and the properties that every method has."""

import re
from pathlib import Path

import pytest
import torch
from family import SPEC, batch, pruned_tree, teacher_for, tree_for

from wml_ray.config.schema import Config
from wml_ray.methods.base import StepContext
from wml_ray.methods.registry import METHODS, build
from wml_ray.methods.settings import METHOD_NAMES, DmlConfig
from wml_ray.training.evaluation import evaluate, metric_names

FIRST_STEP = StepContext(step=0, epoch=0, total_epochs=10, learning_rate=0.1)


def method_of(name, settings=None):
    return build(name, tree_for(name), settings or getattr(Config(), name), SPEC, 0, teacher_for(name)).double()


def test_every_method_of_the_config_is_built():
    assert tuple(METHODS) == METHOD_NAMES
    assert all(name in Config.model_fields for name in METHOD_NAMES)


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_evaluates_and_logs_is_known_without_a_batch(name):
    method = method_of(name)
    inputs, targets = batch(6)
    outputs = method(inputs.repeat(method.num_views, 1, 1, 1))
    assert tuple(method.predictions(outputs)) == method.prediction_names(4)
    assert tuple(method.metrics()) == method.metric_names(4)
    logged = [*evaluate(method, [(inputs, targets)]).metrics("val"), *method.metrics()]
    assert set(logged) <= set(metric_names(name, 4))
    assert "val/accuracy/method" in logged


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_has_a_gradient_in_each_step(name):
    method, (inputs, targets) = method_of(name), batch(4)
    outputs = method(inputs.repeat(method.num_views, 1, 1, 1))
    sum(method.losses(outputs, targets, FIRST_STEP).values()).backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in method.parameters())


def test_the_loss_only_method_of_the_guide_is_a_method():
    guide = Path(__file__).parents[2] / "docs" / "adding-a-method.md"
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", guide.read_text(), flags=re.DOTALL)[1], names)
    method, (inputs, targets) = names["Independent"](pruned_tree(), DmlConfig(), SPEC), batch(4)
    outputs = method(inputs)
    terms = method.losses(outputs, targets, FIRST_STEP)
    expected = sum(torch.nn.functional.cross_entropy(logits, targets) for logits in outputs["logits_MBK"])
    torch.testing.assert_close(terms["labels"], expected)
    assert "accuracy/method" in str(evaluate(method, [(inputs, targets)]).metrics("val"))
