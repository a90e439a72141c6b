"""The workers of a run and their resources."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from wml_ray.errors import shortened
from wml_ray.settings import Count, CountOrZero, Section

MAX_WORKERS = 4096


def _workers(value: Any) -> Any:
    numbers = value if isinstance(value, list) and len(value) == 2 else [value, value]
    ordered = all(type(number) is int for number in numbers) and numbers[0] <= numbers[1] <= MAX_WORKERS
    if not ordered or numbers[0] < (1 if numbers is value else 0):
        raise ValueError(
            f"scale.workers = {shortened(repr(value))} must be 0 (this process), a number of workers, or [min, max] "
            f"with 1 <= min <= max <= {MAX_WORKERS}, for example [1, 4]"
        )
    return value


class ScaleConfig(Section):
    """The workers and their resources."""

    workers: Annotated[int | list[int], BeforeValidator(_workers)] = Field(
        0,
        description="0 trains in this process, N on N Ray workers, [min, max] on as many as the cluster has slots for",
    )
    gpu: bool = Field(False, description="use one GPU per worker")
    cpus_per_worker: Annotated[Count, Field(le=1024)] | None = Field(
        None,
        description="CPU threads per worker; null divides the cores, and uses one thread for small images",
    )
    max_failures: CountOrZero = Field(
        3, description="restarts from the last checkpoint after a lost worker, before the run fails"
    )

    @property
    def worker_range(self) -> tuple[int, int]:
        """The fewest and the most workers; the same number twice unless the run is elastic."""
        return (self.workers[0], self.workers[1]) if isinstance(self.workers, list) else (self.workers, self.workers)
