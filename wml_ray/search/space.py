"""A search space: config keys with Optuna distributions, checked against the config that they vary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from wml_ray.config.load import with_values
from wml_ray.config.schema import Config
from wml_ray.config.yaml_text import read_yaml
from wml_ray.errors import UserError, one_line, shortened
from wml_ray.methods.settings import has_effect
from wml_ray.search.ratios import Increasing, from_uniform, to_uniform
from wml_ray.search.settings import SearchConfig
from wml_ray.training.evaluation import metric_names

DRAWS = 200  # random points that are checked against the config before the first trial
_NOT_SEARCHED = {
    "optim.epochs": "it is the budget that all trials share; set it in the config",
    "data.root": "it does not change the trained networks; set it in the config",
    "data.download": "it does not change the trained networks; set it in the config",
    "data.loader_workers": "it does not change the trained networks; set it in the config",
    "data.cache_gb": "it does not change the trained networks; set it in the config",
    "data.cache_path": "it does not change the trained networks; set it in the config",
}
Distribution = CategoricalDistribution | IntDistribution | FloatDistribution
Domain = Distribution | Increasing


@dataclass(frozen=True)
class Space:
    """A search space and the config that it varies. A point maps each parameter of the sampler to a value."""

    base: Config
    domains: dict[str, Domain]
    """Config key -> distribution; lists among categories are JSON text, see `encode`."""
    objectives: dict[str, str]
    """Metric -> "max" or "min"."""
    source: str
    """Text of the space file."""

    @property
    def distributions(self) -> dict[str, Distribution]:
        """Parameter of the sampler -> distribution. `Increasing` has one parameter in [0, 1] for each peer."""
        distributions: dict[str, Distribution] = {}
        for key, domain in self.domains.items():
            if isinstance(domain, Increasing):
                distributions |= {name: FloatDistribution(0.0, 1.0) for name in self._parameters(key)}
            else:
                distributions[key] = domain
        return distributions

    def values(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Config keys and values of a point."""
        values: dict[str, Any] = {}
        for key, domain in self.domains.items():
            if isinstance(domain, Increasing):
                values[key] = from_uniform([point[name] for name in self._parameters(key)], domain)
            else:
                values[key] = decode(point[key])
        return values

    def config(self, point: Mapping[str, Any]) -> Config:
        """The config at a point.

        Raises:
            UserError: the config refuses this combination of values.
        """
        return with_values(self.base, self.values(point))

    def point(self, config: Config) -> dict[str, Any]:
        """The point that gives this config; the inverse of `config`.

        Raises:
            UserError: a value of the config is outside its domain.
        """
        point: dict[str, Any] = {}
        for key, domain in self.domains.items():
            value = lookup(config, key)
            if isinstance(domain, Increasing):
                shares = to_uniform(value, domain)
                inside = all(0 <= share <= 1 for share in shares)
                point |= zip(self._parameters(key), shares, strict=True)
            else:
                point[key] = encode(value)
                inside = _contains(domain, point[key])
            if not inside:
                raise UserError(f"{key} = {value} is outside the space ({_describe(domain)})")
        return point

    @property
    def searched(self) -> dict[str, str]:
        """Config key, one for each ratio -> "linear", "log" or "choice"."""
        kinds: dict[str, str] = {}
        for key, domain in self.domains.items():
            names = [key]
            if isinstance(domain, Increasing):
                names = [f"{key}.{index}" for index in range(self.base.num_peers)]
            kinds |= dict.fromkeys(names, _kind(domain))
        return kinds

    def describe(self) -> dict[str, str]:
        """Config key -> its domain as text."""
        return {key: _describe(domain) for key, domain in self.domains.items()}

    def methods(self) -> list[str]:
        """The methods that a point can have."""
        domain = self.domains.get("method.name")
        return extremes(domain) if isinstance(domain, CategoricalDistribution) else [self.base.method.name]

    def metrics(self) -> list[str]:
        """The metrics that every method of the space logs."""
        first, *others = ([*metric_names(method, self.base.num_peers)] for method in self.methods())
        return [name for name in first if all(name in names for names in others)]

    def needed_point(self, point: Mapping[str, Any]) -> dict[str, Any] | None:
        """The point whose trial must have ended before that of `point` starts; None if it can start at once."""
        return None

    def _parameters(self, key: str) -> list[str]:
        return [f"{key}.u{index}" for index in range(self.base.num_peers)]


