"""The numbers and the tables of a comparison."""

import csv
import io
import math
import re

import numpy as np
import pandas as pd
import pytest

from wml_ray.cli.main import main
from wml_ray.errors import UserError
from wml_ray.report.comparison import Estimate, clear_best, compared_rows, estimate, group_runs, paired_difference
from wml_ray.report.comparison_page import study_report
from wml_ray.report.comparison_tables import aligned, comparison_tables, latex, published_rows, text_of, tidy_csv
from wml_ray.tracking.results import StudyRecords
from wml_ray.tracking.runs import finish_run, open_run

T_975 = {2: 12.7062, 3: 4.3027, 5: 2.7764, 10: 2.2622}
"""Number of values -> the 97.5 % quantile of Student's t, from a printed table."""


@pytest.mark.parametrize("count", T_975)
def test_the_interval_is_students(count):
    values = np.random.default_rng(count).normal(size=count)
    expected = T_975[count] * values.std(ddof=1) / math.sqrt(count)
    found = estimate(list(values))
    assert (found.mean, found.count) == (pytest.approx(values.mean()), count)
    assert found.half_width == pytest.approx(expected, rel=1e-4)


def test_one_value_has_a_mean_and_no_interval():
    found = estimate([0.5])
    assert found.mean == 0.5
    assert math.isnan(found.half_width)


def test_differences_are_paired_by_seed_whatever_the_order_and_over_common_seeds_only():
    """The seeds differ by far more than the rows do."""
    reference = {0: 0.1, 1: 0.5, 2: 0.9, 7: 0.0}
    values = {2: 0.93, 0: 0.12, 1: 0.51, 8: 1.0}
    found = paired_difference(values, reference)
    assert (found.mean, found.count) == (pytest.approx(0.02), 3)
    assert found.half_width == pytest.approx(T_975[3] * 0.01 / math.sqrt(3), rel=1e-4)


@pytest.mark.parametrize(
    ("estimates", "expected"),
    [
        ([(0.90, 0.01), (0.95, 0.01), (0.92, 0.01)], 1),
        ([(0.90, 0.01), (0.95, 0.01), (0.92, 0.03)], None),  # the intervals touch
        ([(0.90, 0.08), (0.95, 0.01), (0.92, 0.01)], None),  # that of the third does
        ([(0.90, 0.01)], None),
        ([(0.90, math.nan), (0.95, 0.01)], None),
    ],
)
def test_the_best_is_marked_only_where_its_interval_lies_above_all_others(estimates, expected):
    assert clear_best([Estimate(mean, half, 3) for mean, half in estimates]) == expected


def made_up(accuracies, seconds=None):
    """Finished runs of two peers: variant -> the accuracy of each seed; peer 1 has 0.1 less."""
    rows = []
    for name, values in accuracies.items():
        for seed, value in enumerate(values):
            own = {"method": value, "ensemble_average": value, "peer0": value, "peer1": value - 0.1}
            metrics = {f"{split}/accuracy/{key}": own[key] for split in ("val", "test") for key in own}
            peers = [{"macs": 2e6 - 1e6 * i, "val": own[f"peer{i}"], "test": own[f"peer{i}"]} for i in range(2)]
            cost = {"train/seconds": (seconds or {}).get(name, 10.0), "train/peak_memory_bytes": 2.0**30}
            rows.append({"variant": name, "seed": seed, **metrics, **cost, "peers/macs/tree": 3e6, "peers": peers})
    return pd.DataFrame(rows)


RUNS = {"wml": [0.90, 0.91, 0.92], "independent": [0.95, 0.952, 0.951], "dml": [0.94, 0.97, 0.951]}


def tables_of(accuracies, published="", seconds=None):
    rows = compared_rows(made_up(accuracies, seconds), list(accuracies))
    return rows, {table.title.partition(" (")[0]: table for table in comparison_tables(rows, {}, published)}


