"""A user's own method, `package.module:Class`."""

import sys
from pathlib import Path

import pytest
from family import SPEC, pruned_tree

from wml_ray.config.load import parse_config, with_values
from wml_ray.config.title import run_title
from wml_ray.errors import UserError
from wml_ray.methods.base import Method, TaughtMethod
from wml_ray.methods.registry import build, method_class
from wml_ray.training.evaluation import metric_names

JOBS = Path(__file__).parents[2] / "jobs"
NAME = "own_method:BestTeaches"


@pytest.fixture
def beside_the_config(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(JOBS)])


def own(**settings):
    return parse_config({"method": {"name": NAME, "settings": settings}})


def built(config):
    return build(config.method.name, pruned_tree(), config.method_settings, SPEC, seed=0)


def test_an_own_method_is_built_with_its_settings(beside_the_config):
    assert built(own(weight=0.5)).settings.model_dump() == {"temperature": 2.0, "weight": 0.5}
    assert "val/accuracy/ensemble_confident" in metric_names(NAME, 4)


def test_settings_are_those_of_the_class(beside_the_config):
    for settings, message in (
        ({"wieght": 1}, r"unknown key 'method\.settings\.wieght'; .* own_method:BestTeaches are: temperature, weight"),
        ({"temperature": 0}, r"method\.settings\.temperature = 0: Input should be greater than 0; correct it"),
    ):
        with pytest.raises(UserError, match=message):
            built(own(**settings))


class Plain(Method):
    pass


class Taught(TaughtMethod):
    pass


def test_a_class_without_settings_has_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    with pytest.raises(UserError, match=r"the settings of mine:Plain are: none"):
        build("mine:Plain", pruned_tree(), {"weight": 1}, SPEC, seed=0)
    assert build("mine:Plain", pruned_tree(), {}, SPEC, seed=0).settings.model_dump() == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nowhere:Class",
            r"method\.name = 'nowhere:Class' cannot be imported: .*; its module must be beside the config",
        ),
        ("json:Nothing", r"method\.name = 'json:Nothing' cannot be imported"),
        ("json:dumps", r"'json:dumps' is not a subclass of wml_ray\.Method"),
        ("json:JSONDecoder", r"'json:JSONDecoder' is not a subclass"),
        ("mine:Taught", r"'mine:Taught' is a TaughtMethod, which only the package can have"),
    ],
)
def test_a_class_that_cannot_be_used_is_refused(name, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    parse_config({"method": {"name": name}})  # a config is read without importing it
    with pytest.raises(UserError, match=message):
        method_class(name)


def test_settings_enter_the_run_id_of_an_own_method_only():
    assert own(weight=0.5).run_id != own(weight=0.6).run_id
    dml = parse_config({"method": {"name": "dml"}})
    kept = parse_config({"method": {"name": "dml", "settings": {"weight": 0.5}}})
    assert kept.run_id == dml.run_id
    assert "settings" not in dml.dump()["method"]
    assert parse_config(kept.dump()) == kept


def test_settings_are_flat_keys_for_overrides_spaces_titles_and_mlflow():
    config = parse_config({"method": {"name": NAME}}, ["method.settings.weight=0.5"])
    assert config == own(weight=0.5)
    assert config.user_functions == {"method.name": NAME}  # its module is found beside the config, and sent with a job
    assert with_values(config, {"method.settings.weight": 0.7}) == own(weight=0.7)
    assert config.flatten()["method.settings.weight"] == 0.5
    assert run_title(config) == "digits-resnet20 method=own_method:BestTeaches weight=0.5"