def check_space(space: Space, where: str) -> None:
    """Check objectives, keys, the ends of each domain and random points against the config.

    `where` names the space in messages.

    Raises:
        UserError: an unknown metric or key, a key that cannot be searched, or values that the config refuses.
    """
    for key, domain in space.domains.items():
        if parent := next((other for other in space.domains if key.startswith(f"{other}.")), None):
            raise UserError(f"{where}: '{key}' is a part of '{parent}', which is searched too; leave one of them out")
        _check_domain(space.base, key, domain, where)
        if not any(has_effect(key, method) for method in space.methods()):
            raise UserError(
                f"{where}: '{key}' has no effect with method.name = {' or '.join(space.methods())}; leave it out, or "
                "search method.name too"
            )
    _check_objectives(space, where)
    random = np.random.default_rng(0)
    for _ in range(DRAWS):
        point = {name: _draw(distribution, random) for name, distribution in space.distributions.items()}
        try:
            space.config(point)
        except UserError as error:
            values = shortened(", ".join(f"{key}={value}" for key, value in space.values(point).items()), 500)
            raise UserError(f"{where}: the space contains {values}, which the config refuses: {error}") from None


def check_stop_metric(search: SearchConfig, space: Space) -> str:
    """The mode, "max" or "min", of the metric that stops trials.

    Raises:
        UserError: the metric is not reported at the end of each epoch.
    """
    metric = search.stop_metric
    each_epoch = [name for name in space.metrics() if not name.startswith("peers/")]
    if metric not in each_epoch:
        raise UserError(f"stop_metric = '{metric}' is not reported each epoch; allowed: {', '.join(each_epoch)}")
    return space.objectives.get(metric, "min" if metric == "train/loss" else "max")


def load_start_points(path: Path, space: Space) -> list[dict[str, Any]]:
    """Points from a YAML list of config keys and values. Keys that an entry omits have the value of the config.

    Raises:
        UserError: no such file, or a point outside the space.
    """
    try:
        entries = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UserError, UnicodeDecodeError) as error:
        raise UserError(f"start points {path}: {one_line(error)}; give a YAML list of points") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"start points {path}: must be a YAML list such as [{{wml.alpha: 0.3}}, {{wml.alpha: 0.7}}]")
    searched = {*space.domains, *space.searched}
    points = []
    for entry in entries:
        unknown = [key for key in entry if key not in searched]
        if unknown:
            raise UserError(f"start points {path}: {unknown[0]} is not searched; allowed: {', '.join(space.domains)}")
        try:
            points.append(space.point(with_values(space.base, entry)))
        except UserError as error:
            raise UserError(f"start points {path}: {error}; omitted keys have the value of the config") from None
    return points


def encode(category: Any) -> Any:
    """A category as Optuna stores it: lists and dicts become JSON text."""
    return json.dumps(category) if isinstance(category, (list, tuple, dict)) else category


def decode(category: Any) -> Any:
    """The inverse of `encode`."""
    return json.loads(category) if isinstance(category, str) and category.startswith(("[", "{")) else category


def extremes(distribution: Distribution) -> list[Any]:
    """All choices of a categorical distribution, the least and the largest value of others."""
    if isinstance(distribution, CategoricalDistribution):
        return [decode(choice) for choice in distribution.choices]
    return [distribution.low, distribution.high]


def count_values(domain: Domain) -> int | None:
    """The number of values of a domain; None if it has no steps."""
    if isinstance(domain, CategoricalDistribution):
        return len(domain.choices)
    if isinstance(domain, Increasing) or domain.step is None:
        return None
    return round((domain.high - domain.low) / domain.step) + 1