def test_a_row_has_each_peer_their_mean_and_the_predictions_on_both_splits():
    rows, tables = tables_of(RUNS)
    for split in ("test", "val"):
        means = [rows[0].accuracies[f"{split}/accuracy/{name}"].mean for name in ("peer0", "peer1", "peers", "method")]
        assert means == pytest.approx([0.91, 0.81, 0.86, 0.91])
    assert tables["Test accuracy"].rows[0][1:5] == ["91.00 ± 2.48", "81.00 ± 2.48", "86.00 ± 2.48", "91.00 ± 2.48"]
    assert [cells[0] for cells in tables["Test accuracy minus that of wml"].rows] == ["independent", "dml"]
    assert tables["Test accuracy minus that of wml"].rows[0][1].startswith("+4.10 ± ")
    assert "over 3 seeds" in tables["Validation accuracy"].title


def test_costs_are_relative_to_independent_training_and_else_to_the_first_row():
    seconds = {"wml": 15.0, "dml": 20.0}
    rows, tables = tables_of(RUNS, seconds=seconds)
    assert [row.relative_costs["train/seconds"] for row in rows] == pytest.approx([1.5, 1.0, 2.0])
    assert [cells[3] for cells in tables["Cost of training, relative to independent"].rows] == [
        "1.50×",
        "1.00×",
        "2.00×",
    ]
    rows, _ = tables_of({"wml": RUNS["wml"], "dml": RUNS["dml"]}, seconds=seconds)
    assert [row.relative_costs["train/seconds"] for row in rows] == pytest.approx([1.0, 4 / 3])


def test_a_mean_that_rounds_to_zero_has_no_minus():
    assert text_of(Estimate(-0.00001, 0.01, 3)) == "0.00 ± 1.00"


def test_columns_are_aligned_and_only_a_clear_best_has_a_star():
    _, tables = tables_of({"wml": [0.9, 0.91, 0.92], "a longer name": [0.95, 0.951, 0.952]})
    lines = aligned(tables["Test accuracy"]).splitlines()
    assert [len(re.findall(r"\*", line)) for line in lines[-2:]] == [0, 5]
    first, second = ([match.start() for match in re.finditer("±", line)] for line in lines[-2:])
    assert first == second
    _, tables = tables_of(RUNS)
    assert "*" not in aligned(tables["Test accuracy"])


def test_latex_is_balanced_and_escaped():
    _, tables = tables_of({"wml ratios=[0,50%]_a": [0.9, 0.91, 0.92], "dml": [0.95, 0.951, 0.952]})
    text = latex(tables["Test accuracy"])
    assert r"wml ratios=[0,50\%]\_a & 91.00 $\pm$ 2.48 &" in text
    assert text.count(r"\textbf{") == 5
    widths = {line.count(" & ") for line in text.splitlines() if line.endswith(r"\\")}
    assert widths == {5}
    assert text.count("{") == text.count("}")


def test_the_csv_has_the_numbers_of_the_tables():
    rows, _ = tables_of(RUNS)
    cells = {(line["method"], line["metric"]): line for line in csv.DictReader(io.StringIO(tidy_csv(rows)))}
    line = cells["independent", "test/accuracy/peers"]
    assert float(line["mean"]) == pytest.approx(0.901)
    assert float(line["difference"]) == pytest.approx(0.041)
    assert cells["wml", "test/accuracy/peers"]["difference"] == ""
    assert float(cells["dml", "train/seconds"]["mean"]) == 10


def test_published_figures_stand_below_the_measured_ones():
    _, tables = tables_of(RUNS, "row,peer0,method\nKD,,94.5\n")
    assert [cells[0] for cells in tables["Test accuracy"].rows] == [*RUNS, "KD (published)"]
    assert tables["Test accuracy"].rows[-1] == ["KD (published)", "", "", "", "", "94.5"]
    assert len(tables["Validation accuracy"].rows) == 3
    with pytest.raises(UserError, match=r"unknown column 'best'; allowed: row, peer0"):
        published_rows("row,best\nKD,1")
    with pytest.raises(UserError, match=r"peer0 of KD is 'n/a'"):
        published_rows("row,peer0\nKD,n/a")


