"""What a study searches, and how: a short Python file with Ray Tune domains, and the settings of the search."""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from wml_ray.config import NAME, Config, Count, Section, UserError, one_line, with_values
from wml_ray.metrics import metric_names

DRAWS = 200  # points drawn from a space, and held against the config, before the first trial
_NOT_SEARCHED = {
    "optim.epochs": "it is the budget every trial is measured against; set it in the config",
    "data.root": "it is where the data lies; set it in the config",
    "data.download": "set it in the config",
    "data.loader_workers": "set it in the config",
}
_MODES = ("max", "min")


class SearchConfig(Section):
    """How a study searches; each field is an option of `wml-ray tune`."""

    study: Annotated[str, Field(pattern=NAME)] = Field(description="its name: an MLflow experiment and a folder")
    trials: Count = Field(description="trials the study is to have in all; those it has already count")
    sampler: Literal["tpe", "nsga2", "random"] = Field("tpe", description="who suggests points: Optuna's sampler")
    scheduler: Literal["asha", "median", "none"] = Field("asha", description="who stops trials early")
    stop_metric: str = Field("val/accuracy/ensemble_weighted", description="metric that decides who is stopped")
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
        raise UserError(one_line(error, SearchConfig.model_fields)) from None


@dataclass(frozen=True)
class Increasing:
    """The domain of all increasing lists of numbers in [lower, upper], one number a peer."""

    lower: float
    upper: float


def increasing(lower: float, upper: float) -> Increasing:
    """A domain for `pruning.ratios`: every family of ratios once, rather than in each of its M! orders.

    The sampler sees M independent numbers u in [0, 1], and the ratios are built from the largest down as order
    statistics: r_M = lower + (upper - lower) u_M^(1/M), then r_k = lower + (r_k+1 - lower) u_k^(1/k). Uniform u give
    uniform increasing lists.
    """
    return Increasing(lower, upper)


