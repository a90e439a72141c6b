"""Train a whole family of differently sized networks in one run: Weighted Mutual Learning on Ray.

import wml_ray

run = wml_ray.train("jobs/quickstart.yaml", seed=1)
print(run.peers)
network = run.smallest_within(macs=1.5e6)
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULES = {  # imported when a name is first used, so that `import wml_ray` loads neither PyTorch nor Ray
    "CompareConfig": "wml_ray.search.settings",
    "Config": "wml_ray.config.schema",
    "Diverged": "wml_ray.errors",
    "Method": "wml_ray.methods.base",
    "Network": "wml_ray.export.network",
    "Run": "wml_ray.verbs.run",
    "SearchConfig": "wml_ray.search.settings",
    "Section": "wml_ray.settings",
    "Study": "wml_ray.verbs.study",
    "UserError": "wml_ray.errors",
    "compare": "wml_ray.verbs.compare",
    "evaluate": "wml_ray.verbs.evaluate",
    "export_network": "wml_ray.verbs.export",  # `wml_ray.export` is a folder
    "increasing": "wml_ray.search.ratios",
    "load_config": "wml_ray.config.load",
    "load_run": "wml_ray.verbs.run",
    "load_space": "wml_ray.cluster.space",
    "load_study": "wml_ray.tracking.results",
    "make_space": "wml_ray.cluster.space",
    "pareto_front": "wml_ray.report.analysis",
    "plan": "wml_ray.verbs.plan",
    "train": "wml_ray.verbs.train",
    "tune": "wml_ray.verbs.tune",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'wml_ray' has no attribute '{name}'; public are {', '.join(_MODULES)}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
