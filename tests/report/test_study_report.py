"""The analysis of a study (front, importances, histories) and its report."""

import base64
import io
import itertools
import json
import math
import re
import sys

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from wml_ray.report.analysis import (
    MOST_IMPORTANCE_TRIALS,
    best_so_far,
    best_trial_numbers,
    dominated_volume,
    hypervolume,
    importances,
    pareto_front,
)
from wml_ray.report.study_page import write_study
from wml_ray.report.study_plots import draw
from wml_ray.report.study_tables import front_markdown, front_table, trials_summary
from wml_ray.tracking.results import StudyRecords

ACCURACY, SMALLEST, MACS = "val/accuracy/ensemble_weighted", "val/accuracy/smallest_peer", "peers/macs/tree"
SEARCHED = {"wml.alpha": "linear", "wml.mirror_step_size": "log", "model.sharing": "choice"}
STATES = ("COMPLETE", "STOPPED", "COMPLETE", "FAILED", "RUNNING")


def made_up(states, objectives=None, searched=SEARCHED, seed=0):
    """A study of random numbers; the accuracy depends on alpha, the MACs on nothing."""
    rng = np.random.default_rng(seed)
    objectives = objectives or {ACCURACY: "max", MACS: "min"}
    rows = [trial(number, state, rng, searched) for number, state in enumerate(states)]
    columns = ["trial", "state", "epochs", "reason", "peers", *searched, *objectives]
    columns = dict.fromkeys([*columns, *(key for row in rows for key in row)])
    return StudyRecords("made up", objectives, searched, {"sampler": "TPE"}, pd.DataFrame(rows, columns=list(columns)))


def trial(number, state, rng, searched):
    row = {"trial": number, "state": state, "epochs": 9, "reason": "", "peers": []}
    draw = {
        "linear": lambda: rng.uniform(0, 1),
        "log": lambda: 10 ** rng.uniform(-4, 0),
        "choice": lambda: json.dumps([[1, 2, 4, 4], [4] * 4][rng.integers(2)]),
    }
    row |= {key: draw[scale]() for key, scale in searched.items()}
    if state != "FAILED":
        accuracy, macs = 0.95 - 0.1 * (row.get("wml.alpha", 0) - 0.3) ** 2, rng.uniform(1e6, 4e6)
        row |= {ACCURACY: accuracy, SMALLEST: accuracy - rng.uniform(0, 0.1), MACS: macs}
        row[ACCURACY] -= 0.4 * (state == "STOPPED")
    if state == "COMPLETE":
        peer = {"params": 5e4, "weight": 0.5, "test": 0.9}
        row["peers"] = [{"peer": index, "macs": 1e6 * (2 - index), "val": 0.9, **peer} for index in range(2)]
    return row


def of_values(values, objectives, states=None):
    """A study with these values of the objectives."""
    trials = pd.DataFrame(values, columns=list(objectives))
    trials["trial"], trials["state"] = range(len(trials)), states or ["COMPLETE"] * len(trials)
    return StudyRecords("values", objectives, {}, {}, trials)


def test_no_trial_of_the_full_budget_dominates_one_on_the_front():
    objectives = {"a": "max", "b": "min", "c": "max"}
    values = np.random.default_rng(0).integers(0, 5, (60, 3)).astype(float)
    losses = values * [-1, 1, -1]
    dominated = [any((other <= loss).all() and (other < loss).any() for other in losses) for loss in losses]
    found = pareto_front(of_values(values, objectives))
    assert sorted(found) == [number for number in range(60) if not dominated[number]]
    assert [values[number, 0] for number in found] == sorted((values[number, 0] for number in found), reverse=True)


def test_only_finite_trials_of_the_full_budget_are_compared():
    values = [[0.5, 2.0], [0.9, 1.0], [0.99, 0.1], [math.nan, 0.1], [0.99, math.inf], [0.4, 3.0]]
    states = ["COMPLETE", "STOPPED", "FAILED", "COMPLETE", "COMPLETE", "COMPLETE"]
    study = of_values(values, {"a": "max", "b": "min"}, states)
    assert pareto_front(study) == [0]
    assert [number for number, _ in hypervolume(study)] == [0, 5]
    assert best_so_far(study, "b") == [(0, 2.0), (5, 2.0)]


