"""The small search space of each method, for `wml-ray compare --tune`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution

from wml_ray.config.schema import Config
from wml_ray.errors import UserError
from wml_ray.search.space import Distribution, Domain, Space, encode, lookup

LEARNING_RATE_FACTOR = 5.0
"""The learning rate is searched from a fifth of the config's to five times that."""
SHARES = FloatDistribution(0.02, 0.5, log=True)
WEIGHTS = FloatDistribution(0.05, 2.0, log=True)
RELATIONS = FloatDistribution(1.0, 100.0, log=True)

METHOD_SPACES: dict[str, dict[str, Distribution]] = {
    "wml": {"wml.alpha": SHARES},
    "dml": {"dml.weight": WEIGHTS},
    "cl_ilr": {"cl_ilr.alpha": SHARES},
    "one": {"one.weight": WEIGHTS},
    "okddip": {"okddip.weight": WEIGHTS},
    "pcl": {"pcl.weight": WEIGHTS},
    "ffl": {"ffl.weight": WEIGHTS},
    "ffsd": {"ffsd.weight": WEIGHTS, "ffsd.map_weight": FloatDistribution(1.0, 100.0, log=True)},
    "kdcl": {"kdcl.alpha": SHARES},
    "kd": {"kd.alpha": FloatDistribution(0.1, 0.9)},
    "peer_to_peer": {"peer_to_peer.teacher_weight": WEIGHTS, "peer_to_peer.mutual_weight": WEIGHTS},
    "rkd": {"rkd.distance_weight": RELATIONS, "rkd.angle_weight": RELATIONS},
    "fitnets": {"fitnets.weight": WEIGHTS},
    "ctsl_mkt": {"ctsl_mkt.mutual_weight": WEIGHTS, "ctsl_mkt.self_weight": WEIGHTS},
    "self_distillation": {"self_distillation.divergence_weight": WEIGHTS},
    "boc_kd": {"boc_kd.map_weight": WEIGHTS, "boc_kd.mutual_weight": WEIGHTS},
}
"""Config key -> distribution, beside the learning rate. A method without an entry is searched in that alone."""


def method_space(config: Config, objectives: dict[str, str], fixed: Collection[str] = ()) -> Space:
    """The space of the config's method without the keys `fixed`.

    The config's own values are inside it, wherever its scale allows that.
    """
    rate = config.optim.learning_rate
    rates = FloatDistribution(rate / LEARNING_RATE_FACTOR, rate * LEARNING_RATE_FACTOR, log=True)
    own = METHOD_SPACES.get(config.method.name, {}).items()
    domains: dict[str, Domain] = {"optim.learning_rate": rates}
    domains |= {key: _including(domain, lookup(config, key)) for key, domain in own}
    domains = {key: domain for key, domain in domains.items() if key not in fixed}
    return Space(config, domains, objectives, "\n".join(f"{key}: {domain}" for key, domain in domains.items()))


def start_at_config(space: Space) -> list[dict[str, Any]]:
    """The config's own settings as the first point of a search, unless the space cannot hold them."""
    try:
        return [space.point(space.base)]
    except UserError:
        return []


def _including(domain: Distribution, value: Any) -> Distribution:
    """The domain, widened to hold the value; 0 and null cannot be on a log scale."""
    if isinstance(domain, CategoricalDistribution):
        return CategoricalDistribution(tuple(dict.fromkeys([*domain.choices, encode(value)])))
    if value is None or (domain.log and value <= 0):
        return domain
    return type(domain)(min(domain.low, value), max(domain.high, value), log=domain.log)
