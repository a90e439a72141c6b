import numpy as np
import pytest
import torch
from small_sets import digits, fashion_mnist, image_folder, make_fashion_mnist, make_image_folder, one_line, write_idx

from wml_ray.errors import UserError


@pytest.mark.parametrize(
    ("outer_data", "parts"),
    [("train", ["train", "validation", "test"]), ("holdout", ["train", "outer", "validation", "test"])],
)
def test_splits_are_disjoint_and_cover_every_image(outer_data, parts):
    splits = digits(wml={"outer_data": outer_data}).splits
    every = torch.cat([splits[part] for part in parts])
    assert torch.equal(every.sort().values, torch.arange(1797))
    assert outer_data == "holdout" or torch.equal(splits["outer"], splits["train"])


def test_splits_follow_from_the_seed_alone():
    splits = digits().splits
    elsewhere = digits(data={"batch_size": 32, "flip": True}, optim={"epochs": 3}, wml={"alpha": 0.1}).splits
    assert all(torch.equal(splits[name], elsewhere[name]) for name in splits)
    reseeded = digits(seed=1).splits
    assert not any(torch.equal(splits[name], reseeded[name]) for name in splits)


def test_keeping_images_for_the_outer_loss_moves_no_validation_or_test_image():
    splits, holdout = digits().splits, digits(wml={"outer_data": "holdout"}).splits
    assert all(torch.equal(splits[name], holdout[name]) for name in ("validation", "test"))


def test_an_empty_split_is_a_user_error(tmp_path):
    make_fashion_mnist(tmp_path, train=4, test=4)
    with pytest.raises(UserError, match="validation split of fashion_mnist is empty"):
        fashion_mnist(tmp_path, batch_size=2)


# data.train_images


def class_counts(dataset, split="train"):
    return dataset.labels[dataset.splits[split]].bincount(minlength=10).tolist()


@pytest.mark.parametrize("outer_data", ["train", "holdout"])
def test_a_subset_moves_no_validation_test_or_holdout_image(outer_data):
    full = digits(wml={"outer_data": outer_data}).splits
    subset = digits(wml={"outer_data": outer_data}, data={"train_images": 100}).splits
    assert len(subset["train"]) == 100
    assert set(subset["train"].tolist()) < set(full["train"].tolist())
    assert all(torch.equal(subset[name], full[name]) for name in ("validation", "test"))
    assert torch.equal(subset["outer"], subset["train"] if outer_data == "train" else full["outer"])


@pytest.mark.parametrize("count", [64, 100, 517])
def test_a_subset_is_balanced_by_class(count):
    counts = class_counts(digits(data={"train_images": count}))
    assert sum(counts) == count
    assert max(counts) - min(counts) <= 1


def test_a_class_with_too_few_images_gives_all_and_the_others_share_the_rest(tmp_path):
    make_fashion_mnist(tmp_path, train=0)
    labels = np.array([0] * 6 + [1] * 300 + [2] * 300)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((606, 28, 28)))
    write_idx(tmp_path / "train-labels-idx1-ubyte", labels)
    whole, subset = (class_counts(fashion_mnist(tmp_path, train_images=count)) for count in (None, 101))
    assert subset[0] == whole[0]
    assert sorted(subset[1:3]) == [(101 - whole[0]) // 2, -(-(101 - whole[0]) // 2)]


def test_a_subset_follows_from_the_seed_and_is_part_of_a_larger_one():
    def drawn(**settings):
        return set(digits(**settings).splits["train"].tolist())

    assert drawn(data={"train_images": 100}) == drawn(data={"train_images": 100})
    assert drawn(data={"train_images": 100}) < drawn(data={"train_images": 300})
    assert drawn(data={"train_images": 100}) != drawn(data={"train_images": 100}, seed=1)


def test_a_subset_of_streamed_images_is_balanced(tmp_path):
    dataset = image_folder(make_image_folder(tmp_path), train_images=10)
    labels = [dataset.images.labels[index] for index in dataset.splits["train"].tolist()]
    assert sorted(labels) == [0] * 5 + [1] * 5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train_images": 5000}, r"data\.train_images = 5000 .*1294 training images"),
        ({"train_images": 5, "batch_size": 4}, r"data\.train_images = 5 .*10 classes"),
        ({"train_images": 32, "batch_size": 64}, r"data\.train_images = 32 .*data\.batch_size = 64"),
    ],
)
def test_a_subset_that_cannot_be_drawn_is_refused(data, message):
    with pytest.raises(UserError, match=message) as caught:
        digits(data=data)
    one_line(caught)
