import math
import tempfile
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

from wml_ray.config.load import describe_keys, known_keys, load_config, parse_config
from wml_ray.errors import UserError
from wml_ray.methods.settings import has_effect

SECTIONS_OUTSIDE_THE_RUN_ID = ("run", "scale")
KEYS_OUTSIDE_THE_RUN_ID = ("data.root", "data.download", "data.loader_workers", "data.cache_gb", "data.cache_path")
BASE = {"optim": {"milestones": [2]}}  # so that every schedule is valid

UNUSUAL = {
    "seed": 7,
    "data": {"batch_size": 32, "flip": True},
    "model": {"backbone": "resnet32", "sharing": [1, 3, 3]},
    "pruning": {"ratios": [1e-05, 0.25, 0.5], "unit": "macs"},
    "wml": {"unroll_learning_rate": 1e-12, "outer_data": "holdout"},
    "optim": {"learning_rate": 3e-4, "schedule": "multistep", "milestones": [5, 9]},
    "scale": {"workers": [1, 4], "cpus_per_worker": 2},
    "run": {"name": "a.b-c_1"},
}


def value_at(config, key):
    value = config
    for part in key.split("."):
        value = getattr(value, part)
    return list(value) if isinstance(value, tuple) else value


def another(value, annotation):
    """A different value of the same type."""
    if get_origin(annotation) is Literal:
        options = get_args(annotation)
        return options[(options.index(value) + 1) % len(options)]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 or 0.5
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, list):
        at = min(1, len(value) - 1)
        return [another(entry, None) if index == at else entry for index, entry in enumerate(value)]
    if isinstance(value, dict):
        return {**value, "x": 1}
    assert value is None
    if "_state_dict_file" in str(annotation):
        path = Path(tempfile.mkdtemp()) / "a.pth"
        path.touch()
        return str(path)
    return "x:y" if "str" in str(annotation) else 100


def with_value(key, value):
    section, _, name = key.rpartition(".")
    return parse_config({**BASE, section: {**BASE.get(section, {}), name: value}} if section else {**BASE, name: value})


@pytest.mark.parametrize("key", [key for key in known_keys() if key != "model.exits"])
def test_the_run_id_depends_on_every_key_that_determines_the_result(key):
    """A setting of another method than the chosen one changes nothing."""
    before = parse_config(BASE)
    value = value_at(before, key)
    after = with_value(key, "dml" if key == "method.name" else another(value, known_keys()[key].annotation))
    assert value_at(after, key) != value_at(before, key)
    in_other_section = key.split(".")[0] in SECTIONS_OUTSIDE_THE_RUN_ID and key != "run.test_epoch"
    stays = key in KEYS_OUTSIDE_THE_RUN_ID or in_other_section or not has_effect(key, "wml")
    assert (after.run_id == before.run_id) == stays


def test_the_run_id_depends_on_the_exits_and_not_on_their_absence():
    family = {"pruning": {"ratios": [0.3, 0.1, 0]}, "model": {"sharing": [1, 1, 1, 1, 3]}}
    ids = [
        parse_config({**family, "model": {**family["model"], "exits": exits}}).run_id
        for exits in ([], [1, 2, 4], [2, 3, 4])
    ]
    assert len(set(ids)) == 3
    assert ids[0] == parse_config(family).run_id


def test_the_run_id_names_data_and_backbone():
    assert parse_config({}).run_id.startswith("digits-resnet20-")
    assert parse_config({"model": {"backbone": "package.module:my_net"}}).run_id.startswith("digits-my_net-")


@pytest.mark.parametrize("settings", [{}, UNUSUAL], ids=["defaults", "unusual"])
def test_a_config_survives_yaml(settings, tmp_path):
    config = parse_config(settings)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    again = load_config(path)
    assert again == config
    assert again.run_id == config.run_id


def test_a_dump_leaves_out_other_methods_unless_they_are_configured():
    assert "dml" not in parse_config({}).dump()
    assert parse_config({}, ["dml.weight=2"]).dump()["dml"]["weight"] == 2
    assert "wml" not in parse_config({}, ["method.name=dml"]).dump()


@pytest.mark.parametrize("settings", [{}, UNUSUAL], ids=["defaults", "unusual"])
def test_flattened_names_are_the_override_keys(settings):
    config = parse_config(settings)
    flat = config.flatten()
    assert {"seed", "wml.alpha", "wml.mirror_step_size", "pruning.ratios.0", "model.sharing.2"} <= flat.keys()
    assert not any(isinstance(value, dict) or (isinstance(value, list) and value) for value in flat.values())
    for key, value in flat.items():
        assert parse_config(settings, [f"{key}={'null' if value is None else value}"]) == config


