"""A run through `run_worker`, without Ray and MLflow."""

import signal
import threading
import time

import numpy as np
import psutil
import pytest
import torch
from family import tiny_config
from rich.console import Console
from runs import history_of

from wml_ray.checkpoints.checkpoint import epoch_folder
from wml_ray.checkpoints.load import load_tree
from wml_ray.checkpoints.store import Checkpoints
from wml_ray.data.load import load_dataset
from wml_ray.distributed import WorkerRank
from wml_ray.report.run_report import peer_table, write_files
from wml_ray.training import termination
from wml_ray.training.events import EpochEnd, StepProgress
from wml_ray.training.worker import WorkerContext, run_worker

ALONE = WorkerContext()


def text_of(table):
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_a_method_without_weights_logs_and_reports_none(tmp_path):
    logged = {}
    overrides = ["method.name=dml", "optim.epochs=2", "optim.learning_rate=0.03", f"run.storage_path={tmp_path}"]
    context = WorkerContext(log=lambda step, metrics, timestamp_ms: logged.update(metrics))
    result = run_worker(tiny_config(*overrides), context)
    assert not [name for name in logged if "weight" in name]
    assert {"val/accuracy/method", "test/accuracy/method", "train/loss_mutual"} <= logged.keys()
    assert logged["test/accuracy/method"] == result["predictions"]["ensemble_average"]["test_accuracy"]
    assert (list(result["predictions"]), result["selects"]) == (["ensemble_average"], "ensemble_average")
    assert "weight" not in text_of(peer_table(result))
    written = {path.name for path in write_files(result, tmp_path / "report")}
    assert written == {"peers.csv", "accuracy.png", "accuracy_macs.png"}
    assert "weight" not in (tmp_path / "report" / "peers.csv").read_text()


def test_the_tree_of_a_checkpoint_is_the_one_that_pcl_evaluates(tmp_path):
    config = tiny_config("method.name=pcl", "optim.epochs=1", f"run.storage_path={tmp_path}")
    (epoch,) = run_worker(config, WorkerContext())["history"]
    tree = load_tree(epoch_folder(config.run_folder / "checkpoints", 1), trust=True)
    ((inputs, targets),) = load_dataset(config).evaluation_batches("validation", WorkerRank())
    with torch.no_grad():
        shares = (tree(inputs).argmax(-1) == targets).double().mean(1).tolist()
    assert shares == pytest.approx([epoch["metrics"][f"val/accuracy/peer{peer}"] for peer in range(4)])


def test_the_cost_of_a_training_is_that_of_its_epochs_and_of_the_memory_it_used(tmp_path):
    config = tiny_config("optim.epochs=2", f"run.storage_path={tmp_path}")
    held, seconds = np.ones(150_000_000), time.perf_counter()  # 1.2 GB, freed before the training
    del held
    logged = {}
    context = WorkerContext(log=lambda step, metrics, timestamp_ms: logged.update(metrics))
    cost = run_worker(config, context)["cost"]
    assert 0 < cost["seconds"] < time.perf_counter() - seconds
    resident = psutil.Process().memory_info().rss
    assert 0.5 * resident < cost["peak_memory_bytes"] < resident + 400e6
    assert {name: logged[f"train/{name}"] for name in cost} == cost


def test_a_run_goes_on_in_the_precision_that_its_first_machine_chose(tmp_path, monkeypatch):
    def on_a_machine_with(precision, **context):
        monkeypatch.setattr("wml_ray.training.worker.resolve_precision", lambda *_: precision)
        overrides = ["optim.precision=auto", "optim.epochs=2", f"run.storage_path={tmp_path}"]
        return run_worker(tiny_config(*overrides), WorkerContext(**context))

    def stop(event):
        if isinstance(event, EpochEnd):
            raise KeyboardInterrupt

    whole = run_worker(tiny_config("optim.epochs=2", "optim.precision=bfloat16", f"run.storage_path={tmp_path}"), ALONE)
    with pytest.raises(KeyboardInterrupt):
        on_a_machine_with("bfloat16", report=stop)
    resumed = on_a_machine_with("float32")
    assert resumed["precision"] == whole["precision"] == "bfloat16"
    assert resumed["final"]["test/accuracy/peer0"] == whole["final"]["test/accuracy/peer0"]
    assert [epoch["metrics"]["train/loss"] for epoch in resumed["history"]] == [
        epoch["metrics"]["train/loss"] for epoch in whole["history"]
    ]


def test_a_resumed_run_counts_the_seconds_and_the_memory_of_the_process_before_it(tmp_path):
    def stop(event):
        if isinstance(event, EpochEnd):
            np.ones(100_000_000)  # 800 MB, freed at once
            if event.epoch == 2:
                raise KeyboardInterrupt

    config = tiny_config("optim.epochs=3", f"run.storage_path={tmp_path}")
    with pytest.raises(KeyboardInterrupt):
        run_worker(config, WorkerContext(report=stop))
    result = run_worker(config, WorkerContext())
    epochs_s = [1280 / entry["metrics"]["train/images_per_second"] for entry in result["history"]]
    assert result["cost"]["seconds"] == pytest.approx(sum(epochs_s))
    assert result["cost"]["peak_memory_bytes"] > 800e6 + psutil.Process().memory_info().rss / 2


@pytest.fixture
def interrupting():
    """SIGTERM raises KeyboardInterrupt, as on the command line."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("interrupting")
@pytest.mark.parametrize(
    ("batch_size", "on_sigterm", "saved"),
    [(16, "continue", 50), (16, "again", None), (16, "hang", None), (64, "continue", 1)],
    ids=["in the middle of an epoch", "twice", "longer than the grace period", "at the end of an epoch"],
)
def test_sigterm_saves_a_checkpoint_from_which_the_run_resumes(tmp_path, monkeypatch, batch_size, on_sigterm, saved):
    """The steps done of the epoch that is saved in `partial`, or the epoch: it ends before the next check of a step."""
    monkeypatch.setattr("wml_ray.training.trainer.PROGRESS_INTERVAL_S", 0.0)  # an event a step
    monkeypatch.setattr(termination, "GRACE_S", 0.01 if on_sigterm == "hang" else 60.0)

    def terminate(event):
        if isinstance(event, StepProgress) and event.step == (30 if batch_size == 16 else 15):
            signal.raise_signal(signal.SIGTERM)
            if on_sigterm == "again":
                signal.raise_signal(signal.SIGTERM)
            if on_sigterm == "hang":
                threading.Event().wait(60)

    options = [f"data.batch_size={batch_size}", "optim.epochs=2"]
    config = tiny_config(*options, f"run.storage_path={tmp_path}")
    with pytest.raises(KeyboardInterrupt):
        run_worker(config, WorkerContext(report=terminate))
    folder = config.run_folder / "checkpoints"
    partial = Checkpoints(folder / "partial", 1).latest()
    if batch_size == 16:
        assert (partial and int(partial.state["step"])) == saved
    else:
        assert (partial, Checkpoints(folder, 2).latest().epoch) == (None, saved)
    whole = run_worker(tiny_config(*options, f"run.storage_path={tmp_path / 'whole'}"), WorkerContext())
    assert history_of(run_worker(config, WorkerContext())) == history_of(whole)
