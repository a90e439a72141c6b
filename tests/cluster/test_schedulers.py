"""Schedulers of continued studies."""

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
    assert decisions(scheduler, search, EarlierTrial("new"), scores) == expected


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_continued_scheduler_stops_bad_trials_but_none_for_replayed_results(tmp_path, name):
    search = SearchConfig(study="again", trials=9, scheduler=name)
    scheduler, stopped = continued_scheduler(tmp_path, search, [(0.9, 9)] * 4)
    scores = dict.fromkeys((1, 2, 3), 0.1)
    assert "STOP" not in decisions(scheduler, search, EarlierTrial("interrupted"), scores, past=True)
    assert "STOP" in decisions(scheduler, search, EarlierTrial("new"), scores)
    assert stopped == {"new"}
