"""The settings of a search and of a comparison."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from wml_ray.config.load import validation_message
from wml_ray.errors import UserError
from wml_ray.settings import MAX_INTEGER, NAME, Count, CountOrZero, Section, Text

MAX_SEEDS = 1000


class _Options(Section):
    """Settings that are given one by one, with errors in one line."""

    def __init__(self, **settings: Any) -> None:
        """Check the settings.

        Raises:
            UserError: an unknown setting, or a value outside its range.
        """
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise UserError(validation_message(error, type(self).model_fields)) from None


class SearchConfig(_Options):
    """The settings of a search; each field is an option of `wml-ray tune`."""

    study: Annotated[str, Field(pattern=NAME)] = Field(
        description="name of the study, of its folder and of its MLflow experiment"
    )
    trials: Annotated[Count, Field(le=1_000_000)] = Field(
        description="number of trials of the study, those of earlier starts included"
    )
    sampler: Literal["tpe", "gp", "cmaes", "nsga2", "grid", "random"] = Field(
        "tpe", description="Optuna sampler that suggests points"
    )
    scheduler: Literal["asha", "hyperband", "median", "none"] = Field(
        "asha", description="rule that stops trials early"
    )
    stop_metric: Annotated[Text, Field(max_length=200)] = Field(
        "val/accuracy/method", description="metric that the scheduler compares"
    )
    grace_epochs: Count | None = Field(
        None, description="epochs before a trial can be stopped; none is the square root of all epochs"
    )
    reduction_factor: Annotated[Count, Field(ge=2)] = Field(
        3, description="ASHA and HyperBand keep one trial in this many at each rung (1, 3, 9, .. times grace_epochs)"
    )
    storage: str | None = Field(
        None,
        description="Optuna storage for dashboards: sqlite:///FILE or postgresql://..; none keeps the study in memory",
    )
    concurrent: Count | None = Field(None, description="trials at a time; none is as many as fit in the cluster")
    keep_stopped: bool = Field(False, description="keep the checkpoints of trials that were stopped early")
    seed: Annotated[int, Field(ge=0, le=MAX_INTEGER)] = Field(0, description="seed of the sampler")

    def grace(self, budget: int) -> int:
        """`grace_epochs`, or its default, for trials with a budget of `budget` epochs; at most the budget."""
        return min(self.grace_epochs or round(math.sqrt(budget)), budget)


class CompareConfig(_Options):
    """The settings of a comparison; each field is an option of `wml-ray compare`."""

    study: Annotated[str, Field(pattern=NAME)] = Field(
        description="name of the comparison, of its folder and of its MLflow experiment"
    )
    methods: Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        description="methods to compare; differences are those to the first"
    )
    seeds: Annotated[int, Field(ge=1, le=MAX_SEEDS)] = Field(
        3, description=f"seeds of each method, the config's and those after it, at most {MAX_SEEDS}"
    )
    keys: tuple[Text, ...] = Field(
        (), description="further rows: `key=value` words that a row sets together; each of several values is a row"
    )
    tune: CountOrZero = Field(0, description="trials of each row's own search before the seeds run at its best")
    published: Annotated[str, Field(max_length=3000)] = Field(  # characters: it is kept in a tag of MLflow
        "", description="published accuracies in per cent as CSV, shown beside the measured ones"
    )
    concurrent: Count | None = Field(None, description="trials at a time; none is as many as fit in the cluster")