def test_the_report_says_what_won_and_what_failed(tmp_path):
    trials = made_up({"wml": [0.9, 0.91], "dml": [0.92, 0.93]}).assign(state="COMPLETE", reason="", epochs=3)
    trials["method.name"] = trials["variant"]
    trials["optim.learning_rate"] = [0.123456, 0.123456, 0.5, 0.5]
    trials["wml.alpha"] = 0.3
    trials.loc[3, ["state", "reason"]] = ["FAILED", "training diverged"]
    searched = dict.fromkeys(["method.name", "optim.learning_rate", "wml.alpha", "seed"], "choice")
    study = StudyRecords("<b>", {}, searched, {"seeds": "0, 1"}, trials, ["wml", "dml", "kd"])
    report = study_report(study)
    assert "dml seed=1 failed: training diverged" in report.summary
    assert [cells for table in report.tables if table.title == "Settings" for cells in table.rows] == [
        ["wml", "optim.learning_rate=0.1235 wml.alpha=0.3"],
        ["dml", "optim.learning_rate=0.5"],
    ]
    files = report.write(tmp_path)
    assert {file.name for file in files} == {
        *("accuracy_macs.png", "comparison.csv", "runs.csv", "comparison.tex", "report.html")
    }
    page = (tmp_path / "report.html").read_text()
    assert "<h1>&lt;b&gt;</h1>" in page
    assert page.count("<img ") == 1


def log_run(name, seed, accuracy, **params):
    run = open_run("made-up", name, f"{name}-{seed}", {"seed": seed, "optim.epochs": 3, "method.name": "wml", **params})
    metrics = {f"{split}/accuracy/{key}": accuracy for split in ("val", "test") for key in ("method", "peer0")}
    finish_run(run, "FINISHED", metrics={**metrics, "peers/macs/peer0": 1e6, "peers/params/peer0": 1e4})


def test_finished_runs_that_differ_in_a_key_are_compared(workplace, capsys):
    for alpha, accuracies in ((10, [0.9, 0.91]), (9, [0.95, 0.96])):
        for seed, accuracy in enumerate(accuracies):
            log_run(f"a{alpha}", seed, accuracy, **{"wml.alpha": alpha, "scale.gpu": str(bool(seed))})
    assert main(["report", "made-up", "--group-by", "wml.alpha"]) == 0
    shown = capsys.readouterr().out
    assert "minus that of alpha=9" in shown
    assert re.search(r"^ alpha=10 +-5\.00 ± 0\.00", shown, flags=re.MULTILINE)
    assert "reports/made-up/report.html" in shown
    assert main(["report", "made-up", "--group-by", "wml.alpha", "--csv"]) == 0
    assert capsys.readouterr().out.startswith("method,metric,")


def test_runs_that_differ_in_another_key_or_have_one_seed_twice_are_not_compared():
    runs = made_up({"a": [0.9, 0.9], "b": [0.8, 0.8]}).drop(columns="variant").astype({"seed": str})
    runs["wml.alpha"], runs["optim.epochs"], runs["run.name"] = list("1122"), list("3345"), list("abcd")
    with pytest.raises(UserError, match=r"differ in optim\.epochs too .* use --group-by wml\.alpha,optim\.epochs"):
        group_runs(runs, ["wml.alpha"])
    runs["optim.epochs"] = "3"
    assert group_runs(runs, ["wml.alpha"])[1] == ["alpha=1", "alpha=2"]
    with pytest.raises(UserError, match=r"no finished run has this key"):
        group_runs(runs, ["wml.alfa"])
    with pytest.raises(UserError, match=r"two runs of alpha=2 have the seed 0"):
        group_runs(runs.assign(seed=["0", "1", "0", "0"]), ["wml.alpha"])


def test_runs_whose_teachers_differ_by_seed_alone_are_grouped():
    runs = made_up({"a": [0.9, 0.9], "b": [0.8, 0.8]}).drop(columns="variant").astype({"seed": str})
    runs["method.name"], runs["teacher.run"] = ["wml", "wml", "kd", "kd"], [None, None, "first", "second"]
    assert group_runs(runs, ["method.name"])[1] == ["kd", "wml"]
    runs.loc[len(runs)] = {**runs.iloc[-1], "method.name": "rkd", "teacher.run": "third"}
    with pytest.raises(UserError, match=r"differ in teacher\.run too"):
        group_runs(runs, ["method.name"])


def test_a_list_is_one_key_of_groups():
    runs = made_up({"a": [0.9], "b": [0.8]}).drop(columns="variant").astype({"seed": str})
    runs["pruning.ratios.0"], runs["pruning.ratios.1"] = ["0.0", "0.0"], ["0.5", "0.2"]
    assert group_runs(runs, ["pruning.ratios"])[1] == ["ratios=[0.0, 0.2]", "ratios=[0.0, 0.5]"]
