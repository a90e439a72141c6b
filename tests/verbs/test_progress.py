"""The progress of a training without a terminal."""

from family import tiny_config

from wml_ray.training.events import EpochEnd, StepProgress
from wml_ray.verbs import progress as progress_module
from wml_ray.verbs.progress import TrainingProgress


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
