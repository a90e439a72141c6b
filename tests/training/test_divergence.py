import pytest
import torch
from family import SPEC, pruned_tree

from wml_ray.methods.base import StepContext
from wml_ray.methods.dml import Dml
from wml_ray.methods.settings import DmlConfig
from wml_ray.training.divergence import DivergenceMonitor


@pytest.mark.parametrize(
    ("losses", "warned"),
    [
        ([[2.3, 2.3], [2.3, 2301.0], [9e9, 9e9]], ["the loss of peer 1 has grown more than a thousandfold"]),
        ([[2.3, 2.3], [2.3, 2299.0]], []),
        ([[1e-6, 1e-6], [0.9, 900.0]], []),  # a resumed training starts near 0
    ],
)
def test_growth_of_a_loss_is_warned_of_once_for_the_peer_at_a_thousand_times_its_first(recwarn, losses, warned):
    monitor = DivergenceMonitor(Dml(pruned_tree(), DmlConfig(), SPEC), interval=1)
    for step, row in enumerate(losses):
        monitor.record(StepContext(step, 0, 1, 0.1), torch.tensor(row))
    messages = [str(warning.message) for warning in recwarn if "grown" in str(warning.message)]
    assert [message.partition(",")[0] for message in messages] == warned
    assert all("lower optim.learning_rate" in message for message in messages)
