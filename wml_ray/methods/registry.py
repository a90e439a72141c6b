"""The methods by name, and a user's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError

from wml_ray.errors import UserError, shortened
from wml_ray.methods.base import Method, TaughtMethod, Teacher
from wml_ray.methods.boc_kd import BocKd
from wml_ray.methods.cl_ilr import ClIlr
from wml_ray.methods.ctsl_mkt import CtslMkt
from wml_ray.methods.dml import Dml
from wml_ray.methods.ffl import Ffl
from wml_ray.methods.ffsd import Ffsd
from wml_ray.methods.fitnets import Fitnets
from wml_ray.methods.independent import Independent
from wml_ray.methods.kd import Kd
from wml_ray.methods.kdcl import Kdcl
from wml_ray.methods.okddip import Okddip
from wml_ray.methods.one import One
from wml_ray.methods.pcl import Pcl
from wml_ray.methods.peer_to_peer import PeerToPeer
from wml_ray.methods.rkd import Rkd
from wml_ray.methods.self_distillation import SelfDistillation
from wml_ray.methods.wml import Wml
from wml_ray.networks.backbones import import_function
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec
from wml_ray.settings import Section

METHODS: dict[str, type[Method]] = {
    "wml": Wml,
    "independent": Independent,
    "dml": Dml,
    "cl_ilr": ClIlr,
    "one": One,
    "okddip": Okddip,
    "pcl": Pcl,
    "ffl": Ffl,
    "ffsd": Ffsd,
    "kdcl": Kdcl,
    "kd": Kd,
    "peer_to_peer": PeerToPeer,
    "rkd": Rkd,
    "fitnets": Fitnets,
    "ctsl_mkt": CtslMkt,
    "self_distillation": SelfDistillation,
    "boc_kd": BocKd,
}


def method_class(name: str) -> type[Method]:
    """The class of a method, of the package or a user's own `package.module:Class`.

    Raises:
        UserError: the user's class cannot be imported, is no `Method`, or needs a teacher.
    """
    if name in METHODS:
        return METHODS[name]
    method: Any = import_function(name, "method.name")
    if not isinstance(method, type) or not issubclass(method, Method):
        raise UserError(
            f"method.name = '{name}' is not a subclass of wml_ray.Method; name a class that is, see "
            "docs/adding-a-method.md"
        )
    if issubclass(method, TaughtMethod):
        raise UserError(
            f"method.name = '{name}' is a TaughtMethod, which only the package can have; derive it from Method, and "
            "load its teacher yourself"
        )
    return method


def build(
    name: str,
    tree: PeerTree,
    settings: Section | Mapping[str, Any],
    spec: ImageSpec,
    seed: int,
    teacher: Teacher | None = None,
) -> Method:
    """The method `name` on `tree`, which is already pruned; the method's own tensors follow from `seed`.

    A mapping is validated by the class's `Settings`.

    Raises:
        UserError: a user's class cannot be used, or refuses its settings.
        ValueError: the method needs a teacher and `teacher` is None.
    """
    method = method_class(name)
    if not isinstance(settings, Section):
        settings = _own_settings(name, method, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not issubclass(method, TaughtMethod):
            return method(tree, settings, spec)
        if teacher is None:
            raise ValueError(f"the method {name} needs a teacher")
        return method(tree, settings, spec, teacher)


def _own_settings(name: str, method: type[Method], values: Mapping[str, Any]) -> Section:
    try:
        return method.Settings.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    key = ".".join(map(str, ("method.settings", *first["loc"])))
    if first["type"] == "extra_forbidden":
        allowed = ", ".join(method.Settings.model_fields) or "none"
        raise UserError(f"unknown key '{shortened(key)}'; the settings of {name} are: {allowed}")
    given = "" if first["type"] == "missing" else f" = {shortened(repr(first['input']))}"
    raise UserError(f"{shortened(key)}{given}: {first['msg']}; correct it in the settings of {name}")
