"""`wml-ray pick` and `wml-ray evaluate` on the command line."""

import csv
import io
import json
import shlex
import shutil

import pytest

from wml_ray.cli.main import main
from wml_ray.cli.options import parse_arguments


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_pick_lists_the_candidates_of_all_runs_and_the_command_that_exports_the_best(trained, tmp_path, capsys):
    better = tmp_path / "a study" / "trials" / "0003" / "better"
    shutil.copytree(trained, better)
    result = json.loads((better / "result.json").read_text())
    result["peers"][2]["validation_accuracy"] = 1.0
    (better / "result.json").write_text(json.dumps(result))
    names = ["wml", str(tmp_path / "a study"), trained.name]  # an experiment, a study, and a run of the experiment
    assert main(["pick", *names, "--csv"]) == 0
    found = rows(capsys.readouterr().out)
    assert len(found) == 2 * 6  # each once: four peers and two ensembles
    accuracies = [float(row["validation_accuracy"]) for row in found]
    assert accuracies == sorted(accuracies, reverse=True)
    assert (found[0]["folder"], found[0]["network"], found[0]["front"]) == (str(better), "peer2", "True")

    assert main(["pick", *names]) == 0
    output = capsys.readouterr().out
    command = next(line for line in output.splitlines() if line.startswith("export"))
    words = shlex.split(command)[1:]
    assert words == ["wml-ray", "export", str(better), "--peer", "2", "--to", "onnx"]
    parse_arguments(words[1:])


def test_limits_have_units_and_where_nothing_fits_one_line_says_by_how_much(trained, capsys):
    result = json.loads((trained / "result.json").read_text())
    limit = result["peers"][1]["params"]
    assert main(["pick", str(trained), "--max-params", f"{limit / 1000}k", "--csv"]) == 0
    found = rows(capsys.readouterr().out)
    assert {row["network"] for row in found} == {f"peer{peer}" for peer in (1, 2, 3)}
    assert main(["pick", str(trained), "--max-macs", "0.01k"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the nearest, peer 3 of {trained.name}, has " in line
    assert "MACs, " in line
    assert line.endswith(" above 10")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--max-macs", "2X"), ("--max-params", "-1"), ("--max-latency-ms", "nan"), ("--min-accuracy", "97")],
)
def test_a_limit_that_is_no_limit_is_refused(capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        main(["pick", "run", option, value])
    assert f"'{value}' is no " in capsys.readouterr().err


def test_evaluate_prints_the_table_and_writes_the_files_of_each_set_of_images(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run"), "--trust", "--out", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    reported = json.loads((trained / "result.json").read_text())["peers"][0]["test_accuracy"]
    assert f"{reported * 100:.2f}" in captured.out
    assert "15 bins of equal width" in captured.out
    assert captured.err == ""
    assert (tmp_path / "out" / "run" / "test" / "confusion_peer3.png").exists()
    assert main(["evaluate", str(tmp_path / "run"), "--trust", "--peer", "ensemble", "--csv"]) == 0
    (row,) = rows(capsys.readouterr().out)
    assert row["network"] == "ensemble_weighted"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--peer", "best"], "--peer best: give the number of a peer"),
        (["--peer", "4", "--trust"], "no peer 4; give a number from 0 to 3"),
        (["--epoch", "9", "--trust"], "no checkpoint of epoch 9"),
        (["--data", "nowhere", "--trust"], "nowhere"),
        ([], "--trust"),
    ],
)
def test_a_mistake_in_evaluate_is_one_line(trained, capsys, arguments, words):
    assert main(["evaluate", trained.name, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
