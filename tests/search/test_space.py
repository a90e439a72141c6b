"""Search spaces: valid ones map points to configs, all others are refused before the first trial."""

import itertools
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from family import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from ray import tune
from studies import small_space

from wml_ray.cli.main import main
from wml_ray.cluster.space import load_space, make_space
from wml_ray.config.load import load_config
from wml_ray.errors import UserError
from wml_ray.search.ratios import increasing
from wml_ray.search.settings import SearchConfig
from wml_ray.search.space import check_stop_metric, load_start_points
from wml_ray.verbs.tune import check_ratios

ROOT = Path(__file__).parents[2]
ACCURACY = {"val/accuracy/ensemble_weighted": "max"}


@cache
def ratios_space(lower=0.1, upper=0.5):
    return make_space(tiny_config(), {"pruning.ratios": increasing(lower, upper)}, ACCURACY)


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_every_point_gives_increasing_ratios_within_the_bounds(steps):
    ratios = ratios_space().config({f"pruning.ratios.u{i}": step for i, step in enumerate(steps)}).pruning.ratios
    assert list(ratios) == sorted(ratios)
    assert ratios[0] >= 0.1
    assert ratios[-1] <= 0.5


@settings(max_examples=50)
@given(st.lists(st.integers(1000, 5000), min_size=4, max_size=4, unique=True))
def test_increasing_ratios_have_a_point_and_other_orders_of_them_none(numbers):
    space, ratios = ratios_space(), [number / 10000 for number in sorted(numbers)]
    for order in itertools.islice(itertools.permutations(ratios), 5):
        config = tiny_config(f"pruning.ratios={list(order)}")
        if list(order) == ratios:
            assert space.config(space.point(config)).pruning.ratios == pytest.approx(ratios)
        else:
            with pytest.raises(UserError, match="outside the space"):
                space.point(config)