@pytest.mark.parametrize(("direction", "expected"), [("max", 1), ("min", 0)])
def test_with_one_objective_the_front_is_the_earliest_of_the_best(direction, expected):
    study = of_values([[0.1], [0.7]] * 40, {"a": direction})
    assert pareto_front(study) == [expected]
    assert best_trial_numbers(study, 40) == list(range(expected, 80, 2))


def test_the_best_of_several_objectives_span_the_front():
    study = of_values([[value, value] for value in range(9)], {"a": "max", "b": "min"})
    assert best_trial_numbers(study, 3) == [8, 4, 0]
    assert best_trial_numbers(study, 20) == pareto_front(study)


def test_the_best_so_far_follows_the_direction():
    values = [[3.0, 3.0], [1.0, 1.0], [5.0, 5.0]]
    study = of_values(values, {"a": "max", "b": "min"})
    assert best_so_far(study, "a") == [(0, 3.0), (1, 3.0), (2, 5.0)]
    assert best_so_far(study, "b") == [(0, 3.0), (1, 1.0), (2, 1.0)]


def test_the_hypervolume_grows_by_the_newly_dominated_area():
    """Accuracy 0 to 3, cost 5 to 1; the reference point is (0, 5)."""
    values = [[1.0, 2.0], [0.0, 5.0], [3.0, 4.0], [1.0, 4.0], [2.0, 1.0]]
    volumes = hypervolume(of_values(values, {"accuracy": "max", "cost": "min"}))
    assert volumes == [(0, 3.0), (1, 3.0), (2, 5.0), (3, 5.0), (4, 9.0)]


@pytest.mark.parametrize("dimensions", [2, 3, 4])
def test_the_dominated_volume_is_the_number_of_grid_cells_below_a_point(dimensions):
    gains = np.random.default_rng(dimensions).integers(0, 11, (25, dimensions))
    cells = np.stack(np.meshgrid(*[np.arange(10)] * dimensions), -1).reshape(-1, dimensions)
    below = (cells[:, None] < gains).all(-1).any(1)
    assert dominated_volume(gains.astype(float)) == below.sum()


def test_importance_finds_the_key_that_matters_the_same_every_time():
    study = made_up(["COMPLETE"] * 40)
    shares = importances(study)
    assert next(iter(shares[ACCURACY])) == "wml.alpha"
    assert shares[ACCURACY]["wml.alpha"] > 0.9
    assert sum(shares[MACS].values()) == pytest.approx(1)
    assert importances(study) == shares


def test_importances_of_a_large_study_read_an_even_sample_of_its_trials():
    trials = made_up(["COMPLETE"] * (2 * MOST_IMPORTANCE_TRIALS - 1), {ACCURACY: "max"}).trials
    changed = trials.assign(**{ACCURACY: trials[ACCURACY].where(trials["trial"] % 2 == 0, 0.0)})
    shares = [importances(StudyRecords("", {ACCURACY: "max"}, SEARCHED, {}, table)) for table in (trials, changed)]
    assert shares[0][ACCURACY]
    assert shares[0] == shares[1]


def test_a_key_searched_on_a_log_scale_counts_on_that_scale():
    """A step at the middle of seven decades: on a linear scale it is a step within the first thousandth."""
    size = np.logspace(-7, 0, 60)
    trials = made_up(["COMPLETE"] * 60, {ACCURACY: "max"}).trials.assign(**{"wml.mirror_step_size": size})
    trials[ACCURACY] = (size > 10**-3.5) + 0.5 * (trials["wml.alpha"] > 0.5)
    shares = importances(StudyRecords("log", {ACCURACY: "max"}, SEARCHED, {}, trials))
    assert shares[ACCURACY]["wml.mirror_step_size"] > 0.6


def test_no_importance_is_given_where_nothing_varies_or_trials_are_few():
    few = made_up(["COMPLETE"] * 3 + ["STOPPED"] * 9)
    assert importances(few) == {ACCURACY: {}, MACS: {}}
    many = made_up(["COMPLETE"] * 9).trials
    same_keys = many.assign(**dict(many.loc[0, list(SEARCHED)]))
    assert importances(StudyRecords("", {ACCURACY: "max"}, SEARCHED, {}, same_keys)) == {ACCURACY: {}}
    nearly = many.assign(**{ACCURACY: 0.5 + 1e-12 * many["trial"]})
    assert importances(StudyRecords("", {ACCURACY: "max"}, SEARCHED, {}, nearly)) == {ACCURACY: {}}
    same_values = many.assign(**{ACCURACY: 0.5})
    found = importances(StudyRecords("", {ACCURACY: "max", MACS: "min"}, SEARCHED, {}, same_values))
    assert found[ACCURACY] == {}
    assert found[MACS]


