"""Each method against its slow twin, and the properties that every method has."""

import re
from pathlib import Path

import pytest
import reference
import torch
from family import SPEC, batch, pruned_tree, some_teacher

from wml_ray.config.schema import Config
from wml_ray.methods.base import StepContext
from wml_ray.methods.registry import METHODS, build
from wml_ray.methods.settings import DmlConfig, MethodConfig
from wml_ray.training.evaluation import evaluate, metric_names

FIRST_STEP = StepContext(step=0, epoch=0, total_epochs=10, learning_rate=0.1)


def method_of(name, settings=None):
    return build(name, pruned_tree(), settings or getattr(Config(), name), SPEC, 0, some_teacher())


def test_every_method_of_the_config_is_built():
    names = MethodConfig.model_json_schema()["properties"]["name"]["enum"]
    assert list(METHODS) == names
    assert all(name in Config.model_fields for name in names)


@pytest.mark.parametrize(
    "settings", [DmlConfig(), DmlConfig(temperature=3.0, weight=0.4), DmlConfig(weight=0.0)], ids=str
)
def test_dml_and_its_gradients_equal_the_slow_twin(settings):
    method, (inputs, targets) = method_of("dml", settings), batch(5)
    parameters = list(method.parameters())
    terms = method.losses(method(inputs), targets, FIRST_STEP)
    ours = torch.autograd.grad(sum(terms.values()), parameters)
    loss = reference.dml_loss(method(inputs)["logits_MBK"], targets, settings.temperature, settings.weight)
    twin = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(sum(terms.values()), loss, rtol=1e-10, atol=0)
    for one, other in zip(ours, twin, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_a_single_peer_learns_from_the_labels_alone_with_dml():
    method, targets = method_of("dml"), torch.tensor([1, 2])
    terms = method.losses({"logits_MBK": torch.randn(1, 2, 10)}, targets, FIRST_STEP)
    assert terms["mutual"] == 0


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_evaluates_and_logs_is_known_without_a_batch(name):
    method = method_of(name)
    inputs, targets = batch(6)
    outputs = method(inputs)
    assert tuple(method.predictions(outputs)) == method.prediction_names(4)
    assert tuple(method.metrics()) == method.metric_names(4)
    logged = [*evaluate(method, [(inputs, targets)], "float32").metrics("val"), *method.metrics()]
    assert set(logged) <= set(metric_names(name, 4))
    assert "val/accuracy/method" in logged


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_has_a_gradient_in_each_step(name):
    method, (inputs, targets) = method_of(name), batch(4)
    sum(method.losses(method(inputs), targets, FIRST_STEP).values()).backward()
    assert all(parameter.grad is not None for parameter in method.parameters())


def test_the_loss_only_method_of_the_guide_is_a_method():
    guide = Path(__file__).parents[2] / "docs" / "adding-a-method.md"
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", guide.read_text(), flags=re.DOTALL)[1], names)
    method, (inputs, targets) = names["Independent"](pruned_tree(), DmlConfig(), SPEC), batch(4)
    outputs = method(inputs)
    terms = method.losses(outputs, targets, FIRST_STEP)
    expected = sum(torch.nn.functional.cross_entropy(logits, targets) for logits in outputs["logits_MBK"])
    torch.testing.assert_close(terms["labels"], expected)
    assert "accuracy/method" in str(evaluate(method, [(inputs, targets)], "float32").metrics("val"))
