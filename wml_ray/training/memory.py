"""An estimate of what a training step needs, before anything is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wml_ray.config.schema import Config
from wml_ray.networks.costs import example
from wml_ray.networks.spec import ImageSpec


def training_memory_bytes(network: nn.Module, spec: ImageSpec, batch_size: int, config: Config) -> int:
    """Parameters, gradients, optimiser state, what learning omega adds, and what autograd keeps for a batch.

    The last is counted on 2 images and scaled to `batch_size`, a worker's share.
    """
    optim = config.optim
    parameters = sum(p.numel() * p.element_size() for p in network.parameters())
    copies = 2 + (2 if optim.name == "adamw" else int(optim.momentum > 0))
    if config.wml.weights == "learned":
        copies += 1 if config.wml.unroll == "same_point" else 3  # v; and dL1/dtheta and the stepped theta
    kept_per_image = _saved_bytes(network, spec, images=2) / 2
    if optim.precision != "float32":
        kept_per_image /= 2
    return int(parameters * copies + kept_per_image * batch_size)


def _saved_bytes(network: nn.Module, spec: ImageSpec, images: int) -> int:
    own = {p.untyped_storage().data_ptr() for p in [*network.parameters(), *network.buffers()]}
    storages: dict[int, int] = {}
    held = []  # so that no address is used twice while counting

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    was_training = network.training
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        network.train()(example(network, spec, images))
    network.load_state_dict(buffers, strict=False)
    network.train(was_training)
    return sum(storages.values())