def test_the_table_of_the_front_fits_a_terminal_and_prints_markup_as_text():
    searched = {"model.sharing": "choice", **{f"pruning.ratios.{peer}": "linear" for peer in range(20)}}
    console = Console(width=120, file=io.StringIO())
    study = made_up(["COMPLETE"] * 6, searched=searched)
    study.trials["model.sharing"] = "[bold]"
    console.print(front_table(study))
    text = console.file.getvalue()
    assert "[bold]" in text
    assert "…" not in text
    assert "more keys in trials.csv" in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_note_of_a_study_has_every_trial_of_the_front_and_every_key():
    study = made_up(["COMPLETE"] * 6)
    lines = front_markdown(study).splitlines()
    assert [int(line.split("|")[1]) for line in lines[4:]] == pareto_front(study)
    assert [cell.strip() for cell in lines[2].split("|")][-5:-1] == ["alpha", "eta", "sharing", "epochs"]


def test_the_summary_counts_how_trials_ended():
    assert trials_summary(made_up(STATES)) == ("5 trials: 2 complete, 1 stopped early, 1 failed, 1 running; 45 epochs")
    assert trials_summary(made_up(["COMPLETE"])) == "1 trial: 1 complete; 9 epochs"


ALL = {"pareto.png", "parameters.png", "importance.png", "history.png", "peers.png", "trials.csv", "report.html"}


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("objectives", [1, 2, 3])
@pytest.mark.parametrize(
    ("states", "missing"),
    [
        (STATES * 5, set()),
        (["COMPLETE"], {"importance.png"}),
        (["STOPPED", "FAILED"], {"importance.png", "peers.png"}),
        (["FAILED"], {"importance.png", "peers.png", "pareto.png", "history.png"}),
    ],
    ids=["many", "one", "none complete", "all failed"],
)
def test_a_study_in_any_state_gets_the_plots_that_have_data(tmp_path, monkeypatch, objectives, states, missing):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # its state is not safe in other threads
    names = dict(itertools.islice({ACCURACY: "max", MACS: "min", SMALLEST: "max"}.items(), objectives))
    study = made_up(states, names)
    files = write_study(study, tmp_path / "report")
    assert {file.name for file in files} == ALL - missing
    assert {file.name for file in (tmp_path / "report").iterdir()} == ALL - missing
    page = (tmp_path / "report" / "report.html").read_text()
    assert ("No trial has reached the full budget" in page) == ("COMPLETE" not in states)
    assert ("No importance for" in page) == ("importance.png" in missing)
    assert page.count("<img ") == len(ALL - missing) - 2


def test_trials_stopped_at_low_accuracy_are_drawn_and_do_not_stretch_the_axis():
    study = made_up(STATES * 8)
    (axes,) = draw(study, {})["pareto"].axes
    places = np.vstack([points.get_offsets() for points in axes.collections])
    low, high = axes.get_ylim()
    assert len(places) == study.trials[ACCURACY].notna().sum()
    assert ((low <= places[:, 1]) & (places[:, 1] <= high)).all()
    complete = 100 * study.trials[ACCURACY][study.trials["state"] == "COMPLETE"]
    assert complete.max() - complete.min() > (high - low) / 3


def test_the_page_is_self_contained_and_escapes_text(tmp_path):
    markup = '<script src="https://example.org/x.js"></script> & "$x_{"'
    study = made_up(STATES, searched={**SEARCHED, "model.backbone": "choice"})
    trials = study.trials.assign(**{"reason": markup, "model.backbone": markup})
    study = StudyRecords(markup, study.objectives, study.searched, {"sampler": markup, markup: "1"}, trials)
    write_study(study, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script src=") >= 5
    sources = re.findall(r"<[^>]*\b(?:src|href)=\"([^\"]*)", page)
    images = [base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True) for source in sources]
    assert sorted(images) == sorted(file.read_bytes() for file in tmp_path.glob("*.png"))
    assert not re.search(r"@import|url\(|<link", page)


def test_the_csv_has_every_number_of_every_trial(tmp_path):
    study = made_up(STATES)
    write_study(study, tmp_path)
    read = pd.read_csv(tmp_path / "trials.csv", keep_default_na=True)
    written = study.trials.drop(columns=["peers", "reason"])
    pd.testing.assert_frame_equal(read.drop(columns="reason"), written, check_dtype=False)