def test_uniform_points_give_the_distribution_of_sorted_uniform_ratios():
    space, random = ratios_space(0.0, 0.5), np.random.default_rng(0)
    points = random.uniform(size=(1000, 4))
    families = [space.values({f"pruning.ratios.u{i}": u for i, u in enumerate(point)}) for point in points]
    ratios = np.array([family["pruning.ratios"] for family in families])
    expected = np.sort(random.uniform(0, 0.5, size=(1000, 4)))
    assert np.quantile(ratios, [0.1, 0.5, 0.9], axis=0) == pytest.approx(
        np.quantile(expected, [0.1, 0.5, 0.9], axis=0), abs=0.03
    )


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ({"wml.alhpa": tune.uniform(0, 1)}, r"unknown key 'wml.alhpa'; did you mean 'wml.alpha'"),
        ({"wml.alpha": tune.uniform(0, 1.5)}, r"wml.alpha = 1.5"),
        ({"wml.kl_direction": tune.choice(["sideways"])}, r"wml.kl_direction = 'sideways'"),
        ({"pruning.ratios": increasing(0, 1)}, r"pruning.ratios"),
        ({"pruning.ratios.7": tune.uniform(0, 0.5)}, r"entries 0 to 3"),
        ({"wml.alpha": increasing(0, 1)}, r"is for pruning.ratios"),
        ({"wml.alpha": 0.5}, r"allowed: tune.uniform"),
        ({"wml.alpha": tune.grid_search([0.1, 0.2])}, r"'wml.alpha'.*; allowed: tune.uniform"),
        ({"wml.alpha": tune.randn(0.5, 0.1)}, r"'wml.alpha'.*; allowed: tune.uniform"),
        ({"wml.alpha": tune.qrandn(0.5, 0.1, 0.1)}, r"'wml.alpha'.*; allowed: tune.uniform"),
        ({"wml.alpha": tune.sample_from(lambda spec: 0.5)}, r"'wml.alpha'.*; allowed: tune.uniform"),
        ({"wml.alpha": tune.qloguniform(0.1, 0.5, 0.1)}, r"no steps on a logarithmic scale; allowed: tune.uniform"),
        ({"wml.update_every": tune.qlograndint(2, 8, 2)}, r"no steps on a logarithmic scale; allowed: tune.uniform"),
        ({"wml.alpha": tune.uniform(0.5, 0.1)}, r"'wml.alpha'.*low.*; allowed: tune.uniform"),
        ({"wml.update_every": tune.uniform(1, 9)}, r"wml.update_every"),
        ({"run.name": tune.choice(["a"])}, r"'run.name' cannot be searched"),
        ({"scale.workers": tune.choice([1, 2])}, r"'scale.workers' cannot be searched"),
        ({"optim.epochs": tune.randint(1, 9)}, r"the budget that all trials share"),
        ({"model.sharing": tune.choice([[1, 2, 4, 4], [1, 2, 2, 2]])}, r"the space contains .* 4 entries but"),
        ({"optim.warmup_epochs": tune.uniform(0, 9)}, r"must be less than optim.epochs"),
        ({}, r"must return a dict"),
        ({1: tune.uniform(0, 1)}, r"key 1 must be a config key"),
        ({"wml.alpha": tune.choice([])}, r"'wml.alpha': The `choices` must contain"),
        ({"wml.alpha": tune.choice(["x" * 10**6])}, r"wml.alpha = 'xxx"),
        ({"wml.update_every": tune.randint(1, 10**400)}, r"wml.update_every = 999"),
        ({"pruning.ratios": increasing(0, None)}, r"'pruning.ratios': increasing\(lower, upper\) .* lower < upper"),
        ({"pruning.ratios": increasing(0, float("nan"))}, r"'pruning.ratios': increasing"),
        (
            {"pruning.ratios": increasing(0, 0.5), "pruning.ratios.0": tune.uniform(0, 0.1)},
            r"'pruning.ratios.0' is a part of 'pruning.ratios', which is searched too",
        ),
    ],
)
def test_a_space_the_config_refuses_is_an_error(domains, message):
    with pytest.raises(UserError, match=message) as raised:
        make_space(tiny_config(), domains, ACCURACY)
    assert len(str(raised.value)) < 1500


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ({"test/accuracy/peer0": "max"}, r"is measured on the test images"),
        ({"val/accuracy/peer9": "max"}, r"is not logged; allowed: val/accuracy/peer0"),
        ({"val/accuracy/peer0": "most"}, r"allowed: 'max', 'min'"),
        ({}, r"OBJECTIVES must be"),
        ({1: "max"}, r"objective '1' is not logged"),
        ({"val/accuracy/peer0": "x" * 10**6}, r"mode 'xxx"),
    ],
)
def test_objectives_are_logged_metrics_but_never_of_the_test_images(objectives, message):
    with pytest.raises(UserError, match=message):
        make_space(tiny_config(), {"wml.alpha": tune.uniform(0, 1)}, objectives)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("OBJECTIVES = {", r"SyntaxError"),
        ("def space(): return 1 / 0\nOBJECTIVES = {}", r"ZeroDivisionError"),
        ("OBJECTIVES = {'val/accuracy/peer0': 'max'}", r"has no 'space'"),
        ("def space(): return {}", r"has no 'OBJECTIVES'"),
        ("import nowhere_to_be_found", r"ModuleNotFoundError"),
    ],
)
def test_a_broken_space_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "space.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        load_space(path, tiny_config())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "while True: pass",
        "def space():\n  while True:\n    try: 1 / 0\n    except BaseException: pass\nOBJECTIVES = {}",
        "import time\ntime.sleep(60)",
    ],
)
def test_an_endless_space_file_is_refused_within_ten_seconds(empty_workplace, text):
    """In a process of its own, with whose end the endless loop ends."""
    (empty_workplace / "space.py").write_text(text)
    script = (
        "import sys\nfrom wml_ray.cluster import space\nfrom wml_ray.config.load import parse_config\n"
        "assert space.RUN_S <= 10\nspace.RUN_S = 0.5\n"
        "try: space.load_space('space.py', parse_config({}))\n"
        "except ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("space file space.py has not ended within 0 s"), ended.stdout


def test_a_mistake_in_the_space_writes_no_file(empty_workplace, capsys):
    (empty_workplace / "c.yaml").write_text("seed: 0")
    (empty_workplace / "s.py").write_text(
        "from ray import tune\nOBJECTIVES = {'val/accuracy/peer0': 'max'}\n"
        "def space(): return {'wml.alpa': tune.uniform(0, 1)}"
    )
    assert main(["tune", "c.yaml", "--space", "s.py", "--trials", "2"]) == 2
    assert "did you mean 'wml.alpha'" in capsys.readouterr().err
    assert sorted(path.name for path in empty_workplace.iterdir()) == ["c.yaml", "s.py"]


def test_lists_are_choices_of_the_sampler_as_json_and_of_the_config_as_lists():
    space = make_space(tiny_config(), {"model.sharing": tune.choice([[1, 2, 4, 4], [4, 4, 4, 4]])}, ACCURACY)
    point = space.point(tiny_config("model.sharing=[4,4,4,4]"))
    assert point == {"model.sharing": "[4, 4, 4, 4]"}
    assert space.config(point).model.sharing == (4, 4, 4, 4)


@pytest.mark.parametrize("settings", [{"trials": 0}, {"trials": 2, "sampler": "best"}, {"trials": 2, "seed": -1}])
def test_an_error_of_the_settings_names_the_setting(settings):
    with pytest.raises(UserError, match=f"{list(settings)[-1]} = "):
        SearchConfig(study="s", **settings)


def test_only_metrics_reported_each_epoch_stop_trials():
    space = ratios_space()
    assert check_stop_metric(SearchConfig(study="s", trials=1, stop_metric="train/loss"), space) == "min"
    with pytest.raises(UserError, match="is not reported each epoch"):
        check_stop_metric(SearchConfig(study="s", trials=1, stop_metric="peers/macs/tree"), space)


@pytest.mark.parametrize("path", sorted((ROOT / "tune_spaces").glob("*.py")), ids=lambda path: path.stem)
def test_each_space_of_tune_spaces_is_valid_for_the_quickstart(path):
    check_ratios(load_space(path, quickstart()))


def test_all_commented_keys_of_the_wml_space_are_valid(tmp_path):
    text = (ROOT / "tune_spaces" / "wml.py").read_text()
    (tmp_path / "all.py").write_text(text.replace('# "', '"'))
    space = load_space(tmp_path / "all.py", quickstart())
    assert len(space.domains) == 8
    check_ratios(space)


def test_ratios_that_cannot_be_reached_are_refused_before_the_first_trial():
    with pytest.raises(UserError, match="reach"):
        check_ratios(ratios_space(0.0, 0.95))


def quickstart():
    return load_config(ROOT / "jobs" / "quickstart.yaml", ["pruning.saliency_images=16"])  # fewer images are faster


def test_a_value_between_the_steps_of_a_domain_is_outside():
    space = make_space(tiny_config(), {"wml.alpha": tune.quniform(0, 1, 0.25)}, ACCURACY)
    assert space.point(tiny_config("wml.alpha=0.75")) == {"wml.alpha": 0.75}
    with pytest.raises(UserError, match=r"wml.alpha = 0.8 is outside the space \(0.0 to 1.0 in steps of 0.25\)"):
        space.point(tiny_config("wml.alpha=0.8"))


def test_a_space_of_several_methods_has_the_metrics_that_all_of_them_log():
    both = {"method.name": tune.choice(["wml", "dml"]), "dml.weight": tune.uniform(0, 2)}
    assert make_space(tiny_config(), both, {"val/accuracy/method": "max"}).methods() == ["wml", "dml"]
    with pytest.raises(UserError, match=r"objective 'val/accuracy/ensemble_weighted' is not logged; allowed: .*method"):
        make_space(tiny_config(), both, ACCURACY)


def test_a_key_of_a_method_that_no_point_has_is_refused():
    with pytest.raises(UserError, match=r"'dml.weight' has no effect with method.name = wml; leave it out"):
        make_space(tiny_config(), {"dml.weight": tune.uniform(0, 2)}, ACCURACY)
    with pytest.raises(UserError, match=r"'method.settings.weight' has no effect with method.name = wml"):
        make_space(tiny_config(), {"method.settings.weight": tune.uniform(0, 2)}, ACCURACY)


def test_the_settings_of_a_method_of_ones_own_are_searched(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "jobs")
    config = tiny_config("method.name=own_method:BestTeaches", "method.settings.weight=1")
    space = make_space(config, {"method.settings.weight": tune.uniform(0, 2)}, {"val/accuracy/method": "max"})
    assert space.config({"method.settings.weight": 0.5}).method.settings == {"weight": 0.5}
    assert space.point(config) == {"method.settings.weight": 1}
    with pytest.raises(UserError, match=r"method\.settings\.weight has no value in the config"):
        space.point(tiny_config("method.name=own_method:BestTeaches"))


def test_optuna_distributions_are_domains():
    space = make_space(tiny_config(), {"wml.alpha": FloatDistribution(0.1, 0.9, log=True)}, ACCURACY)
    assert space.describe() == {"wml.alpha": "0.1 to 0.9, logarithmic"}
    assert space.searched == {"wml.alpha": "log"}


def test_the_upper_bound_of_randint_is_outside_as_in_ray_tune():
    space = make_space(tiny_config(), {"wml.update_every": tune.randint(1, 9)}, ACCURACY)
    assert space.point(tiny_config("wml.update_every=8")) == {"wml.update_every": 8}
    with pytest.raises(UserError, match=r"wml.update_every = 9 is outside the space \(1 to 8\)"):
        space.point(tiny_config("wml.update_every=9"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- wml.alpha: 0.95", r"wml.alpha = 0.95 is outside the space"),
        ("- wml.alpa: 0.5", r"wml.alpa is not searched; allowed: wml.alpha"),
        ("wml.alpha: 1", r"must be a YAML list"),
        ("- wml.alpha: 0.5\n  wml.alpha: 0.6", r"'wml.alpha' is given twice"),
    ],
)
def test_invalid_start_points_are_refused(tmp_path, text, message):
    (tmp_path / "start.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_start_points(tmp_path / "start.yaml", small_space())