@dataclass(frozen=True)
class Space:
    """A search space held against the config it varies. A point is what a sampler chose: a value a parameter."""

    base: Config
    domains: dict[str, Any]  # config key -> Ray Tune domain, or Increasing
    objectives: dict[str, str]  # metric -> "max" or "min"
    source: str  # the file's text

    def parameters(self, unit_interval: Callable[[float, float], Any]) -> dict[str, Any]:
        """Parameter -> Ray Tune domain: what the sampler is asked for; `unit_interval` is Ray Tune's `uniform`."""
        parameters: dict[str, Any] = {}
        for key, domain in self.domains.items():
            if isinstance(domain, Increasing):
                parameters |= {f"{key}.u{index}": unit_interval(0.0, 1.0) for index in range(self.base.num_peers)}
            else:
                parameters[key] = domain
        return parameters

    def values(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Config keys and values of a point."""
        return {key: self._value(key, domain, point) for key, domain in self.domains.items()}

    def config(self, point: Mapping[str, Any]) -> Config:
        """Raises:
        UserError: the config refuses this combination of values.
        """
        return with_values(self.base, self.values(point))

    def point(self, config: Config) -> dict[str, Any]:
        """The point that gives this config.

        Raises:
            UserError: a value of the config is outside its domain.
        """
        point: dict[str, Any] = {}
        for key, domain in self.domains.items():
            value = _lookup(config, key)
            if isinstance(domain, Increasing):
                steps = _to_uniform(value, domain)
                inside = all(0 <= step <= 1 for step in steps)
                point |= {f"{key}.u{index}": step for index, step in enumerate(steps)}
            elif hasattr(domain, "categories"):
                point[key] = encoded(value)
                inside = point[key] in [encoded(category) for category in domain.categories]
            else:
                point[key], inside = value, _holds(domain, value)
            if not inside:
                raise UserError(f"{key} = {value} is outside the space ({_describe(domain)})")
        return point

    @property
    def searched(self) -> dict[str, str]:
        """Config key, one a ratio -> "linear", "log" or "choice"."""
        kinds: dict[str, str] = {}
        for key, domain in self.domains.items():
            names = [key]
            if isinstance(domain, Increasing):
                names = [f"{key}.{index}" for index in range(self.base.num_peers)]
            kinds |= dict.fromkeys(names, _kind(domain))
        return kinds

    def describe(self) -> dict[str, str]:
        """Config key -> its domain in words."""
        return {key: _describe(domain) for key, domain in self.domains.items()}

    def _value(self, key: str, domain: Any, point: Mapping[str, Any]) -> Any:
        if isinstance(domain, Increasing):
            return _from_uniform([point[f"{key}.u{index}"] for index in range(self.base.num_peers)], domain)
        if hasattr(domain, "categories"):
            return next(category for category in domain.categories if encoded(category) == point[key])
        return point[key]


def load_space(path: str | Path, base: Config) -> Space:
    """Read a space file and hold everything it can suggest against the config.

    Raises:
        UserError: no such file, an error in it, an unknown key or metric, or values the config refuses.
    """
    path = Path(path)
    try:
        source = path.read_text()
        names = runpy.run_path(str(path))
        domains, objectives = names["space"](), names["OBJECTIVES"]
    except OSError as error:
        raise UserError(f"space file {path}: {error.strerror}; give a Python file, see tune_spaces/") from None
    except KeyError as error:
        raise UserError(
            f"space file {path} has no {error}; it needs a function space() that returns config keys and Ray Tune "
            "domains, and OBJECTIVES = {metric: 'max' or 'min'}, see tune_spaces/"
        ) from None
    except (Exception, SystemExit) as error:  # the user's own code
        raise UserError(f"space file {path}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    return make_space(base, domains, objectives, source, f"space file {path}")


def make_space(
    base: Config, domains: dict[str, Any], objectives: dict[str, str], source: str = "", where: str = "space"
) -> Space:
    """A space from its parts, checked as `load_space` does."""
    if not isinstance(domains, dict) or not domains:
        raise UserError(f"{where}: space() must return a dict of config keys and Ray Tune domains, see tune_spaces/")
    space = Space(base, domains, objectives, source)
    _check_objectives(space, where)
    for key, domain in domains.items():
        _check_domain(base, key, domain, where)
    for point in _draws(space):
        try:
            space.config(point)
        except UserError as error:
            raise UserError(
                f"{where}: the space holds {_shown(space.values(point))}, which is refused: {error}"
            ) from None
    return space


def check_stop_metric(search: SearchConfig, space: Space) -> str:
    """Whether the metric that stops trials is better "max" or "min".

    Raises:
        UserError: no such metric at the end of an epoch.
    """
    metric = search.stop_metric
    each_epoch = [
        name for name in metric_names(space.base.num_peers) if name.startswith(("val/", "train/", "weights/"))
    ]
    if metric not in each_epoch:
        raise UserError(f"stop_metric = '{metric}' is not known at each epoch; allowed: {', '.join(each_epoch)}")
    return space.objectives.get(metric, "min" if metric == "train/loss" else "max")


def encoded(category: Any) -> Any:
    """A category as Optuna takes it: lists become text."""
    return json.dumps(category) if isinstance(category, (list, tuple, dict)) else category


def _check_objectives(space: Space, where: str) -> None:
    objectives, names = space.objectives, metric_names(space.base.num_peers)
    if not isinstance(objectives, dict) or not objectives:
        raise UserError(f"{where}: OBJECTIVES must be a dict such as {{'val/accuracy/ensemble_weighted': 'max'}}")
    for metric, mode in objectives.items():
        if str(metric).startswith("test/"):
            raise UserError(f"{where}: objective '{metric}' looks at the test images; search on val/ instead")
        if metric not in names:
            raise UserError(f"{where}: objective '{metric}' is not logged; allowed: {', '.join(names)}")
        if mode not in _MODES:
            raise UserError(f"{where}: objective '{metric}' is to be {mode!r}; allowed: 'max', 'min'")


def _check_domain(base: Config, key: str, domain: Any, where: str) -> None:
    reason = "it does not change what is trained; set it in the config" if key.startswith(("scale.", "run.")) else ""
    reason = reason or _NOT_SEARCHED.get(key, "")
    if reason:
        raise UserError(f"{where}: '{key}' cannot be searched: {reason}")
    if isinstance(domain, Increasing):
        candidates = [[domain.lower] * base.num_peers, [domain.upper] * base.num_peers]
        if key != "pruning.ratios" or not domain.lower < domain.upper:
            raise UserError(f"{where}: '{key}': increasing(lower, upper) is for pruning.ratios, with lower < upper")
    elif hasattr(domain, "categories"):
        candidates = list(domain.categories)
    elif _is_range(domain):
        candidates = bounds(domain)
    else:
        raise UserError(
            f"{where}: '{key}' is {domain!r}; allowed: tune.uniform, loguniform, quniform, randint, lograndint, "
            "choice, and wml_ray.space.increasing for pruning.ratios"
        )
    for value in candidates:
        try:
            with_values(base, {key: value})
        except UserError as error:
            if "entries but" not in str(error):  # peers and ratios must agree, which only whole points can
                raise UserError(f"{where}: {error}") from None


def _draws(space: Space) -> list[dict[str, Any]]:
    """Random points of the space, the same each time."""
    import numpy as np

    random = np.random.RandomState(0)
    points = []
    for _ in range(DRAWS):
        point: dict[str, Any] = {}
        for key, domain in space.domains.items():
            if isinstance(domain, Increasing):
                point |= {f"{key}.u{index}": random.uniform() for index in range(space.base.num_peers)}
            elif hasattr(domain, "categories"):
                point[key] = encoded(domain.categories[random.randint(len(domain.categories))])
            else:
                value = domain.sample(random_state=random)
                point[key] = value.item() if hasattr(value, "item") else value
        points.append(point)
    return points


def _from_uniform(steps: list[float], domain: Increasing) -> list[float]:
    ratios: list[float] = []
    above = domain.upper
    for count in range(len(steps), 0, -1):
        above = domain.lower + (above - domain.lower) * steps[count - 1] ** (1 / count)
        ratios.insert(0, round(above, 4))
    return ratios


def _to_uniform(ratios: list[float], domain: Increasing) -> list[float]:
    """The inverse of `_from_uniform`; what is out of range or order comes out outside [0, 1]."""
    uppers = [*ratios[1:], domain.upper]
    steps = []
    for count, (ratio, upper) in enumerate(zip(ratios, uppers, strict=True), start=1):
        share = (
            (ratio - domain.lower) / (upper - domain.lower) if upper > domain.lower else float(ratio != domain.lower)
        )
        steps.append(share**count if share >= 0 else -1.0)
    return steps


def _lookup(config: Config, key: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def bounds(domain: Any) -> list[Any]:
    """Least and largest value of a range of numbers."""
    exclusive = type(domain).__name__ == "Integer" and _step(domain) is None  # Ray Tune leaves out the upper end
    return [domain.lower, domain.upper - 1 if exclusive else domain.upper]


def _is_range(domain: Any) -> bool:
    if not hasattr(domain, "lower"):
        return False
    sampler = domain.get_sampler()
    shape = type(getattr(sampler, "sampler", sampler)).__name__.lstrip("_")
    return shape == "Uniform" or (shape == "LogUniform" and _step(domain) is None)  # Optuna has no steps on a log scale


def _step(domain: Any) -> Any:
    """The step of a quantised domain."""
    return getattr(domain.get_sampler(), "q", None)


def _holds(domain: Any, value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    least, largest = bounds(domain)
    steps = (value - least) / _step(domain) if _step(domain) else 0.0
    return bool(least <= value <= largest and abs(steps - round(steps)) < 1e-9)


def _kind(domain: Any) -> str:
    if isinstance(domain, Increasing):
        return "linear"
    if hasattr(domain, "categories"):
        return "choice"
    return "log" if "Log" in type(domain.get_sampler()).__name__ else "linear"


def _describe(domain: Any) -> str:
    if isinstance(domain, Increasing):
        return f"increasing from {domain.lower} to {domain.upper}"
    if hasattr(domain, "categories"):
        return "one of " + ", ".join(str(category) for category in domain.categories)
    least, largest = bounds(domain)
    step = f" in steps of {_step(domain)}" if _step(domain) else ""
    return f"{least} to {largest}{step}{', logarithmic' if _kind(domain) == 'log' else ''}"


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())
