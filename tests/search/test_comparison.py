"""The points of a comparison, and the small space of each method."""

import pytest
from family import tiny_config

from wml_ray.config.load import known_keys
from wml_ray.data.load import load_dataset
from wml_ray.errors import UserError
from wml_ray.methods.settings import METHOD_NAMES, TEACHER_METHODS
from wml_ray.search.comparison import comparison_of, make_comparison, tuning_study
from wml_ray.search.method_spaces import METHOD_SPACES, method_space, start_at_config
from wml_ray.search.settings import CompareConfig, SearchConfig
from wml_ray.search.space import check_space, result_settings
from wml_ray.training.start import initial_checkpoint
from wml_ray.verbs.compare import check_rows

OBJECTIVES = {"val/accuracy/method": "max"}


def compared(*methods, config=None, **settings):
    return comparison_of(config or tiny_config(), CompareConfig(study="c", methods=methods, **settings))


def test_each_method_has_the_same_seeds_and_all_other_settings_of_the_config():
    comparison = compared("wml", "independent", "dml", seeds=3, config=tiny_config("seed=5", "method.name=dml"))
    points = comparison.points()
    assert [(point["variant"], point["seed"]) for point in points[:4]] == [
        *(("wml", 5), ("independent", 5), ("dml", 5), ("wml", 6))
    ]
    assert len(points) == 9
    sections = {*METHOD_NAMES, "method", "seed"}
    for point in points:
        config = comparison.config(point)
        assert (config.method.name, config.seed) == (point["variant"], point["seed"])
        shared = {key: value for key, value in result_settings(config).items() if key.split(".")[0] not in sections}
        own = result_settings(tiny_config()).items()
        assert shared == {key: value for key, value in own if key.split(".")[0] not in sections}


def test_all_methods_of_a_seed_start_from_the_same_tree_plan_and_split():
    comparison = compared("wml", "independent", "dml", "cl_ilr", seeds=2)
    starts = {}
    for point in comparison.points():
        config = comparison.config(point)
        dataset = load_dataset(config)
        starts.setdefault(point["seed"], []).append((initial_checkpoint(config, dataset), dataset))
    for (first, data), *others in starts.values():
        for other, same in others:
            assert other.metadata["channels"] == first.metadata["channels"]
            assert all(tensor.equal(other.model[name]) for name, tensor in first.model.items())
            assert all(indices.equal(same.splits[split]) for split, indices in data.splits.items())
    (one, _), (other, _) = (seed[0] for seed in starts.values())
    assert not all(tensor.equal(other.model[name]) for name, tensor in one.model.items())


def test_a_key_adds_a_row_for_each_value_to_the_methods_that_it_affects():
    comparison = compared("wml", "dml", keys=["wml.alpha=0.1,0.3 wml.temperature=3", "pruning.ratios=[0,0.1,0.2,0.2]"])
    assert list(comparison.variants) == [
        *("wml", "wml alpha=0.1 temperature=3", "wml alpha=0.3 temperature=3", "wml ratios=[0,0.1,0.2,0.2]"),
        *("dml", "dml ratios=[0,0.1,0.2,0.2]"),
    ]
    config = comparison.config({"variant": "wml alpha=0.3 temperature=3", "seed": 0})
    assert (config.wml.alpha, config.wml.temperature) == (0.3, 3.0)
    assert comparison.config({"variant": "wml", "seed": 0}).wml.alpha == tiny_config().wml.alpha
    assert comparison.config({"variant": "dml ratios=[0,0.1,0.2,0.2]", "seed": 0}).pruning.ratios == (0, 0.1, 0.2, 0.2)


def test_a_setting_of_an_own_method_adds_no_row_to_the_methods_of_the_package():
    comparison = compared("wml", "own_method:BestTeaches", keys=["method.settings.weight=0.3"])
    assert list(comparison.variants) == ["wml", "own_method:BestTeaches", "own_method:BestTeaches weight=0.3"]


