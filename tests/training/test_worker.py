"""A run through `run_worker`, without Ray and MLflow."""

from family import tiny_config
from rich.console import Console

from wml_ray.report.run_report import peer_table, write_files
from wml_ray.training.worker import WorkerContext, run_worker


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
