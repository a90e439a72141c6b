"""Schedulers of new and of continued studies."""

from collections import Counter

import pytest
from studies import small_space

from wml_ray.cluster.schedulers import EarlierTrial, make_scheduler, replay
from wml_ray.search.settings import SearchConfig
from wml_ray.search.study import RunningStudy
from wml_ray.search.trials import Trial, TrialStore


def continued_scheduler(folder, search, earlier):
    """A scheduler after trials of these scores and last epochs, and the set of ids of the trials it stops."""
    store, space, stopped = TrialStore(folder), small_space("optim.epochs=9"), set()
    for number, (score, last) in enumerate(earlier):
        history = [{"epoch": e, "timestamp_ms": 0, "metrics": {search.stop_metric: score}} for e in range(1, last + 1)]
        store.write(Trial(number, {"wml.alpha": 0.1}, "STOPPED", history=history))
    scheduler = make_scheduler(search, space, stopped)
    replay(scheduler, RunningStudy(space, search, folder, "token"))
    return scheduler, stopped


def decisions(scheduler, search, trial, scores, past=False):
    """The decisions for a trial that reports these scores by epoch."""
    scheduler.on_trial_add(None, trial)
    results = [{"epoch": epoch, "past": past, search.stop_metric: score} for epoch, score in scores.items()]
    return [scheduler.on_trial_result(None, trial, result) for result in results]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({1: 0.15}, ["STOP"]),
        ({1: 0.25, 3: 0.15}, ["CONTINUE", "STOP"]),
        ({1: 0.25, 3: 0.18}, ["CONTINUE", "CONTINUE"]),  # 0.2 was never at epoch 3
    ],
)
def test_asha_compares_a_new_trial_with_earlier_ones_at_the_epochs_that_they_reached(tmp_path, scores, expected):
    search = SearchConfig(study="asha", trials=9, grace_epochs=1)
    scheduler, _ = continued_scheduler(tmp_path, search, [(0.0, 9), (0.1, 3), (0.2, 1), (0.3, 9)])
    assert decisions(scheduler, search, EarlierTrial("new", 99), scores) == expected


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_a_continued_scheduler_stops_bad_trials_but_none_for_replayed_results(tmp_path, name):
    search = SearchConfig(study="again", trials=9, scheduler=name)
    scheduler, stopped = continued_scheduler(tmp_path, search, [(0.9, 9)] * 4)
    scores = dict.fromkeys((1, 2, 3), 0.1)
    assert "STOP" not in decisions(scheduler, search, EarlierTrial("interrupted", 98), scores, past=True)
    assert "STOP" in decisions(scheduler, search, EarlierTrial("new", 99), scores)
    assert stopped == {"new"}


def new_trials(folder, name, numbers):
    """Trial -> its decisions, for new trials that are worse than 20 earlier ones at each of 8 epochs."""
    search = SearchConfig(study="new", trials=99, scheduler=name, grace_epochs=1)
    scheduler, _ = continued_scheduler(folder, search, [(0.9, 9)] * 20)
    scores = dict.fromkeys(range(1, 9), 0.1)
    return {number: decisions(scheduler, search, EarlierTrial(f"new-{number}", number), scores) for number in numbers}


def test_hyperband_stops_most_bad_trials_at_the_first_rung_and_some_never(tmp_path):
    first_stops = [found.index("STOP") + 1 for found in new_trials(tmp_path, "asha", range(20, 40)).values()]
    assert set(first_stops) == {1}
    found = new_trials(tmp_path, "hyperband", range(20, 40)).values()
    counts = Counter(decision.index("STOP") + 1 if "STOP" in decision else None for decision in found)
    assert set(counts) == {1, 3, None}
    assert counts[1] >= 10  # the brackets have shares of 3, 1.5 and 1
    assert min(counts[3], counts[None]) >= 3


def test_a_trial_of_hyperband_has_the_same_bracket_whichever_trials_were_there_before(tmp_path):
    later = new_trials(tmp_path, "hyperband", range(20, 40))
    assert new_trials(tmp_path, "hyperband", range(30, 40)) == {number: later[number] for number in range(30, 40)}
