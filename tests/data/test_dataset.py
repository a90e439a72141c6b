import numpy as np
import pytest
import torch
from small_sets import (
    ALONE,
    digits,
    fashion_mnist,
    image_folder,
    listed,
    make_fashion_mnist,
    make_image_folder,
    over_workers,
    same,
    write_idx,
)
from torch.testing import assert_close

from wml_ray.distributed import WorkerRank

AUGMENTED = {"crop_padding": 2, "flip": True, "cutout": 3}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["train", "outer"])
def test_the_number_of_workers_changes_no_batch(kind, world_size):
    dataset = digits(data={"batch_size": 64, **AUGMENTED}, wml={"outer_data": "holdout"})
    batches_of = {"train": dataset.train_batches, "outer": dataset.outer_batches}[kind]
    alone = listed(batches_of(2, ALONE), 5)
    assert same(over_workers(lambda worker: batches_of(2, worker), world_size, 5), alone)


@pytest.mark.parametrize("kind", ["in memory", "streamed"])
def test_views_differ_begin_with_the_view_of_today_and_do_not_change_with_the_workers(kind, tmp_path):
    if kind == "in memory":
        dataset = digits(data={"batch_size": 64, **AUGMENTED})
    else:
        dataset = image_folder(make_image_folder(tmp_path))

    def views(worker):
        batches = listed(dataset.train_batches(2, worker, first=1, views=3), 2)
        return [(inputs.unflatten(0, (3, -1)).transpose(0, 1), targets) for inputs, targets in batches]

    alone = views(ALONE)
    plain = listed(dataset.train_batches(2, ALONE, first=1), 2)
    assert same([(inputs[:, 0], targets) for inputs, targets in alone], plain)
    for inputs, _ in alone:
        assert not any(torch.equal(inputs[:, one], inputs[:, other]) for one, other in ((0, 1), (0, 2), (1, 2)))
    first, second = (inputs for inputs, _ in alone)
    assert not torch.equal(first[:, 1], second[:, 1])
    for world_size in (2, 3):
        shares = [views(WorkerRank(rank, world_size)) for rank in range(world_size)]
        together = [tuple(torch.cat(parts) for parts in zip(*step, strict=True)) for step in zip(*shares, strict=True)]
        assert same(together, alone)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_image_is_evaluated_by_exactly_one_worker(split, world_size):
    dataset = digits()
    shares = [listed(dataset.evaluation_batches(split, WorkerRank(rank, world_size))) for rank in range(world_size)]
    inputs = torch.cat([x for share in shares for x, _ in share])
    expected = dataset.images[dataset.splits[split]].float()
    assert_close(inputs * dataset.std[0] + dataset.mean[0], expected, atol=1e-4, rtol=0)


def test_an_epoch_shows_no_image_twice(tmp_path):
    make_fashion_mnist(tmp_path)
    dataset = fashion_mnist(tmp_path)
    inputs = torch.cat([x for x, _ in dataset.train_batches(1, ALONE)])
    assert len(inputs) == dataset.steps_per_epoch * 16 == len(dataset.splits["train"]) // 16 * 16
    assert len(inputs.flatten(1).unique(dim=0)) == len(inputs)


@pytest.mark.parametrize("kind", ["train_batches", "outer_batches"])
def test_batches_follow_from_seed_and_epoch_alone(kind):
    def epoch(dataset, number):
        return listed(getattr(dataset, kind)(number, ALONE), 20)

    dataset = digits()
    second = epoch(dataset, 2)
    first = epoch(dataset, 1)
    other = digits(optim={"epochs": 3, "learning_rate": 0.5}, pruning={"ratios": [0.1, 0.1, 0.1, 0.1]})
    assert same(epoch(other, 1), first)
    assert same(epoch(other, 2), second)
    assert not same(first, second)
    assert not same(first, epoch(digits(seed=1), 1))


@pytest.mark.parametrize("outer_data", ["train", "holdout"])
@pytest.mark.parametrize(("share", "images"), [(0.01, 8), (0.4, 80), (1.0, 200)])
def test_outer_batches_have_their_share_of_images_and_never_end(share, images, outer_data):
    dataset = digits(data={"batch_size": 200}, wml={"outer_data": outer_data, "outer_share": share})
    size = min(images, len(dataset.splits["outer"]))
    batches = listed(dataset.outer_batches(1, ALONE), 12)
    assert [len(targets) for _, targets in batches] == [size] * 12
    assert not same(batches[:1], batches[6:7])
    held = dataset.images[dataset.splits["outer"]].flatten(1).tolist()
    shown = (batches[0][0] * dataset.std[0] + dataset.mean[0]).round().long().flatten(1).tolist()
    assert all(image in held for image in shown)


def test_without_learned_weights_an_outer_batch_is_no_limit():
    assert digits(data={"batch_size": 64}, wml={"outer_share": 0.25}).outer_batch_size == 16
    assert digits(data={"batch_size": 64}, wml={"outer_share": 0.25, "weights": "fixed"}).outer_batch_size == 64


def test_an_image_keeps_its_label(tmp_path):
    make_fashion_mnist(tmp_path, pixels_of=lambda label: np.full((28, 28), 20 * label))
    dataset = fashion_mnist(tmp_path, flip=True)
    batches = listed(dataset.train_batches(1, ALONE)) + listed(dataset.evaluation_batches("test", ALONE))
    batches += listed(dataset.outer_batches(1, ALONE), 3) + dataset.saliency_batches(100)
    for inputs, targets in batches:
        assert torch.equal((inputs * dataset.std[0] + dataset.mean[0]).mean((1, 2, 3)).div(20).round().long(), targets)


def test_saliency_batches_are_as_many_training_images_as_asked(tmp_path):
    make_fashion_mnist(tmp_path)
    batches = fashion_mnist(tmp_path).saliency_batches(100)
    assert sum(len(targets) for _, targets in batches) == 100
    assert same(batches, fashion_mnist(tmp_path).saliency_batches(100))


def test_normalisation_comes_from_the_training_images_alone(tmp_path):
    for name, test_level in (("black", 0), ("white", 255)):
        make_fashion_mnist(tmp_path / name)
        write_idx(tmp_path / name / "t10k-images-idx3-ubyte", np.full((50, 28, 28), test_level, np.uint8))
    black, white = (fashion_mnist(tmp_path / name) for name in ("black", "white"))
    assert (black.mean, black.std) == (white.mean, white.std)
    inputs = torch.cat([x for x, _ in black.evaluation_batches("train", ALONE)])
    assert_close(inputs.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    assert_close(inputs.std(), torch.tensor(1.0), atol=1e-4, rtol=0)