@pytest.mark.parametrize("part", ["", "wml"])
def test_a_config_is_frozen(part):
    section = getattr(parse_config({}), part) if part else parse_config({})
    with pytest.raises(ValidationError, match="frozen"):
        setattr(section, "alpha" if part else "seed", 1)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=3", "seed", 3),
        ("wml.alpha=0.3", "wml.alpha", 0.3),
        ("optim.learning_rate=1e-3", "optim.learning_rate", 0.001),
        ("wml.unroll_learning_rate=1E-2", "wml.unroll_learning_rate", 0.01),
        ("wml.unroll_learning_rate=null", "wml.unroll_learning_rate", None),
        ("pruning.ratios.0=0.1", "pruning.ratios", [0.1, 0.2, 0.4, 0.6]),
        ("pruning.ratios.3=5e-1", "pruning.ratios", [0.0, 0.2, 0.4, 0.5]),
        ("pruning.ratios=[0, 0, 0, 0.5]", "pruning.ratios", [0.0, 0.0, 0.0, 0.5]),
        ("model.sharing.1=2", "model.sharing", [1, 2, 2, 4, 4]),
        ("data.flip=true", "data.flip", True),
        ("scale.workers=[1, 3]", "scale.workers", [1, 3]),
        ("data.root=a=b", "data.root", "a=b"),
    ],
)
def test_an_override_sets_its_key_and_nothing_else(override, key, value):
    config = parse_config({}, [override])
    assert value_at(config, key) == value
    others = {name for name in known_keys() if name != key}
    assert all(value_at(config, name) == value_at(parse_config({}), name) for name in others)


def test_the_last_override_wins_over_earlier_ones_and_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("wml: {alpha: 0.1, temperature: 2}")
    config = load_config(path, ["wml.alpha=0.2", "wml.alpha=0.3"])
    assert (config.wml.alpha, config.wml.temperature) == (0.3, 2.0)


def test_overrides_leave_the_settings_they_are_applied_to_alone():
    settings = {"pruning": {"ratios": [0.0, 0.1, 0.2, 0.3]}}
    parse_config(settings, ["pruning.ratios.0=0.5", "seed=1"])
    assert settings == {"pruning": {"ratios": [0.0, 0.1, 0.2, 0.3]}}


@pytest.mark.parametrize("overrides", [[], ["wml.alpha=0.3"]])
def test_a_section_left_empty_in_the_file_has_its_defaults(tmp_path, overrides):
    path = tmp_path / "config.yaml"
    path.write_text("seed: 0\nwml:\n  # alpha: 0.9\n")
    assert load_config(path, overrides) == parse_config({}, overrides)


@pytest.mark.parametrize("key", [key for key in known_keys() if isinstance(value_at(parse_config({}), key), float)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_setting_takes_a_number_that_is_not_finite(key, value):
    with pytest.raises(UserError, match=key):
        with_value(key, value)


def test_every_key_is_in_the_table_with_its_meaning():
    rows = {line.split("`")[1]: line for line in describe_keys().splitlines()[2:]}
    assert rows.keys() == known_keys().keys()
    assert all(field.description and field.description in rows[key] for key, field in known_keys().items())


def test_a_method_with_a_teacher_needs_one_teacher():
    with pytest.raises(UserError, match=r"method.name = kd needs a teacher: set teacher.run to the folder or id"):
        parse_config({}, ["method.name=kd"])
    with pytest.raises(UserError, match=r"teacher.run and teacher.function are both set; set one to null"):
        parse_config({}, ["method.name=kd", "teacher.run=x", "teacher.function=a:b"])
    with pytest.raises(UserError, match=r"teacher.function = 'abc'"):
        parse_config({}, ["teacher.function=abc"])


def test_the_run_id_follows_the_teacher_and_not_its_place():
    def run_id(*overrides):
        return parse_config({}, ["method.name=kd", *overrides]).run_id

    taught = run_id("teacher.run=digits-0a1b")
    assert taught == run_id("teacher.run=results/wml/digits-0a1b") == run_id("teacher.run=s3://a/b/digits-0a1b/")
    others = [["teacher.run=digits-0a1c"], ["teacher.run=digits-0a1b", "teacher.peer=1"], ["teacher.function=a:b"]]
    assert len({taught, *(run_id(*overrides) for overrides in others)}) == 4
    assert parse_config({}, ["teacher.run=x"]).run_id == parse_config({}).run_id
    assert "teacher" not in parse_config({}).dump()
    assert parse_config({}, ["method.name=kd", "teacher.run=a/b"]).dump()["teacher"]["run"] == "a/b"