def test_a_method_that_refuses_the_tree_of_an_earlier_row_is_found_before_the_first_trial():
    with pytest.raises(UserError, match="boc_kd"):
        check_rows(compared("wml", "boc_kd", config=tiny_config("pruning.ratios=[0.3,0.1,0.2,0.2]")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ["wml", "dlm"]}, "method.name = 'dlm'"),
        ({"keys": ["dml.weight=2"]}, r"--key dml\.weight has no effect with --methods wml; add its method"),
        ({"keys": ["optim.epochs=1,2"]}, r"--key optim\.epochs cannot differ in a comparison: it is the budget"),
        ({"keys": ["seed=1"]}, r"--key seed cannot differ .* see --seeds"),
        ({"keys": ["method.name=dml"]}, r"--key method\.name cannot differ .* --methods"),
        ({"keys": ["scale.workers=2"]}, r"--key scale\.workers cannot differ"),
        ({"keys": ["wml.alpha"]}, r"--key 'wml\.alpha' must have the form"),
        ({"keys": ["wml.alpha=0.1,2"]}, r"wml\.alpha = 2"),
        ({"keys": ["wml.alfa=0.1"]}, r"did you mean 'wml\.alpha'"),
        ({"seeds": 0}, "seeds = 0"),
        ({"tune": -1}, "tune = -1"),
        ({"methods": ["wml", "kd"]}, "kd needs a teacher of each seed: add independent to --methods"),
    ],
    ids=lambda value: str(next(iter(value.values()))) if isinstance(value, dict) else "",
)
def test_a_mistake_is_refused_before_the_first_trial(settings, message):
    with pytest.raises(UserError, match=message):
        compared(*settings.pop("methods", ["wml"]), **settings)


def test_a_method_with_a_teacher_is_taught_by_independent_training_of_its_seed():
    comparison = compared("kd", "independent", "wml", seeds=2)
    points = comparison.points()
    assert [point["variant"] for point in points[-2:]] == ["kd", "kd"]
    for point in points[-2:]:
        needed = comparison.needed_point(point)
        assert needed in points[:-2]
        assert (needed["variant"], needed["seed"]) == ("independent", point["seed"])
        assert comparison.config(point).teacher.run == comparison.config(needed).run_id
    assert [comparison.needed_point(point) for point in points[:-2]] == [None] * 4


def test_a_method_that_goes_on_from_its_teacher_is_taught_by_all_peers():
    comparison = compared("ctsl_mkt", "kd", "independent", seeds=1)
    peers = {point["variant"]: comparison.config(point).teacher.peer for point in comparison.points()}
    assert (peers["ctsl_mkt"], peers["kd"]) == (None, 0)


def test_a_continued_comparison_keeps_its_rows_and_seeds_after_those_of_the_command():
    merged = compared("dml", "wml", seeds=1).including(
        {"wml": {"method.name": "wml"}, "kdcl": {"method.name": "kdcl"}}, [3]
    )
    assert list(merged.variants) == ["dml", "wml", "kdcl"]
    assert merged.seeds == (0, 3)


def test_the_point_of_a_config_is_found():
    comparison = compared("wml", "dml", seeds=2)
    assert [comparison.point(comparison.config(point)) for point in comparison.points()] == comparison.points()
    with pytest.raises(UserError, match="none of those that are compared"):
        comparison.point(tiny_config("seed=9"))


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_the_small_space_of_a_method_holds_the_learning_rate_and_the_config(method):
    teacher = ["teacher.function=a.b:c"] if method in TEACHER_METHODS else []
    config = tiny_config(f"method.name={method}", "optim.learning_rate=0.01", *teacher)
    space = method_space(config, OBJECTIVES)
    check_space(space, method)
    assert next(iter(space.domains)) == "optim.learning_rate"
    assert {key.partition(".")[0] for key in space.domains} <= {"optim", method}
    (start,) = start_at_config(space)
    assert space.config(start) == config


def test_what_a_row_is_named_after_is_not_searched():
    assert set(method_space(tiny_config(), OBJECTIVES, fixed=["wml.alpha"]).domains) == {"optim.learning_rate"}


def test_the_small_spaces_are_of_methods_and_keys_that_exist():
    assert METHOD_SPACES.keys() <= set(METHOD_NAMES)
    assert {key for space in METHOD_SPACES.values() for key in space} <= known_keys().keys()


def test_a_space_is_widened_to_the_config_where_its_scale_allows_that():
    config = tiny_config("wml.alpha=0.9")
    space = method_space(config, OBJECTIVES)
    assert space.config(start_at_config(space)[0]) == config
    assert start_at_config(method_space(tiny_config("wml.alpha=0"), OBJECTIVES)) == []


def test_the_source_of_a_comparison_names_its_rows_and_seeds():
    assert make_comparison(tiny_config(), {"a": {"method.name": "dml"}}, [4]).source == (
        "variants:\n  a:\n    method.name: dml\nseeds:\n- 4\n"
    )


def test_rows_of_many_keys_are_tuned_in_studies_of_different_names():
    rows = [f"wml {' '.join(f'wml.alpha={i}' for i in range(count))}" for count in (1, 40, 41)]
    names = [SearchConfig(study=tuning_study("digits-compare", row), trials=1).study for row in rows]
    assert len(set(names)) == 3
