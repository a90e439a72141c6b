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


def ended_trials(values, stopped=()):
    """Trials that end with these values; those of `stopped`, number -> epoch, are stopped there instead."""
    distributions, trials = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}, []
    for number, value in enumerate(values):
        end = {"values": value}
        if number in stopped:
            end = {"state": optuna.trial.TrialState.PRUNED, "intermediate_values": {stopped[number]: value[0]}}
        trials.append(optuna.trial.create_trial(params={"x": 0.5}, distributions=distributions, **end))
    return trials


def kept_by(trials, *directions):
    kept = thinned(trials, [optuna.study.StudyDirection[direction] for direction in directions])
    return [index for index, trial in enumerate(trials) if any(trial is other for other in kept)]


@pytest.mark.parametrize("direction", ["MAXIMIZE", "MINIMIZE"])
def test_the_best_trials_and_every_second_other_one_with_the_last_are_kept(direction):
    best = 1000.0 if direction == "MAXIMIZE" else -1000.0
    values = [[best + number] if number < BEST_TRIALS else [float(number)] for number in range(300)]
    expected = [*range(BEST_TRIALS), *range(BEST_TRIALS + 1, 300, 2)]
    assert kept_by(ended_trials(values), direction) == expected


def test_of_two_objectives_the_front_is_kept_and_no_more_than_half_of_a_longer_one():
    values = [[1.0, 0.0], [0.0, 1.0], *[[-1.0 - number, -1.0] for number in range(300)]]
    assert {0, 1} <= set(kept_by(ended_trials(values), "MAXIMIZE", "MAXIMIZE"))
    front = [[float(number), -float(number)] for number in range(LEARNED_TRIALS)]
    assert len(kept_by(ended_trials(front), "MAXIMIZE", "MAXIMIZE")) == BEST_TRIALS + (LEARNED_TRIALS - BEST_TRIALS) / 2


def test_stopped_trials_are_kept_after_complete_ones_the_longest_and_then_the_best_first():
    values = [[0.0]] * 10 + [[1.0 + number] for number in range(290)]
    longest = range(10, BEST_TRIALS - 10)
    stopped = dict.fromkeys(range(10, 300), 1) | dict.fromkeys(longest, 27)
    best = {*range(10), *longest, *range(290, 300)}
    kept = kept_by(ended_trials(values, stopped), "MAXIMIZE")
    assert best <= set(kept)
    assert len(kept) == BEST_TRIALS + (300 - BEST_TRIALS) / 2


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


def test_tpe_learns_from_trials_that_end_after_so_many_others():
    """All earlier trials are equally bad, so only the new ones show a region."""
    bad = [{"wml.alpha": number % 7 / 20, "optim.momentum": number % 3 / 10} for number in range(LEARNED_TRIALS + 50)]
    records = [TrialRecord(f"s/{number}", point, "COMPLETE", [0.0], {}) for number, point in enumerate(bad)]
    search_settings = settings("tpe", len(bad) + 100)
    study = OptunaStudy(small_space(domains=NUMBERS), search_settings, optuna.storages.InMemoryStorage(), len(bad))
    study.sync(records, "token")
    found = []
    for number in range(60):
        if 10 <= number < 40:
            study.enqueue(dict.fromkeys(NUMBERS, 0.8 + 0.001 * number))
        trial = study.ask()
        found.append(trial.params)
        value = float(min(trial.params.values()) > 0.7)
        study.finish(trial, TrialRecord(f"s/{len(bad) + number}", trial.params, "COMPLETE", [value], {}))
    assert all(value > 0.7 for point in found[-10:] for value in point.values())
