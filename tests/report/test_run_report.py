"""The report of finished runs, and the modules that reports import."""

import io
import json
import subprocess
import sys

import pytest
from mlflow.entities import Dataset, DatasetInput, InputTag
from rich.console import Console
from scipy.stats import binomtest

from wml_ray.report.run_report import runs_table, wilson_interval
from wml_ray.tracking.origin import dataset_inputs
from wml_ray.tracking.results import finished_runs
from wml_ray.tracking.runs import finish_run, open_run
from wml_ray.tracking.tags import KIND_TAG, STUDY_TAG


@pytest.mark.parametrize(("correct", "images"), [(0, 359), (358, 359), (359, 359), (9500, 10000)])
def test_the_interval_is_scipys(correct, images):
    expected = binomtest(correct, images).proportion_ci(method="wilson")
    assert wilson_interval(correct / images, images) == pytest.approx((expected.low, expected.high), abs=1e-5)


def log_finished_run(name, accuracies):
    """A finished run with the metrics, dataset and tags of a training, in the experiment `made-up`."""
    run = open_run("made-up", name, name, {"seed": 0})
    metrics = {"val/accuracy/method": 0.9, "test/accuracy/method": 0.9}
    for index, accuracy in enumerate(accuracies):
        metrics |= {f"peers/macs/peer{index}": 1e6 / (index + 1), f"peers/params/peer{index}": 1e4}
        metrics |= {f"{split}/accuracy/peer{index}": accuracy for split in ("val", "test")}
    images = {"train": 1078, "validation": 180, "test": 359}
    inputs = dataset_inputs({"config": {"data": {"name": "digits"}, "seed": 0}, "images": images})
    finish_run(run, "FINISHED", metrics=metrics, inputs=inputs)


def test_runs_that_another_program_logged_to_the_experiment_are_left_out(workplace):
    log_finished_run("ours", [0.9])
    other = DatasetInput(Dataset("theirs", "0", "local", "{}"), [InputTag("mlflow.data.context", "test")])
    finish_run(open_run("made-up", "theirs", "theirs", {}), "FINISHED", inputs=[other])
    assert list(finished_runs("made-up")["run"]) == ["ours"]
    assert list(finished_runs("made-up")["test_images"]) == [359]


PROGRAM = """
import sys
from wml_ray.cli.main import main
assert main(["report", "made-up"]) == 0
print(*sys.modules)
"""


@pytest.mark.parametrize("kind", ["runs", "study"])
def test_a_report_imports_neither_torch_nor_ray(workplace, kind):
    if kind == "runs":
        log_finished_run("digits-resnet20 alpha=0.2", [0.97, 0.96])
    else:
        about = {"objectives": {"val/accuracy/method": "max"}, "searched": {"wml.alpha": "linear"}, "settings": {}}
        open_run("made-up", "made-up", "study", {}, {KIND_TAG: "study", STUDY_TAG: json.dumps(about)})
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert {"runs": "accuracy_macs.png", "study": "report.html"}[kind] in done.stdout, done.stderr
    assert not {"torch", "ray"} & set(done.stdout.split())


def test_runs_are_named_by_the_words_in_which_they_differ(workplace):
    log_finished_run("digits-resnet20 epochs=4 seed=1", [0.97])
    log_finished_run("digits-resnet20 alpha=0.2 epochs=4", [0.96])
    console = Console(width=100, file=io.StringIO())
    console.print(runs_table(finished_runs("made-up")))
    lines = console.file.getvalue().splitlines()
    assert {" ".join(line.split()[:2]) for line in lines[4:6]} == {
        "digits-resnet20 seed=1",
        "digits-resnet20 alpha=0.2",
    }
    assert "epochs=4" not in console.file.getvalue()


def test_the_interval_of_a_run_in_mlflow_is_that_of_its_test_images(workplace):
    log_finished_run("one", [0.97])
    assert finished_runs("made-up")["test_images"].tolist() == [359]
