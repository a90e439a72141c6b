"""Training and evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(network: nn.Module, training: bool) -> Iterator[None]:
    """Put `network` in training or evaluation mode, and back in the mode it was in at the end."""
    was_training = network.training
    network.train(training)
    try:
        yield
    finally:
        network.train(was_training)
