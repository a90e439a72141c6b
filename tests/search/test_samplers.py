"""The samplers of a study: the spaces that they refuse, and the points that they suggest."""

import optuna
import pytest
from ray import tune as ray_tune_api
from studies import ACCURACY, small_space

from wml_ray.errors import UserError
from wml_ray.search.bounded_tpe import BEST_TRIALS, LEARNED_TRIALS, thinned
from wml_ray.search.optuna_study import OptunaStudy, TrialRecord, check_sampler
from wml_ray.search.ratios import increasing
from wml_ray.search.settings import SearchConfig

NUMBERS = {"wml.alpha": ray_tune_api.uniform(0.0, 0.9), "optim.momentum": ray_tune_api.uniform(0.0, 0.9)}
GRID = {"wml.alpha": ray_tune_api.quniform(0.0, 0.4, 0.2), "optim.nesterov": ray_tune_api.choice([True, False])}
SIZE = {"peers/macs/tree": "min"}


def settings(sampler, trials=6, seed=0):
    return SearchConfig(study="s", trials=trials, sampler=sampler, seed=seed)


def search(sampler, domains, trials, seed=0, records=(), planned=None):
    """The points of a study in which each trial's value is the share of the space that its numbers leave."""
    space, storage = small_space(domains=domains), optuna.storages.InMemoryStorage()
    study = OptunaStudy(space, settings(sampler, planned or trials, seed), storage, started=len(records))
    study.sync(records, "token")
    points = [record.point for record in records]
    for number in range(len(records), trials):
        trial = study.ask()
        attributes = study.system_attributes(trial)
        value = -sum((value - 0.6) ** 2 for value in trial.params.values())
        points.append(trial.params)
        study.finish(trial, TrialRecord(f"s/{number}", trial.params, "COMPLETE", [value], {}, attributes))
    return points


@pytest.mark.parametrize(
    ("sampler", "domains", "objectives", "message"),
    [
        ("grid", {**GRID, "optim.momentum": ray_tune_api.uniform(0, 0.9)}, ACCURACY, r"'optim.momentum' has no steps"),
        ("grid", {"pruning.ratios": increasing(0.0, 0.5)}, ACCURACY, r"'pruning.ratios' has no steps; use quniform"),
        ("cmaes", {**NUMBERS, "optim.nesterov": GRID["optim.nesterov"]}, ACCURACY, "'optim.nesterov' is a choice"),
        ("cmaes", NUMBERS, {**ACCURACY, **SIZE}, "there are 2 objectives; use sampler tpe or gp"),
    ],
)
def test_a_sampler_refuses_a_space_that_it_cannot_search_in_one_line(sampler, domains, objectives, message):
    with pytest.raises(UserError, match=message) as raised:
        check_sampler(settings(sampler), small_space(domains=domains, objectives=objectives))
    assert "\n" not in str(raised.value)


def test_a_grid_has_no_more_trials_than_points():
    check_sampler(settings("grid", trials=6), small_space(domains=GRID))
    with pytest.raises(UserError, match="trials = 7: the grid has 6 points"):
        check_sampler(settings("grid", trials=7), small_space(domains=GRID))


def test_a_grid_has_each_point_once_also_in_a_study_that_continues_with_another_order():
    all_points = {(alpha, nesterov) for alpha in (0.0, 0.2, 0.4) for nesterov in (True, False)}
    records = [
        TrialRecord("s/0", {"wml.alpha": 0.2, "optim.nesterov": True}, "COMPLETE", [0.5], {}),
        TrialRecord("s/1", {"wml.alpha": 0.4, "optim.nesterov": False}, "FAILED", None, {}),
    ]
    points = search("grid", GRID, trials=6, records=records)
    assert {tuple(point.values()) for point in points} == all_points


@pytest.mark.parametrize(("sampler", "trials", "chosen", "near"), [("gp", 9, min, 0.03), ("cmaes", 48, max, 0.15)])
def test_a_seed_determines_the_points_and_they_come_closer_to_the_best_one(sampler, trials, chosen, near):
    points = search(sampler, NUMBERS, trials)
    assert points == search(sampler, NUMBERS, trials)
    assert points[0] != search(sampler, NUMBERS, trials=1, seed=1)[0]
    distances = [max(abs(value - 0.6) for value in point.values()) for point in points]
    assert chosen(distances[-3:]) < near < max(distances[:5])


def ended_study(directions, values, pruned=()):
    study = optuna.create_study(directions=directions)
    distributions = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}
    for number, value in enumerate(values):
        end = {"state": optuna.trial.TrialState.PRUNED} if number in pruned else {"values": value}
        study.add_trial(optuna.trial.create_trial(params={"x": 0.5}, distributions=distributions, **end))
    return study


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_a_thinned_study_keeps_the_best_trials_and_every_second_other_one_with_the_last(direction):
    best = 1000.0 if direction == "maximize" else -1000.0
    values = [[best + number] if number < BEST_TRIALS else [float(number)] for number in range(200)]
    kept = [trial.values[0] for trial in thinned(ended_study([direction], values)).trials]
    assert kept == [value for [value] in values[:BEST_TRIALS]] + [float(number) for number in range(51, 200, 2)]


def test_a_thinned_study_with_two_objectives_keeps_its_front_and_stopped_trials_count_as_others():
    values = [[1.0, 0.0], [0.0, 1.0], *[[0.5 - number / 100, 0.4] for number in range(8)]]
    kept = thinned(ended_study(["maximize", "maximize"], values, pruned={3, 5, 7, 9})).trials
    assert [trial.values for trial in kept] == [values[0], values[1], values[2], None, None, None, None]


@pytest.mark.parametrize("planned", [None, 10], ids=["long", "short, started from a long one"])
def test_tpe_still_finds_the_best_region_in_a_study_longer_than_it_learns_from(planned):
    """The good trials are the oldest, and two of three others are left out of what TPE learns from."""
    old = [dict.fromkeys(NUMBERS, 0.6 + 0.0002 * number) for number in range(50)]
    others = [{"wml.alpha": number % 7 / 10, "optim.momentum": number % 3 / 10} for number in range(3 * LEARNED_TRIALS)]
    records = [
        TrialRecord(f"s/{number}", point, "COMPLETE", [1.0 if number < len(old) else 0.0], {})
        for number, point in enumerate([*old, *others])
    ]
    points = search("tpe", NUMBERS, len(records) + 10, records=records, planned=planned)[len(records) :]
    assert all(abs(value - 0.6) < 0.15 for point in points for value in point.values())
