"""The settings of a search."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from wml_ray.config.load import validation_message
from wml_ray.errors import UserError
from wml_ray.settings import MAX_INTEGER, NAME, Count, Section, Text


class SearchConfig(Section):
    """The settings of a search; each field is an option of `wml-ray tune`."""

    study: Annotated[str, Field(pattern=NAME)] = Field(
        description="name of the study, of its folder and of its MLflow experiment"
    )
    trials: Annotated[Count, Field(le=1_000_000)] = Field(
        description="number of trials of the study, those of earlier starts included"
    )
    sampler: Literal["tpe", "nsga2", "random"] = Field("tpe", description="Optuna sampler that suggests points")
    scheduler: Literal["asha", "median", "none"] = Field("asha", description="rule that stops trials early")
    stop_metric: Annotated[Text, Field(max_length=200)] = Field(
        "val/accuracy/method", description="metric that the scheduler compares"
    )
    grace_epochs: Count | None = Field(
        None, description="epochs before a trial can be stopped; none is the square root of all epochs"
    )
    reduction_factor: Annotated[Count, Field(ge=2)] = Field(
        3, description="ASHA keeps one trial in this many at each rung (1, 3, 9, .. times grace_epochs)"
    )
    storage: str | None = Field(
        None,
        description="Optuna storage for dashboards: sqlite:///FILE or postgresql://..; none keeps the study in memory",
    )
    concurrent: Count | None = Field(None, description="trials at a time; none is as many as fit in the cluster")
    keep_stopped: bool = Field(False, description="keep the checkpoints of trials that were stopped early")
    seed: Annotated[int, Field(ge=0, le=MAX_INTEGER)] = Field(0, description="seed of the sampler")

    def __init__(self, **settings: Any) -> None:
        """Check the settings.

        Raises:
            UserError: an unknown setting, or a value outside its range.
        """
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise UserError(validation_message(error, type(self).model_fields)) from None

    def grace(self, budget: int) -> int:
        """`grace_epochs`, or its default, for trials with a budget of `budget` epochs; at most the budget."""
        return min(self.grace_epochs or round(math.sqrt(budget)), budget)
