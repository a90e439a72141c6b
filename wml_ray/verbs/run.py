"""Run: a training by its folder, finished or interrupted, with its tables, pictures and networks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wml_ray.config.load import parse_config
from wml_ray.config.schema import Config
from wml_ray.errors import UserError
from wml_ray.report.choosing import Limits, candidates_of, fitting
from wml_ray.storage.files import read_json
from wml_ray.storage.retry import retry_storage
from wml_ray.storage.runs import RESULT, find_run
from wml_ray.tracking.results import logged_run_folder
from wml_ray.tracking.runs import TrackedRun
from wml_ray.training.result import read_result

if TYPE_CHECKING:
    import pandas as pd

    from wml_ray.export.network import Network


@dataclass(frozen=True)
class Run:
    """A run. `wml_ray.train` and `wml_ray.load_run` return the same object."""

    folder: Path
    """Its folder, or its address in remote storage; or that of an exported network."""
    record: dict[str, Any] = field(repr=False)
    """result.json; of a run that has not finished, the plan.json of its newest checkpoint."""
    tracked: TrackedRun | None = field(default=None, repr=False)
    """Its MLflow run."""
    trust: bool = field(default=False, repr=False)
    """Code of your own that the config names may be imported."""
    trained_now: bool = field(default=False, repr=False)
    """Whether this call of `train` trained it; False if it had finished before."""
    undelivered: int = field(default=0, repr=False)
    """Operations that MLflow did not accept."""

    @property
    def finished(self) -> bool:
        """Whether it was trained to its last epoch and tested."""
        return "final" in self.record

    @cached_property
    def config(self) -> Config:
        """Its config."""
        return parse_config(self.record["config"])

    @property
    def peers(self) -> pd.DataFrame:
        """One row a peer: sizes, shares removed, latency in ms, accuracies (0 to 1) and weight, as far as measured."""
        import pandas as pd

        rows = [{"peer": index, **peer} for index, peer in enumerate(self.record["peers"])]
        return pd.DataFrame(rows).set_index("peer")

    @property
    def epochs(self) -> pd.DataFrame:
        """One row an epoch, numbered from 1, and one column a metric, under its MLflow name."""
        import pandas as pd

        history = self.record["history"]
        index = pd.Index([entry["epoch"] for entry in history], name="epoch")
        return pd.DataFrame([entry["metrics"] for entry in history], index=index)

    @property
    def pictures(self) -> list[Path]:
        """Its pictures, PNG files; none before it has finished."""
        return retry_storage(lambda: sorted((self.folder / "report").glob("*.png")), self.folder)

    def peer(self, index: int, epoch: int | None = None) -> Network:
        """Peer `index` as a network that takes images as they are, of the tested epoch or of a kept one.

        Raises:
            UserError: there is no such peer or epoch, the run has not finished and no epoch is given, or it names code
                that is not trusted.
        """
        return self._network(index, epoch)

    def ensemble(self, kind: str = "ensemble", epoch: int | None = None) -> Network:
        """The `average` or `weighted` ensemble as one network, which runs the tree once.

        By default it is weighted where the method has peer weights, else average.

        Raises:
            UserError: as `peer`, or the method has no peer weights.
        """
        return self._network(kind, epoch)

    def smallest_within(
        self, macs: float | None = None, params: float | None = None, latency_ms: float | None = None
    ) -> Network:
        """The peer with the highest validation accuracy within the limits; of equals, the smallest.

        Raises:
            UserError: no peer is within the limits, with by how much the nearest misses; or the run has not finished.
        """
        if not self.finished:
            raise UserError(f"run {self.folder} has not finished, so nothing can be chosen; train it to its end")
        peers = [candidate for candidate in candidates_of(self.record, self.folder) if candidate.choice.isdecimal()]
        best = fitting(peers, Limits(macs, params, latency_ms))[0]
        return self.peer(int(best.choice))

    def _network(self, choice: int | str, epoch: int | None) -> Network:
        from wml_ray.export.network import load_network

        return load_network(self.folder, choice, epoch, self.trust)

    def _repr_html_(self) -> str:
        state = "finished" if self.finished else f"epoch {len(self.record['history'])} of {self.config.optim.epochs}"
        return f"<p>run {self.config.run_id}, {state}</p>{self.peers.to_html()}"


def load_run(run: str | Path, storage_path: str = "results", trust: bool = False) -> Run:
    """A run by its folder, its address, its run id below `storage_path`, or the id of its MLflow run.

    `run` may also be a folder that `wml-ray export --to safetensors` wrote. Networks of a run that names code of your
    own, as `package.module:function`, are built with `trust=True` only.

    Raises:
        DamagedCheckpoint: a checkpoint is damaged.
        StorageUnavailable: the storage failed for ten minutes.
        UserError: there is no such run, or it has no checkpoint yet.
    """
    folder = find_run(str(run), storage_path) or logged_run_folder(str(run))
    if folder is None:
        raise UserError(
            f"there is no run '{run}': no such folder, no run of this id below {storage_path}, and none in MLflow; "
            "give its folder, or its storage_path"
        )
    record = read_result(folder / RESULT) or _plan(folder)
    saved = read_json(folder / "run.json", "delete it: the run continues, in a new MLflow run") or {}
    tracked = TrackedRun(**saved["tracked"]) if saved.get("tracked") else None
    return Run(folder, record, tracked, trust)


def _plan(folder: Path) -> dict[str, Any]:
    """The metadata of an exported network, or of the newest checkpoint of a run that has not finished."""
    from wml_ray.checkpoints.checkpoint import epoch_folder, read_checkpoint
    from wml_ray.checkpoints.store import stored_epochs

    if retry_storage((folder / "plan.json").exists, folder):
        plan = dict(read_checkpoint(folder).metadata)
        return plan | {"config": plan.get("run_config", plan["config"])}
    checkpoints = folder / "checkpoints"
    epochs = stored_epochs(checkpoints)
    if not epochs:
        raise UserError(f"{folder} is no run: it has neither {RESULT} nor a checkpoint")
    return read_checkpoint(epoch_folder(checkpoints, epochs[-1])).metadata
