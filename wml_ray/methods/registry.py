"""The methods by name."""

from __future__ import annotations

import torch

from wml_ray.methods.base import Method, TaughtMethod, Teacher
from wml_ray.methods.cl_ilr import ClIlr
from wml_ray.methods.ctsl_mkt import CtslMkt
from wml_ray.methods.dml import Dml
from wml_ray.methods.fitnets import Fitnets
from wml_ray.methods.independent import Independent
from wml_ray.methods.kd import Kd
from wml_ray.methods.kdcl import Kdcl
from wml_ray.methods.peer_to_peer import PeerToPeer
from wml_ray.methods.rkd import Rkd
from wml_ray.methods.wml import Wml
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec
from wml_ray.settings import Section

METHODS: dict[str, type[Method]] = {
    "wml": Wml,
    "independent": Independent,
    "dml": Dml,
    "cl_ilr": ClIlr,
    "kdcl": Kdcl,
    "kd": Kd,
    "peer_to_peer": PeerToPeer,
    "rkd": Rkd,
    "fitnets": Fitnets,
    "ctsl_mkt": CtslMkt,
}


def build(
    name: str, tree: PeerTree, settings: Section, spec: ImageSpec, seed: int, teacher: Teacher | None = None
) -> Method:
    """The method `name` on `tree`, which is already pruned; the method's own tensors follow from `seed`.

    Raises:
        ValueError: the method needs a teacher and `teacher` is None.
    """
    method = METHODS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not issubclass(method, TaughtMethod):
            return method(tree, settings, spec)
        if teacher is None:
            raise ValueError(f"the method {name} needs a teacher")
        return method(tree, settings, spec, teacher)
