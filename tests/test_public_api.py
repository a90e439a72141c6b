"""The names of `wml_ray`, and a script that uses them."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from family import tiny_config

import wml_ray
from wml_ray.training.events import EpochEnd

ROOT = Path(__file__).parent.parent
PUBLIC = {
    *("__version__", "Config", "CompareConfig", "SearchConfig", "Section", "Method", "UserError", "Diverged"),
    *("Run", "Study", "Network", "train", "tune", "compare", "plan", "evaluate", "export_network"),
    *("load_config", "load_run", "load_space", "load_study", "make_space", "increasing", "pareto_front"),
}


def test_the_public_names_are_these_and_each_resolves():
    assert set(wml_ray.__all__) == PUBLIC
    assert len(wml_ray.__all__) == len(PUBLIC) <= 25
    assert set(dir(wml_ray)) >= PUBLIC
    for name in PUBLIC - {"__version__"}:
        assert getattr(wml_ray, name).__name__ == name
    with pytest.raises(AttributeError, match=r"no attribute 'trian'; public are .*train"):
        wml_ray.trian  # noqa: B018


def test_no_public_name_becomes_a_folder_of_the_package_once_that_is_imported():
    folders = {path.parent.name for path in (ROOT / "wml_ray").glob("*/__init__.py")}
    assert folders & {*wml_ray.__all__} == set()


def test_the_import_loads_nothing_heavy():
    program = "import sys, wml_ray; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "mlflow", "pydantic", "rich", "numpy", "pandas", "yaml"} & set(loaded)


@pytest.mark.parametrize("path", [*ROOT.glob("jobs/*.py"), *ROOT.glob("tune_spaces/*.py")], ids=lambda path: path.name)
def test_scripts_and_spaces_import_only_the_public_names(path):
    lines = [line for line in path.read_text().splitlines() if "wml_ray" in line and "import" in line]
    allowed = ("import wml_ray", "from wml_ray import ")
    if path.name == "submit.py":
        allowed = ("from wml_ray.cli.main import main",)
    assert [line for line in lines if not line.startswith(allowed)] == []


def test_the_script_submit_is_the_verb_submit(workplace, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["submit.py", "train", "nowhere.yaml"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "jobs" / "submit.py"), run_name="__main__")
    assert "config file nowhere.yaml" in capsys.readouterr().err


def test_train_shows_its_progress_and_returns_pandas_frames(workplace, capsys):
    config = tiny_config("optim.epochs=2")
    result = wml_ray.train(config)
    lines = [line for line in capsys.readouterr().out.splitlines() if config.run_id in line]
    assert [line.partition(",")[0] for line in lines] == [  # then the threads, and the loss
        f"run {config.run_id}: 4 peers of family:stages on digits",
        f"{config.run_id} epoch 1/2",
        f"{config.run_id} epoch 2/2",
    ]
    assert list(result.epochs.index) == [1, 2]
    assert result.epochs["val/accuracy/peer3"].between(0, 1).all()
    assert list(result.peers.index) == [0, 1, 2, 3]
    assert result.peers["params"].is_monotonic_decreasing
    assert result.peers["weight"].sum() == pytest.approx(1)


def test_a_callback_replaces_the_progress(workplace, capsys):
    events = []
    wml_ray.train(tiny_config("optim.epochs=1"), events.append)
    assert [event.epoch for event in events if isinstance(event, EpochEnd)] == [1]
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_tune_shows_its_progress(workplace, capsys):
    from ray.tune import uniform

    space = wml_ray.make_space(tiny_config("optim.epochs=1"), {"wml.alpha": uniform(0, 1)}, {"train/loss": "min"})
    result = wml_ray.tune(space, wml_ray.SearchConfig(study="shown", trials=1))
    assert list(result.study.trials["state"]) == ["COMPLETE"]
    assert "shown: 1 of 1 trials done" in capsys.readouterr().out
