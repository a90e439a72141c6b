"""Search spaces written with Ray Tune's domains, converted to Optuna's distributions."""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.tune import choice
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Categorical, LogUniform, Quantized
from ray.tune.search.sample import Domain as RayDomain

from wml_ray.config.load import as_config
from wml_ray.config.schema import Config
from wml_ray.errors import UserError, one_line, shortened
from wml_ray.search.space import Domain, Space, check_space, encode
from wml_ray.storage.retry import call_within

RUN_S = 10.0  # limit for running a space file
ALLOWED = (
    "tune.uniform, loguniform, quniform, randint, qrandint, lograndint, choice, Optuna's distributions, and "
    "wml_ray.increasing for pruning.ratios"
)


def load_space(path: str | Path, base: str | Path | Mapping[str, Any] | Config, **overrides: Any) -> Space:
    """Run a space file and check its space against the config; `base` and `overrides` are those of `train`'s config.

    Raises:
        UserError: no such file, an error in it, an unknown key or metric, or values that the config refuses.
    """
    path, base = Path(path), as_config(base, overrides)
    try:
        source = path.read_text()
        domains, objectives = call_within(RUN_S, lambda: _run(path))
    except TimeoutError:
        raise UserError(
            f"space file {path} has not ended within {RUN_S:.0f} s; it must only return the space, see tune_spaces/"
        ) from None
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


def _run(path: Path) -> tuple[Any, Any]:
    """The domains and the objectives of a space file."""
    names = runpy.run_path(str(path))
    return names["space"](), names["OBJECTIVES"]


def make_space(
    base: str | Path | Mapping[str, Any] | Config,
    domains: Mapping[str, Any],
    objectives: dict[str, str],
    source: str = "",
    where: str = "space",
) -> Space:
    """A space of config keys and domains, checked as by `load_space`. `where` names the space in messages."""
    if not isinstance(domains, dict) or not domains:
        raise UserError(f"{where}: space() must return a dict of config keys and Ray Tune domains, see tune_spaces/")
    converted = {}
    for key, domain in domains.items():
        if not isinstance(key, str):
            raise UserError(f"{where}: key {shortened(repr(key))} must be a config key such as 'wml.alpha'")
        try:
            converted[key] = _distribution(domain)
        except (ValueError, TypeError, OverflowError, LookupError, ArithmeticError, RecursionError) as error:
            raise UserError(f"{where}: {shortened(repr(key))}: {one_line(error)}; allowed: {ALLOWED}") from None
    space = Space(as_config(base), converted, objectives, source)
    check_space(space, where)
    return space


def _distribution(domain: Any) -> Domain:
    """An Optuna distribution or `Increasing`.

    Raises:
        TypeError, ValueError: Optuna has no such distribution.
    """
    if isinstance(domain, Categorical):
        domain = choice([encode(category) for category in domain.categories])
    sampler = domain.get_sampler() if isinstance(domain, RayDomain) else None
    if isinstance(sampler, Quantized) and isinstance(sampler.sampler, LogUniform):
        raise ValueError("Optuna has no steps on a logarithmic scale")  # the conversion would drop the steps
    if isinstance(domain, RayDomain) or (isinstance(domain, dict) and "grid_search" in domain):
        converted: Domain = OptunaSearch.convert_search_space({"domain": domain})["domain"]
        return converted
    if not isinstance(domain, Domain):
        raise TypeError(f"{domain!r} is not a domain")
    return domain
