"""A training, a study or a comparison with all its settings, as it is run here or sent to a cluster."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wml_ray.config.load import parse_config
from wml_ray.config.schema import Config
from wml_ray.storage.paths import to_path

if TYPE_CHECKING:
    from wml_ray.search.settings import CompareConfig, SearchConfig
    from wml_ray.search.space import Space


@dataclass(frozen=True)
class Job:
    """A training (config alone), a study (with a space and search settings) or a comparison (with its settings)."""

    verb: Literal["train", "tune", "compare"]
    config: Config
    space: Space | None = None
    search: SearchConfig | None = None
    start: Sequence[Mapping[str, Any]] = ()  # points to try first
    warm_start: Sequence[str] = ()  # names of earlier studies
    comparison: CompareConfig | None = None
    check_data: bool = False
    dry_run: bool = False
    verbose: bool = False

    @property
    def name(self) -> str:
        """Run id, or name of the study or comparison."""
        settings = self.search or self.comparison
        return settings.study if settings else self.config.run_id

    @property
    def folder(self) -> str:
        """The folder of the run or study; no two jobs may work in it."""
        if self.search or self.comparison:
            return str(to_path(self.config.run.storage_path) / self.name)
        return str(self.config.run_folder)

    def to_json(self) -> str:
        """The job as JSON text, without the address of the Optuna storage, which may hold a password."""
        raw: dict[str, Any] = {"verb": self.verb, "config": self.config.model_dump(mode="json")}
        raw |= {"check_data": self.check_data, "dry_run": self.dry_run, "verbose": self.verbose}
        if self.space and self.search:
            raw |= {"space": self.space.source, "search": self.search.model_dump(mode="json", exclude={"storage"})}
            raw |= {"start": list(self.start), "warm_start": list(self.warm_start)}
        if self.comparison:
            raw["comparison"] = self.comparison.model_dump(mode="json")
        return json.dumps(raw, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job that `to_json` described; the address of the Optuna storage is that of OPTUNA_STORAGE.

        Raises:
            UserError: the config or the space is refused by the code on this machine.
        """
        raw = json.loads(text)
        raw["config"] = parse_config(raw["config"])
        if raw["verb"] == "tune":
            from wml_ray.cluster.space import load_space
            from wml_ray.search.settings import SearchConfig

            raw["search"] = SearchConfig(**raw["search"], storage=os.environ.get("OPTUNA_STORAGE") or None)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "space.py"
                path.write_text(raw["space"])
                raw["space"] = load_space(path, raw["config"])
        if raw["verb"] == "compare":
            from wml_ray.search.settings import CompareConfig

            raw["comparison"] = CompareConfig(**raw["comparison"])
        return cls(**raw)
