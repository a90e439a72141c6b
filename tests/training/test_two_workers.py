"""Every method with two workers, whose gradients and running statistics are averaged."""

import pytest
import torch
import workers
from family import taught_by, tiny_config

from wml_ray.data.load import load_dataset
from wml_ray.distributed import WorkerRank
from wml_ray.methods.registry import METHODS
from wml_ray.training.start import build_method, initial_checkpoint
from wml_ray.training.teacher import load_teacher
from wml_ray.training.trainer import Trainer

pytestmark = pytest.mark.slow


def _trained(rank, method, teacher_folder):
    """All tensors of a worker after one epoch of four steps, and the names of those that differ from the start."""
    options = ["data.train_images=128", "data.batch_size=32", "optim.epochs=1", "wml.update_every=2"]
    config = tiny_config(*options, *taught_by(teacher_folder, method))
    dataset = load_dataset(config)
    start, teacher = initial_checkpoint(config, dataset), load_teacher(config, dataset)
    built = build_method(config, dataset.spec, start.metadata["channels"], teacher)
    trainer = Trainer(config, built, dataset, torch.device("cpu"), WorkerRank(rank, 2))
    trainer.load_state(start.model, start.state)
    trainer.fit(lambda event: None)
    tensors = {**trainer.model_state(), **trainer.state()}
    before = {**start.model, **start.state}
    moved = [name for name, tensor in tensors.items() if name in before and not tensor.equal(before[name])]
    return {name: tensor.detach() for name, tensor in tensors.items()}, moved


def _trained_by_all(rank, teacher_folder):
    return {method: _trained(rank, method, teacher_folder) for method in METHODS}


@pytest.fixture(scope="module")
def both(teacher_run, tmp_path_factory):
    """The tensors of both workers by method. One pair of processes trains all methods: its start takes longest."""
    return workers.run(_trained_by_all, tmp_path_factory.mktemp("two"), teacher_run)


@pytest.mark.parametrize("method", METHODS)
def test_two_workers_of_a_method_end_with_equal_tensors(both, method):
    """Parameters, statistics, optimiser and what is the method's own; of these, parameters have moved."""
    (ours, moved), (theirs, _) = (worker[method] for worker in both)
    assert [name for name, tensor in ours.items() if not tensor.equal(theirs[name])] == []
    assert any(name.endswith("weight") for name in moved)
    assert ours.keys() == theirs.keys()
