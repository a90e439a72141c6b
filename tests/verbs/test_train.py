"""Whole runs: real processes, real signals, a real MLflow store."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import yaml
from deadline import DEADLINE_S
from family import DIVERGES, tiny_config
from runs import assert_bit_equal, client, ignore, interrupt_training, only_run, start_training, steps, wait_for_epoch

from wml_ray.checkpoints.store import Checkpoints
from wml_ray.cli.main import main
from wml_ray.config.title import run_title
from wml_ray.errors import Diverged, UserError
from wml_ray.training.events import EpochEnd
from wml_ray.verbs.train import train

TESTS = Path(__file__).parents[1]


def test_a_run_is_logged_to_mlflow_with_params_metrics_and_files(workplace):
    config = tiny_config("optim.epochs=3")
    run = train(config, ignore)
    logged = only_run()
    assert logged.info.status == "FINISHED"
    assert logged.info.run_name == run_title(config)
    assert logged.data.tags["wml_ray.run_id"] == config.run_id
    assert logged.data.params == {key: str(value) for key, value in config.flatten().items()}
    for metric in ("val/accuracy/peer3", "val/accuracy/ensemble_average", "weights/peer0", "train/loss"):
        assert steps(logged, metric) == [1, 2, 3]
    for metric in ("test/accuracy/peer0", "test/accuracy/ensemble_weighted"):
        assert steps(logged, metric) == [3]
    assert steps(logged, "peers/macs/peer0") == [0]
    assert logged.data.metrics["peers/params/peer3"] == run.record["peers"][3]["params"]
    files = {file.path for file in client().list_artifacts(logged.info.run_id)}
    assert files == {"config.yaml", "peers.csv", "pictures"}
    pictures = {file.path for file in client().list_artifacts(logged.info.run_id, "pictures")}
    assert pictures == {"pictures/accuracy.png", "pictures/weights.png", "pictures/accuracy_macs.png"}
    assert (
        client().get_experiment(logged.info.experiment_id).tags["mlflow.experimentKind"] == "custom_model_development"
    )
    images = {entry.tags[0].value: entry.dataset.profile for entry in logged.inputs.dataset_inputs}
    assert images == {
        name: f'{{"num_rows": {n}}}' for name, n in (("training", 1294), ("validation", 144), ("test", 359))
    }
    note = logged.data.tags["mlflow.note.content"]
    assert f"| {run.record['peers'][3]['test_accuracy'] * 100:.2f} |" in note
    assert logged.data.tags["mlflow.source.type"] == "LOCAL"


def test_a_finished_run_is_shown_and_not_trained_again(workplace, capsys):
    config = tiny_config("optim.epochs=1")
    first = train(config, ignore)
    (workplace / "config.yaml").write_text(config.to_yaml())
    assert main(["train", "config.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "finished before" in shown
    assert "train anew" in shown
    assert f"{first.record['peers'][0]['test_accuracy'] * 100:.2f}" in shown
    assert steps(only_run(), "train/loss") == [1]


def test_the_logged_config_reruns_the_run_to_the_same_bits(workplace):
    train(tiny_config("optim.epochs=1", "seed=5"), ignore)
    logged = client().download_artifacts(only_run().info.run_id, "config.yaml", str(workplace))
    raw = yaml.safe_load(Path(logged).read_text())
    raw["run"]["storage_path"] = "elsewhere"
    raw["run"]["name"] = "again"
    (workplace / "again.yaml").write_text(yaml.safe_dump(raw))
    assert main(["train", "again.yaml"]) == 0
    one, other = (next(Path(folder).glob("*/*/checkpoints/epoch-0001")) for folder in ("results", "elsewhere"))
    assert_bit_equal(one, other)


@pytest.mark.core
def test_a_run_killed_at_random_moments_ends_bit_equal_with_every_epoch_logged_once(workplace):
    epochs = 12
    overrides = [f"optim.epochs={epochs}", "data.batch_size=32"]
    whole = train(tiny_config(*overrides, "run.storage_path=whole", "run.name=whole"), ignore)
    config = tiny_config(*overrides)
    (workplace / "config.yaml").write_text(config.to_yaml())
    seed = random.randrange(10**6)
    print("kill seed", seed)
    rng = random.Random(seed)
    checkpoints = Checkpoints(config.run_folder / "checkpoints", 2)
    kills = 0
    for target in (1, 5, 9):
        process = start_training()
        wait_for_epoch(checkpoints, target, process)
        time.sleep(rng.uniform(0, 0.5))  # a random moment: between two checkpoints, or inside one
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills == 3, "training was too fast to be killed: raise the number of epochs"
    final = start_training()
    assert final.wait(120) == 0
    last = f"epoch-{epochs:04d}"
    assert_bit_equal(config.run_folder / "checkpoints" / last, whole.folder / "checkpoints" / last)
    logged = only_run()
    assert logged.info.status == "FINISHED"
    for metric in ("train/loss", "val/accuracy/peer0", "weights/peer3"):
        assert steps(logged, metric) == list(range(1, epochs + 1))
    assert steps(logged, "test/accuracy/peer0") == [epochs]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.core)])
def test_after_ctrl_c_or_sigterm_the_same_command_continues(workplace, number):
    config = tiny_config("optim.epochs=40", "data.batch_size=32")
    interrupt_training(config, number)
    assert start_training().wait(DEADLINE_S) == 0
    assert only_run().info.status == "FINISHED"
    assert steps(only_run(), "train/loss") == list(range(1, 41))


def test_a_diverged_run_is_failed_in_mlflow_and_keeps_its_last_good_checkpoint(workplace, capsys):
    config = tiny_config(*DIVERGES, "optim.epochs=2")
    (workplace / "config.yaml").write_text(config.to_yaml())
    assert main(["train", "config.yaml"]) == 1
    *_, line = capsys.readouterr().err.splitlines()  # before it, a loss that grew may have been warned of
    assert "peer" in line
    assert "step" in line
    assert "learning rate 100" in line
    assert "checkpoints" in line
    logged = only_run()
    assert logged.info.status == "FAILED"
    assert "not finite" in logged.data.tags["wml_ray.reason"]
    assert Checkpoints(config.run_folder / "checkpoints", 2).latest().epoch == 0


def test_a_damaged_checkpoint_is_skipped_and_no_epoch_is_logged_twice(workplace):
    config = tiny_config("optim.epochs=4")

    def stop_after_three(event):
        if isinstance(event, EpochEnd) and event.epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, stop_after_three)
    damaged = config.run_folder / "checkpoints" / "epoch-0003" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="epoch-0003 is damaged"):
        train(config, ignore)
    assert steps(only_run(), "train/loss") == [1, 2, 3, 4]


def test_damaged_files_of_a_run_are_one_line_and_the_run_ends_alike_once_they_are_deleted(workplace, capsys):
    config = tiny_config("optim.epochs=1")
    Path("config.yaml").write_text(config.to_yaml())
    before = train(config, ignore).record
    for name in ("run.json", "result.json"):
        path = config.run_folder / name
        path.write_bytes(path.read_bytes()[:-20])
        capsys.readouterr()
        assert main(["train", "config.yaml"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{path} is damaged (" in line
        assert "delete it" in line
        path.unlink()
        again = train(config, ignore)
        assert (again.undelivered, again.record["history"]) == (0, before["history"])
    runs = client().search_runs([client().get_experiment_by_name("wml").experiment_id])
    assert [(run.info.status, steps(run, "train/loss")) for run in runs] == [("FINISHED", [1])] * 2


def test_the_best_epoch_is_tested_with_test_epoch_best(workplace):
    run = train(tiny_config("optim.epochs=5", "run.test_epoch=best", "optim.schedule=constant"), ignore)
    scores = [entry["metrics"]["val/accuracy/ensemble_weighted"] for entry in run.record["history"]]
    assert scores[run.record["test_epoch"] - 1] == max(scores)
    validation = run.record["predictions"]["ensemble_weighted"]["validation_accuracy"]
    assert validation == max(scores)


def test_the_next_best_checkpoint_replaces_a_damaged_best_one(workplace):
    config = tiny_config("optim.epochs=5", "run.test_epoch=best", "run.keep_checkpoints=5", "optim.learning_rate=0.5")
    store = Checkpoints(config.run_folder / "checkpoints", 5)

    def damage_all_but_the_second(event):
        if isinstance(event, EpochEnd) and event.epoch == 5:
            for epoch in (1, 3, 4, 5):
                (store.folder / f"epoch-{epoch:04d}" / "model.safetensors").write_bytes(b"")

    with pytest.warns(UserWarning, match="is damaged"):
        run = train(config, damage_all_but_the_second)
    assert run.record["test_epoch"] == 2


def test_two_commands_cannot_train_one_run_at_once(workplace):
    config = tiny_config("optim.epochs=1")

    def train_again(event):
        with pytest.raises(UserError, match="in use by process"):
            train(config, ignore)

    train(config, train_again)


def test_system_metrics_are_logged_if_the_config_sets_them(workplace, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING", "1")
    train(tiny_config("optim.epochs=3", "run.system_metrics=true"), ignore)
    assert any(name.startswith("system/cpu") for name in only_run().data.metrics)
    assert "MLFLOW_TRACKING_URI" not in os.environ  # the next run may use another store


@pytest.mark.slow  # with the other tests of the shared cluster
@pytest.mark.usefixtures("ray_cluster")
def test_too_many_workers_for_a_batch_are_refused_before_anything_is_written(empty_workplace):
    with pytest.raises(UserError, match=r"scale\.workers = 2 is too many for batches of 3 images"):
        train(tiny_config("data.batch_size=3", "scale.workers=2", "scale.cpus_per_worker=1"), ignore)
    assert not os.listdir()


def test_plan_writes_nothing_and_names_the_run(empty_workplace, capsys):
    config = tiny_config()
    (empty_workplace / "config.yaml").write_text(config.to_yaml())
    assert main(["plan", "config.yaml"]) == 0
    assert config.run_id in capsys.readouterr().out
    assert os.listdir() == ["config.yaml"]


def test_plan_shows_the_sizes_of_the_trained_peers(workplace):
    from wml_ray.verbs.plan import plan

    config = tiny_config("optim.epochs=1")
    sizes = [(peer["params"], peer["macs"]) for peer in plan(config).peers]
    trained = train(config, ignore).record["peers"]
    assert sizes == [(peer["params"], peer["macs"]) for peer in trained]


def test_report_compares_the_runs_of_an_experiment(workplace, capsys):
    for seed in (1, 2):
        train(tiny_config("optim.epochs=1", f"seed={seed}"), ignore)
    assert main(["report", "wml"]) == 0
    shown = capsys.readouterr().out
    assert all(f"seed={seed}" in shown for seed in (1, 2))
    assert (workplace / "reports" / "wml" / "accuracy_macs.png").stat().st_size > 5000
    assert main(["report", "nothing-here"]) == 2


def test_divergence_is_a_runtime_error_for_programs(workplace):
    with pytest.raises(Diverged):
        train(tiny_config(*DIVERGES), ignore)
    record = json.loads((next(Path("results").glob("*/*")) / "run.json").read_text())
    assert record["delivered"] is False