def result_settings(config: Config) -> dict[str, Any]:
    """Dotted keys to values, without those that do not change the trained networks."""
    left_out = ("scale.", "run.", "data.root", "data.download", "data.loader_workers", "data.cache_")
    flat = config.flatten().items()
    return {key: value for key, value in flat if not key.startswith(left_out) or key == "run.test_epoch"}


def reason_to_refuse(key: str) -> str | None:
    """Why the trials of a study cannot differ in this key; None if they can."""
    if key.startswith(("scale.", "run.")):
        return "it does not change the trained networks; set it in the config"
    return _NOT_SEARCHED.get(key)


def lookup(config: Config, key: str) -> Any:
    """The value of a dotted key, as JSON types.

    Raises:
        UserError: the config has no such key.
    """
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        if isinstance(value, dict) and part not in value:  # of method.settings, whose keys only its class knows
            raise UserError(f"{key} has no value in the config; give it one there")
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def _check_objectives(space: Space, where: str) -> None:
    objectives, names = space.objectives, space.metrics()
    if not isinstance(objectives, dict) or not objectives:
        raise UserError(f"{where}: OBJECTIVES must be a dict such as {{'val/accuracy/ensemble_weighted': 'max'}}")
    for metric, mode in objectives.items():
        metric, mode = shortened(metric), shortened(mode)
        if metric.startswith("test/"):
            raise UserError(f"{where}: objective '{metric}' is measured on the test images; search on val/ instead")
        if metric not in names:
            raise UserError(f"{where}: objective '{metric}' is not logged; allowed: {', '.join(names)}")
        if mode not in ("max", "min"):
            raise UserError(f"{where}: objective '{metric}' has the mode '{mode}'; allowed: 'max', 'min'")


def _check_domain(base: Config, key: str, domain: Domain, where: str) -> None:
    if reason := reason_to_refuse(key):
        raise UserError(f"{where}: '{key}' cannot be searched: {reason}")
    if isinstance(domain, Increasing):
        bounds = (domain.lower, domain.upper)
        candidates: list[Any] = [[bound] * base.num_peers for bound in bounds]
        numbers = all(type(bound) in (int, float) for bound in bounds)
        if key != "pruning.ratios" or not numbers or not domain.lower < domain.upper:
            raise UserError(f"{where}: '{key}': increasing(lower, upper) is for pruning.ratios, with lower < upper")
    else:
        candidates = extremes(domain)
    for value in candidates:
        try:
            with_values(base, {key: value})
        except UserError as error:
            if "entries but" not in str(error):  # the number of ratios depends on model.sharing: only points can tell
                raise UserError(f"{where}: {error}") from None


def _draw(distribution: Distribution, random: np.random.Generator) -> Any:
    """A random value of a distribution."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[random.integers(len(distribution.choices))]
    low, high, step = distribution.low, distribution.high, distribution.step
    value = low + random.uniform() * (high - low)
    return value if step is None else min(low + round((value - low) / step) * step, high)


def _contains(distribution: Distribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    steps = (value - distribution.low) / distribution.step if distribution.step else 0.0
    return distribution.low <= value <= distribution.high and abs(steps - round(steps)) < 1e-9


def _kind(domain: Domain) -> str:
    if isinstance(domain, CategoricalDistribution):
        return "choice"
    return "log" if getattr(domain, "log", False) else "linear"


def _describe(domain: Domain) -> str:
    if isinstance(domain, Increasing):
        return f"increasing from {domain.lower} to {domain.upper}"
    if isinstance(domain, CategoricalDistribution):
        return "one of " + ", ".join(str(choice) for choice in domain.choices)
    every_value = domain.step is None or (isinstance(domain, IntDistribution) and domain.step == 1)
    steps = "" if every_value else f" in steps of {domain.step}"
    return f"{domain.low} to {domain.high}{steps}{', logarithmic' if domain.log else ''}"
