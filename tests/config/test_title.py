"""The name of a run for people."""

from wml_ray.config.load import parse_config
from wml_ray.config.title import MAX_TITLE, run_title


def test_the_title_has_what_differs_from_the_defaults_and_nothing_about_places():
    overrides = ["seed=1", "wml.alpha=0.25", "scale.workers=2", "run.name=other", "data.root=/data", "optim.name=adamw"]
    assert run_title(parse_config({}, overrides)) == "digits-resnet20 optim=adamw alpha=0.25 seed=1"
    assert run_title(parse_config({}, [])) == "digits-resnet20"


def test_the_settings_of_another_method_are_in_the_title_only_where_they_matter():
    assert run_title(parse_config({}, ["method.name=dml"])) == "digits-resnet20 method=dml"


def test_a_title_fits_an_mlflow_run_name():
    copies = {"model": {"sharing": [100] * 5}, "pruning": {"ratios": [0.123] * 100}}
    assert len(run_title(parse_config(copies, []))) == MAX_TITLE
