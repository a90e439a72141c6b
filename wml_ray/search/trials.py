"""The trials of a study as JSON files, one for each trial, from which a study continues after any kill."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from wml_ray.errors import one_line
from wml_ray.storage.files import DamagedFile, get_text, parse_object, remove_tree, write_json
from wml_ray.storage.lease import Lease
from wml_ray.storage.retry import retry_storage
from wml_ray.tracking.tags import TrialState


@dataclass
class Trial:
    """One trial. COMPLETE trials reached the full budget; STOPPED ones were stopped early by the scheduler."""

    number: int
    point: dict[str, Any]  # parameters of the sampler
    state: TrialState = "RUNNING"
    sizes: dict[str, float] = field(default_factory=dict)  # the metrics of step 0
    history: list[dict[str, Any]] = field(default_factory=list)  # epoch, timestamp_ms, metrics
    final: dict[str, Any] | None = None  # epoch, timestamp_ms, metrics of the test
    reason: str = ""  # of a failure
    created_ms: int = 0
    delivered: bool = False  # MLflow has all metrics and files
    system_attributes: dict[str, Any] = field(default_factory=dict)  # of the sampler, such as a generation

    @property
    def epochs(self) -> int:
        """The epochs trained so far."""
        return int(self.history[-1]["epoch"]) if self.history else 0

    def metrics(self, epoch: int | None = None) -> dict[str, float]:
        """All metrics at the end of an epoch, the last by default."""
        if not self.history:
            return dict(self.sizes)
        entry = self.history[-1] if epoch is None else next(e for e in self.history if e["epoch"] == epoch)
        final = self.final["metrics"] if self.final else {}
        return {**self.sizes, **entry["metrics"], **final}

    def results(self) -> dict[str, float]:
        """The metrics of a complete trial at the epoch of its test accuracy."""
        assert self.final is not None
        return self.metrics(self.final["epoch"])


class TrialStore:
    """The trials of a study in its folder: `trials/0007/trial.json`, beside the folder of that trial's run."""

    def __init__(self, folder: Path, lease: Lease | None = None) -> None:
        """`lease` is the process's lease on the folder; it is checked before each write."""
        self.folder, self.lease = folder, lease

    def trials(self) -> list[Trial]:
        """All trials by number. A damaged file is passed over with a warning."""
        trials = []
        for path in self._files():
            try:
                trials.append(Trial(**parse_object(retry_storage(partial(get_text, path), path))))
            except (DamagedFile, TypeError) as error:
                warnings.warn(
                    f"{path} is damaged ({one_line(error)}); the study continues without this trial and trains another",
                    stacklevel=2,
                )
        return sorted(trials, key=lambda trial: trial.number)

    def next_number(self) -> int:
        """The number after those of all trials, the damaged ones included."""
        folders = [path.parent.name for path in self._files()]
        return max((int(name) for name in folders if name.isdigit()), default=-1) + 1

    def write(self, trial: Trial) -> None:
        """Write a trial's file.

        Raises:
            LeaseLost: another process has taken over the study.
        """
        if self.lease:
            retry_storage(self.lease.check, self.folder)
        write_json(self.trial_folder(trial.number) / "trial.json", asdict(trial))

    def trial_folder(self, number: int) -> Path:
        """The folder of a trial: its file, its config and its run."""
        return self.folder / "trials" / f"{number:04d}"

    def delete_checkpoints(self, number: int) -> None:
        """Delete all checkpoints of a trial."""
        retry_storage(lambda: self._delete_checkpoints(number), self.folder)

    def _files(self) -> list[Path]:
        return retry_storage(lambda: list(self.folder.glob("trials/*/trial.json")), self.folder)

    def _delete_checkpoints(self, number: int) -> None:
        for name in ("checkpoints", ".ray"):
            for folder in self.trial_folder(number).glob(f"*/{name}"):
                remove_tree(folder)
