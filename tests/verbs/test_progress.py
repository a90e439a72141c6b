"""The progress of a training and of a study without a terminal: in a pipe, and in a notebook."""

import builtins
import sys
from contextlib import suppress
from types import ModuleType, SimpleNamespace

import pytest
from family import tiny_config
from studies import small_space

from wml_ray.search.settings import SearchConfig
from wml_ray.search.study import RunningStudy
from wml_ray.search.trials import Trial
from wml_ray.training.events import EpochEnd, StepProgress
from wml_ray.verbs import progress as progress_module
from wml_ray.verbs.progress import StudyProgress, TrainingProgress


def test_the_eta_is_left_out_until_steps_were_timed(monkeypatch, capsys):
    seconds = iter([10.0, 10.0, 14.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(seconds))
    progress, end = TrainingProgress(tiny_config()), {"val/accuracy/method": 0.5, "train/loss": 1.0}
    progress(StepProgress(1, 1, 100, 2.0))
    progress(EpochEnd(1, end))
    progress(StepProgress(2, 21, 100, 2.0))
    progress(EpochEnd(2, end))
    first, second = capsys.readouterr().out.splitlines()
    assert "ETA" not in first
    assert second.endswith(", ETA 0:15")


@pytest.fixture
def notebook(monkeypatch):
    """The text of what IPython is given to display, and of what it is given later to display in its place."""
    shown, updates = [], []

    def display(content, display_id):
        assert display_id
        shown.append(text_of(content))
        return SimpleNamespace(update=lambda later: updates.append(text_of(later)))

    module = ModuleType("IPython.display")
    module.display = display
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    shell = type("ZMQInteractiveShell", (), {})  # by its name, rich tells a notebook from a terminal
    monkeypatch.setattr(builtins, "get_ipython", shell, raising=False)
    return shown, updates


def text_of(content):
    return content._repr_mimebundle_(include=(), exclude=())["text/plain"]


def test_a_notebook_shows_one_line_that_is_updated_in_place(notebook, capsys):
    shown, updates = notebook
    with TrainingProgress(tiny_config()) as progress:
        progress(StepProgress(1, 1, 100, 2.5))
        progress(EpochEnd(1, {"val/accuracy/method": 0.5, "train/loss": 2.5}))
        progress(StepProgress(2, 50, 100, 1.5))
    assert len(shown) == 1
    assert 1 <= len(updates) <= 3
    assert "finished, accuracy 50.0 %" in updates[-1]
    assert "100%" in updates[-1]
    assert len(capsys.readouterr().out.splitlines()) == 1  # the run's first line


def test_a_notebook_keeps_the_last_step_of_an_interrupted_training(notebook):
    _, updates = notebook
    with suppress(KeyboardInterrupt), TrainingProgress(tiny_config()) as progress:
        progress(StepProgress(1, 1, 100, 2.5))
        progress(StepProgress(2, 50, 100, 1.5))
        raise KeyboardInterrupt
    assert "epoch 2/3, loss 1.500" in updates[-1]


def test_a_study_that_takes_long_to_show_is_shown_a_tenth_of_the_time_and_no_trial_is_left_out(
    monkeypatch, capsys, tmp_path
):
    seconds = [0.0]

    def summary_in_a_second(study):
        seconds[0] += 1
        return f"{len(study.trials)} trials"

    monkeypatch.setattr(progress_module.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(progress_module, "summary", summary_in_a_second)
    study = RunningStudy(small_space(), SearchConfig(study="s", trials=25), tmp_path, "token")
    with StudyProgress() as progress:
        for number in range(25):
            study.trials[number] = Trial(number, {"wml.alpha": 0.1}, "FAILED")
            seconds[0] += 1
            progress(study)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith("trials")] == [f"s: {n} trials" for n in (1, 11, 21, 25)]
    assert [line.split(" (")[0] for line in lines if " FAILED " in line] == [f"s: trial {n}" for n in range(25)]
