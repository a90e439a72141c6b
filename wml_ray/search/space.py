"""What a study searches, and how: a short Python file with Ray Tune domains, and the settings of the search."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from wml_ray.config.load import with_values
from wml_ray.config.schema import Config
from wml_ray.errors import UserError, one_line
from wml_ray.methods.settings import MethodName
from wml_ray.search.ratios import Increasing, from_uniform, to_uniform
from wml_ray.search.settings import SearchConfig
from wml_ray.training.evaluation import metric_names


def load_start_points(path: Path, space: Space) -> list[dict[str, Any]]:
    """Points that are tried before the sampler is asked: a YAML list of config keys and values, the rest as the config.

    Raises:
        UserError: no such file, or a point that the space does not hold.
    """
    import yaml

    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"start points {path}: {one_line(error)}; give a YAML list of points") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"start points {path}: must be a YAML list such as [{{wml.alpha: 0.3}}, {{wml.alpha: 0.7}}]")
    searched = {*space.domains, *space.searched}
    points = []
    for entry in entries:
        others = [key for key in entry if key not in searched]
        if others:
            raise UserError(
                f"start points {path}: {others[0]} is not searched; searched are {', '.join(space.domains)}"
            )
        try:
            points.append(space.point(with_values(space.base, entry)))
        except UserError as error:
            raise UserError(f"start points {path}: {error}; what a point leaves out is as in the config") from None
    return points


DRAWS = 200  # points drawn from a space, and held against the config, before the first trial
_NOT_SEARCHED = {
    "optim.epochs": "it is the budget every trial is measured against; set it in the config",
    "data.root": "it is where the data lies; set it in the config",
    "data.download": "set it in the config",
    "data.loader_workers": "set it in the config",
}
_MODES = ("max", "min")


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
                steps = to_uniform(value, domain)
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

    def methods(self) -> list[str]:
        """The methods that a point can have."""
        domain = self.domains.get("method.name")
        return list(getattr(domain, "categories", [self.base.method.name]))

    def metrics(self) -> list[str]:
        """The metrics that every method of the space logs."""
        first, *others = ([*metric_names(method, self.base.num_peers)] for method in self.methods())
        return [name for name in first if all(name in names for names in others)]

    def _value(self, key: str, domain: Any, point: Mapping[str, Any]) -> Any:
        if isinstance(domain, Increasing):
            return from_uniform([point[f"{key}.u{index}"] for index in range(self.base.num_peers)], domain)
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
        raise UserError(f"space file {path}: {type(error).__name__}: {one_line(error)}") from error
    return make_space(base, domains, objectives, source, f"space file {path}")


def make_space(
    base: Config, domains: dict[str, Any], objectives: dict[str, str], source: str = "", where: str = "space"
) -> Space:
    """A space from its parts, checked as `load_space` does."""
    if not isinstance(domains, dict) or not domains:
        raise UserError(f"{where}: space() must return a dict of config keys and Ray Tune domains, see tune_spaces/")
    space = Space(base, domains, objectives, source)
    for key, domain in domains.items():
        _check_domain(base, key, domain, where)
        if key.partition(".")[0] in set(get_args(MethodName)) - set(space.methods()):
            raise UserError(
                f"{where}: '{key}' has no effect with method.name = {' or '.join(space.methods())}; leave it out, or "
                "search method.name too"
            )
    _check_objectives(space, where)
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
    each_epoch = [name for name in space.metrics() if not name.startswith("peers/")]
    if metric not in each_epoch:
        raise UserError(f"stop_metric = '{metric}' is not known at each epoch; allowed: {', '.join(each_epoch)}")
    return space.objectives.get(metric, "min" if metric == "train/loss" else "max")


def encoded(category: Any) -> Any:
    """A category as Optuna takes it: lists become text."""
    return json.dumps(category) if isinstance(category, (list, tuple, dict)) else category


def _check_objectives(space: Space, where: str) -> None:
    objectives, names = space.objectives, space.metrics()
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
