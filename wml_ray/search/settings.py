"""The settings of a search; each is an option of `wml-ray tune`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from wml_ray.config.load import validation_message
from wml_ray.errors import UserError
from wml_ray.settings import NAME, Count, Section


class SearchConfig(Section):
    """How a study searches; each field is an option of `wml-ray tune`."""

    study: Annotated[str, Field(pattern=NAME)] = Field(description="its name: an MLflow experiment and a folder")
    trials: Count = Field(description="trials the study is to have in all; those it has already count")
    sampler: Literal["tpe", "nsga2", "random"] = Field("tpe", description="who suggests points: Optuna's sampler")
    scheduler: Literal["asha", "median", "none"] = Field("asha", description="who stops trials early")
    stop_metric: str = Field("val/accuracy/method", description="metric that decides who is stopped")
    grace_epochs: Count | None = Field(
        None, description="epochs every trial is given before it can be stopped; none is the square root of all epochs"
    )
    reduction_factor: Annotated[int, Field(ge=2)] = Field(
        3, description="ASHA keeps one trial in this many at each rung (1, 3, 9, .. times grace_epochs)"
    )
    storage: str | None = Field(
        None,
        description="Optuna storage others can look at: sqlite:///FILE or postgresql://..; none keeps it in memory",
    )
    concurrent: Count | None = Field(None, description="trials at a time; none is as many as the cluster holds")
    keep_stopped: bool = Field(False, description="keep the checkpoints of trials that were stopped early")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of the sampler")

    def grace(self, budget: int) -> int:
        """`grace_epochs` for trials of `budget` epochs: the first ones say little about the last."""
        return min(self.grace_epochs or round(math.sqrt(budget)), budget)


def search_config(**settings: Any) -> SearchConfig:
    """Raises:
    UserError: an unknown setting, or a value outside its range.
    """
    try:
        return SearchConfig(**settings)
    except ValidationError as error:
        raise UserError(validation_message(error, SearchConfig.model_fields)) from None
