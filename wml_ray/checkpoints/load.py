"""A tree or a peer rebuilt from a checkpoint."""

from __future__ import annotations

import torch

from wml_ray.config.schema import Config
from wml_ray.data.splits import seed_for
from wml_ray.networks.backbones import build_stages
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec


def build_tree(config: Config, spec: ImageSpec) -> PeerTree:
    """The unpruned tree of a config; its initial tensors follow from the seed.

    Raises:
        UserError: an unknown backbone, or sharing that does not fit its stages.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "initialisation"))
        return PeerTree(lambda: build_stages(config.model.backbone, spec), config.model.sharing)
