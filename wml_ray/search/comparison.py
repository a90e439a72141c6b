"""A comparison: the points of a study are variants, each a method with some keys, trained with the same seeds."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import yaml
from optuna.distributions import CategoricalDistribution, IntDistribution

from wml_ray.config.load import with_values
from wml_ray.config.schema import Config
from wml_ray.config.yaml_text import read_yaml
from wml_ray.errors import UserError
from wml_ray.methods.settings import FAMILY_TEACHER_METHODS, TEACHER_METHODS, has_effect
from wml_ray.report.comparison_tables import published_rows
from wml_ray.search.settings import CompareConfig
from wml_ray.search.space import Space, reason_to_refuse, result_settings
from wml_ray.settings import MAX_NAME

VARIANT = "variant"
TEACHER = "independent"
"""The method whose run of the same seed teaches where the config names no teacher."""
OBJECTIVES = {"val/accuracy/method": "max"}
Values = dict[str, Any]
"""Config keys and values."""


def tuning_study(study: str, row: str) -> str:
    """Name of the study that tunes a row of the comparison `study`; a long one ends in a digest instead."""
    name = f"{study}-tune-{re.sub(r'[^A-Za-z0-9._-]+', '-', row)}"
    if len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(row.encode()).hexdigest()[:8]
    return f"{name[: MAX_NAME - len(digest) - 1]}-{digest}"


@dataclass(frozen=True)
class Comparison(Space):
    """The points {variant, seed} of a comparison. All other settings are those of `base`."""

    variants: dict[str, Values]
    """Label -> config keys, the method among them."""
    seeds: tuple[int, ...]

    def values(self, point: Mapping[str, Any]) -> Values:
        values = {**self.variants[point[VARIANT]], "seed": point["seed"]}
        if needed := self.needed_point(point):
            values |= taught_by(self.config(needed).run_id, values["method.name"])
        return values

    def point(self, config: Config) -> dict[str, Any]:
        for point in self.points():
            if self.config(point) == config:
                return point
        raise UserError("the config is none of those that are compared")

    def needed_point(self, point: Mapping[str, Any]) -> dict[str, Any] | None:
        """The point of the teacher's run, for a method with a teacher of the same seed."""
        if not self._is_taught(point[VARIANT]):
            return None
        return {VARIANT: TEACHER, "seed": point["seed"]}

    @property
    def searched(self) -> dict[str, str]:
        keys = [key for values in self.variants.values() for key in values]
        return dict.fromkeys(["method.name", *keys, "seed"], "choice")

    def methods(self) -> list[str]:
        return list(dict.fromkeys(values["method.name"] for values in self.variants.values()))

    def points(self) -> list[dict[str, Any]]:
        """All points, seed after seed; those that need the run of another one come last."""
        points = [{VARIANT: variant, "seed": seed} for seed in self.seeds for variant in self.variants]
        return sorted(points, key=lambda point: self._is_taught(point[VARIANT]))

    def fixed_settings(self, variant: str) -> Values:
        """The settings that all seeds of a variant share; those that do not change the networks are left out."""
        config = self.config({VARIANT: variant, "seed": self.seeds[0]})
        left_out = {"seed", *(["teacher.run"] if self._is_taught(variant) else [])}
        return {key: value for key, value in result_settings(config).items() if key not in left_out}

    def including(self, variants: Mapping[str, Values], seeds: Iterable[int]) -> Comparison:
        """The comparison with the variants and seeds of its earlier starts, after its own."""
        others = {name: dict(values) for name, values in variants.items() if name not in self.variants}
        return make_comparison(self.base, {**self.variants, **others}, list(dict.fromkeys((*self.seeds, *seeds))))

    def _is_taught(self, variant: str) -> bool:
        values = self.variants[variant]
        own = self.base.teacher.run or self.base.teacher.function
        return values["method.name"] in TEACHER_METHODS and not own and not values.keys() & set(_TEACHERS)


_TEACHERS = ("teacher.run", "teacher.function")


def taught_by(run: str, method: str) -> Values:
    """The keys that make a run the teacher: its peer 0, or all its peers where the method goes on from them."""
    return {"teacher.run": run} | ({"teacher.peer": None} if method in FAMILY_TEACHER_METHODS else {})


def make_comparison(base: Config, variants: Mapping[str, Values], seeds: Sequence[int]) -> Comparison:
    """The comparison of these variants; the method of `base` has no effect."""
    names = CategoricalDistribution(tuple(variants))
    domains = {VARIANT: names, "seed": IntDistribution(min(seeds), max(seeds))}
    source = yaml.safe_dump({"variants": dict(variants), "seeds": list(seeds)}, sort_keys=False)
    return Comparison(base, domains, OBJECTIVES, source, dict(variants), tuple(seeds))  # type: ignore[arg-type]


def comparison_of(base: Config, settings: CompareConfig) -> Comparison:
    """The comparison that the settings describe, with every config checked.

    Raises:
        UserError: an unknown method or key, a key that has no effect or must not differ, a refused value, or published
            figures that cannot be read.
    """
    published_rows(settings.published)
    groups = [_words(text) for text in settings.keys]
    _check_keys(groups, settings.methods)
    variants: dict[str, Values] = {}
    for method in dict.fromkeys(settings.methods):
        variants[method] = {"method.name": method}
        for group in groups:
            if not _unused(group, method):
                variants |= _rows(method, group)
    seeds = range(base.seed, base.seed + settings.seeds)
    untaught = [method for method in settings.methods if method not in TEACHER_METHODS]
    comparison = make_comparison(base, variants, seeds)
    for name in variants:
        if TEACHER not in variants and comparison.needed_point({VARIANT: name, "seed": base.seed}):
            raise UserError(
                f"{name} needs a teacher of each seed: add {TEACHER} to --methods, whose runs then teach, or set "
                "teacher.function"
            )
        comparison.config({VARIANT: name, "seed": seeds[-1]})
    return replace(comparison, base=with_values(base, {"method.name": untaught[0]})) if untaught else comparison


Group = list[tuple[str, list[str]]]
"""Keys that a row sets together, each with its values as text."""


def _words(text: str) -> Group:
    group = []
    for word in text.split():
        key, separator, values = word.partition("=")
        if not separator or not key or not values:
            raise UserError(f"--key '{text}' must have the form key=value or key=value,value: wml.alpha=0.1,0.3")
        group.append((key, re.split(r",(?![^\[{]*[\]}])", values)))
    return group


def _check_keys(groups: Sequence[Group], methods: Sequence[str]) -> None:
    for group in groups:
        for key, _ in group:
            reason = "the rows share their seeds; see --seeds" if key == "seed" else reason_to_refuse(key)
            reason = "the rows are those of --methods" if key == "method.name" else reason
            if reason:
                raise UserError(f"--key {key} cannot differ in a comparison: {reason}")
        if all(_unused(group, method) for method in methods):
            keys = " ".join(key for key, _ in group)
            compared = ", ".join(methods)
            raise UserError(f"--key {keys} has no effect with --methods {compared}; add its method, or leave it out")


def _unused(group: Group, method: str) -> bool:
    return not all(has_effect(key, method) for key, _ in group)


def _rows(method: str, group: Group) -> Iterator[tuple[str, Values]]:
    """Label and values of each combination of the values of a group."""
    for texts in product(*(values for _, values in group)):
        words = dict(zip((key for key, _ in group), texts, strict=True))
        label = " ".join([method, *(f"{key.rpartition('.')[2]}={text}" for key, text in words.items())])
        yield label, {"method.name": method, **{key: read_yaml(text) for key, text in words.items()}}
