"""The title of a run."""

from wml_ray.config.load import parse_config
from wml_ray.config.title import MAX_TITLE, run_title


def test_the_title_has_what_differs_from_the_defaults_and_nothing_about_places():
    overrides = ["seed=1", "wml.alpha=0.25", "scale.workers=2", "run.name=other", "data.root=/data", "optim.name=adamw"]
    assert run_title(parse_config({}, overrides)) == "digits-resnet20 alpha=0.25 optim=adamw seed=1"
    assert run_title(parse_config({}, [])) == "digits-resnet20"


def test_the_method_comes_first_and_settings_of_other_methods_are_left_out():
    overrides = ["optim.epochs=4", "wml.alpha=0.2", "dml.weight=2", "method.name=dml"]
    assert run_title(parse_config({}, overrides)) == "digits-resnet20 method=dml weight=2 epochs=4"


def test_a_title_fits_an_mlflow_run_name():
    copies = {"model": {"sharing": [64] * 5}, "pruning": {"ratios": [0.123] * 64}}
    assert len(run_title(parse_config(copies, []))) == MAX_TITLE


def test_a_teacher_is_shown_by_its_run_id():
    config = parse_config({}, ["method.name=kd", "teacher.run=results/wml/digits-0a1b", "teacher.peer=1"])
    assert run_title(config) == "digits-resnet20 method=kd teacher=digits-0a1b peer=1"
