"""The time left of a study."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wml_ray.search.study import Study


class Eta:
    """The time left of a study, from the epochs that this process has trained so far."""

    def __init__(self) -> None:
        self._start_s: float | None = None
        self._start_epochs = 0

    def start(self, epochs: int) -> None:
        """Measure from now on; `epochs` are those of earlier starts. Later calls do nothing."""
        if self._start_s is None:
            self._start_s, self._start_epochs = time.monotonic(), epochs

    def seconds(self, study: Study) -> float | None:
        """Seconds left if coming trials are as long as the ended ones were; None before the first trial has ended."""
        trials = study.trials.values()
        ended = [trial.epochs for trial in trials if trial.state != "RUNNING"]
        trained = study.epochs - self._start_epochs
        if not ended or not trained or self._start_s is None:
            return None
        mean = sum(ended) / len(ended)
        running = [trial.epochs for trial in trials if trial.state == "RUNNING"]
        # a trial that is longer than the mean is expected to reach the full budget
        left = sum((mean if epochs < mean else study.budget) - epochs for epochs in running)
        left += (study.search.trials - len(trials)) * mean
        return max(left, 0.0) * (time.monotonic() - self._start_s) / trained
