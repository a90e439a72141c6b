import gzip
import hashlib
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.io import write_png

from wml_ray.config.load import parse_config
from wml_ray.data.load import load_dataset
from wml_ray.distributed import WorkerRank
from wml_ray.errors import UserError

ALONE = WorkerRank()
AUGMENTED = {"crop_padding": 2, "flip": True, "cutout": 3}


def digits(**settings):
    return load_dataset(parse_config({"data": {"batch_size": 64}, **settings}))


def listed(batches, count=None):
    return [(inputs.clone(), targets.clone()) for inputs, targets in islice(batches, count)]


def same(batches, others):
    pairs = zip(batches, others, strict=True)
    return all(torch.equal(x, other_x) and torch.equal(y, other_y) for (x, y), (other_x, other_y) in pairs)


def over_workers(batches_of, world_size, count):
    """What `world_size` workers see together, step by step."""
    shares = [listed(batches_of(WorkerRank(rank, world_size)), count) for rank in range(world_size)]
    return [tuple(torch.cat(parts) for parts in zip(*step, strict=True)) for step in zip(*shares, strict=True)]


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message
    return message


# splits


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
    elsewhere = digits(data={"batch_size": 32, **AUGMENTED}, optim={"epochs": 3}, wml={"alpha": 0.1}).splits
    assert all(torch.equal(splits[name], elsewhere[name]) for name in splits)
    reseeded = digits(seed=1).splits
    assert not any(torch.equal(splits[name], reseeded[name]) for name in splits)


def test_keeping_images_for_the_outer_loss_moves_no_validation_or_test_image():
    splits, holdout = digits().splits, digits(wml={"outer_data": "holdout"}).splits
    assert all(torch.equal(splits[name], holdout[name]) for name in ("validation", "test"))


def test_an_empty_split_is_the_users_to_mend(tmp_path):
    make_fashion_mnist(tmp_path, train=4, test=4)
    with pytest.raises(UserError, match="validation split of fashion_mnist is empty"):
        fashion_mnist(tmp_path, batch_size=2)


# batches


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["train", "outer"])
def test_the_number_of_workers_changes_no_batch(kind, world_size):
    dataset = digits(data={"batch_size": 64, **AUGMENTED}, wml={"outer_data": "holdout"})
    batches_of = {"train": dataset.train_batches, "outer": dataset.outer_batches}[kind]
    alone = listed(batches_of(2, ALONE), 5)
    assert same(over_workers(lambda worker: batches_of(2, worker), world_size, 5), alone)


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
def test_outer_batches_are_full_and_never_end(outer_data):
    dataset = digits(data={"batch_size": 200}, wml={"outer_data": outer_data})
    size = min(200, len(dataset.splits["outer"]))
    batches = listed(dataset.outer_batches(1, ALONE), 12)
    assert [len(targets) for _, targets in batches] == [size] * 12
    assert not same(batches[:1], batches[6:7])
    held = dataset.images[dataset.splits["outer"]].flatten(1).tolist()
    shown = (batches[0][0] * dataset.std[0] + dataset.mean[0]).round().long().flatten(1).tolist()
    assert all(image in held for image in shown)


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


# augmentation


def augmented_and_plain(seed=0, epoch=1, step=0, **augmentation):
    """The same training batch with and without augmentation."""
    datasets = digits(seed=seed, data={"batch_size": 64, **augmentation}), digits(seed=seed)
    return [listed(dataset.train_batches(epoch, ALONE), step + 1)[step][0] for dataset in datasets]


def test_flip_mirrors_some_images_and_leaves_the_rest():
    augmented, plain = augmented_and_plain(flip=True)
    mirrored = (augmented == plain.flip(-1)).flatten(1).all(1)
    untouched = (augmented == plain).flatten(1).all(1)
    assert (mirrored ^ untouched).all()
    assert 16 <= mirrored.sum() <= 48


def test_augmentation_is_drawn_anew_for_each_seed_epoch_and_step():
    def mirrored(**place):
        augmented, plain = augmented_and_plain(flip=True, **place)
        return tuple((augmented != plain).flatten(1).any(1).tolist())

    assert len({mirrored(), mirrored(seed=1), mirrored(epoch=2), mirrored(step=1)}) == 4


def test_a_crop_is_a_window_of_the_padded_image_at_every_offset():
    augmented, plain = augmented_and_plain(crop_padding=1)
    padded = F.pad(plain, [1] * 4)
    windows = {(r, c): padded[:, :, r : r + 8, c : c + 8] for r in range(3) for c in range(3)}
    found = {offset: (augmented == window).flatten(1).all(1) for offset, window in windows.items()}
    assert torch.stack(list(found.values())).any(0).all()
    assert all(matches.any() for matches in found.values())


def test_cutout_sets_one_square_to_the_mean_and_nothing_else():
    augmented, plain = augmented_and_plain(cutout=3)
    changed = (augmented != plain).squeeze(1)
    assert (augmented.squeeze(1)[changed] == 0).all()
    for lines in (rows := changed.any(2), columns := changed.any(1)):
        assert set(lines.sum(1).tolist()) == {2, 3}  # two where the centre is on the border
        assert {0, 7} <= set(lines[lines.sum(1) == 2].nonzero()[:, 1].tolist())
    assert torch.equal(changed, rows[:, :, None] & columns[:, None, :])


def test_only_training_images_are_augmented():
    augmented, plain = digits(data={"batch_size": 64, **AUGMENTED}), digits()
    for split in ("validation", "test", "train"):
        batches, expected = (listed(dataset.evaluation_batches(split, ALONE)) for dataset in (augmented, plain))
        assert same(batches, expected)
    assert same(augmented.saliency_batches(64), plain.saliency_batches(64))


# Fashion-MNIST


def write_idx(path, values, compress=False):
    header = (0x0800 + values.ndim).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in values.shape)
    raw = header + values.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".gz" * compress).write_bytes(gzip.compress(raw) if compress else raw)


def make_fashion_mnist(folder, train=200, test=50, compress=False, pixels_of=None):
    random = np.random.default_rng(0)
    written = []
    for prefix, count in (("train", train), ("t10k", test)):
        labels = random.integers(0, 10, count)
        images = random.integers(0, 256, (count, 28, 28)) if pixels_of is None else np.stack([*map(pixels_of, labels)])
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images, compress)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels, compress)
        written.append((images, labels))
    return [np.concatenate(parts) for parts in zip(*written, strict=True)]


def fashion_mnist(root, **data):
    return load_dataset(parse_config({"data": {"name": "fashion_mnist", "root": str(root), "batch_size": 16, **data}}))


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("layout", ["", "FashionMNIST/raw"])
def test_fashion_mnist_reads_back_exactly(tmp_path, layout, compress):
    images, labels = make_fashion_mnist(tmp_path / layout, compress=compress)
    dataset = fashion_mnist(tmp_path)
    assert torch.equal(dataset.images[:, 0].long(), torch.tensor(images))
    assert torch.equal(dataset.labels, torch.tensor(labels))
    assert torch.equal(dataset.splits["test"], torch.arange(200, 250))


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:5],
        lambda raw: b"",
        lambda raw: raw[:20] + b"\xff" * (len(raw) - 20) if raw[:2] == b"\x1f\x8b" else raw[:-1],
        lambda raw: b"<html>no such file</html>",
    ],
    ids=["halved", "header cut", "empty", "garbled", "a web page"],
)
def test_a_broken_idx_file_is_named_with_the_mend(tmp_path, name, compress, damage):
    make_fashion_mnist(tmp_path, compress=compress)
    path = tmp_path / (name + ".gz" * compress)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="again") as caught:
        fashion_mnist(tmp_path)
    assert str(path) in one_line(caught) or "do not match" in one_line(caught)


def test_a_missing_companion_is_named_with_the_mend(tmp_path):
    make_fashion_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="fetch") as caught:
        fashion_mnist(tmp_path)
    assert str(tmp_path / "t10k-labels-idx1-ubyte") in one_line(caught)


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100", "imagefolder"])
def test_a_missing_folder_is_named_with_the_mend(tmp_path, name):
    root = tmp_path / "nowhere"
    with pytest.raises(UserError, match=r"data\.root") as caught:
        load_dataset(parse_config({"data": {"name": name, "root": str(root)}}))
    assert str(root) in one_line(caught)
    assert ("train/<class>" if name == "imagefolder" else "data.download=true") in one_line(caught)
    assert not root.exists()


def test_a_batch_larger_than_the_training_split_is_refused():
    with pytest.raises(UserError, match=r"data\.batch_size = 1500.* \d+ training images .*smaller"):
        digits(data={"batch_size": 1500})


# CIFAR


def make_cifar(kind, root, monkeypatch, images_a_file=20):
    """The files of torchvision's class, and its digests set to theirs."""
    random = np.random.default_rng(0)
    label_key, num_classes = ("labels", 10) if kind is CIFAR10 else ("fine_labels", 100)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)

    def write(name, content):
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()

    images, labels, digests = [], [], {}
    for name, _ in [*kind.train_list, *kind.test_list]:
        images.append(random.integers(0, 256, (images_a_file, 3072), dtype=np.uint8))
        labels += (drawn := random.integers(0, num_classes, images_a_file).tolist())
        digests[name] = write(name, {"data": images[-1], label_key: drawn})
    meta = {**kind.meta, "md5": write(kind.meta["filename"], {kind.meta["key"]: ["a class"] * num_classes})}
    monkeypatch.setattr(kind, "train_list", [[name, digests[name]] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[name, digests[name]] for name, _ in kind.test_list])
    monkeypatch.setattr(kind, "meta", meta)
    return np.concatenate(images).reshape(-1, 3, 32, 32), labels


def cifar(kind, root):
    return load_dataset(parse_config({"data": {"name": kind.__name__.lower(), "root": str(root), "batch_size": 8}}))


@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100])
def test_cifar_reads_back_exactly(tmp_path, monkeypatch, kind):
    images, labels = make_cifar(kind, tmp_path, monkeypatch)
    dataset = cifar(kind, tmp_path)
    assert torch.equal(dataset.images, torch.from_numpy(images))
    assert dataset.labels.tolist() == labels
    assert dataset.splits["test"].tolist() == [*range(len(labels) - 20, len(labels))]
    assert dataset.spec.num_classes == (10 if kind is CIFAR10 else 100)


@pytest.mark.parametrize("damaged", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_cifar_file_with_a_wrong_digest_is_never_opened(tmp_path, monkeypatch, damaged):
    make_cifar(CIFAR10, tmp_path, monkeypatch)
    path = tmp_path / CIFAR10.base_folder / damaged
    path.write_bytes(pickle.dumps(_Trap(str(tmp_path / "opened"))))
    with pytest.raises(UserError, match=r"data\.download=true") as caught:
        cifar(CIFAR10, tmp_path)
    assert str(tmp_path) in one_line(caught)
    assert CIFAR10.base_folder in one_line(caught)
    assert not (tmp_path / "opened").exists()


class _Trap:
    """Makes the file `path` when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


# image folders


def make_image_folder(root, parts=("train", "val"), images_a_class=12):
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        for name in ("cat", "dog"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(images_a_class):
                height, width = (int(torch.randint(6, 20, (), generator=generator)) for _ in range(2))
                pixels = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
                write_png(pixels, str(folder / f"{index:02d}.png"))
    return root


def image_folder(root, **data):
    settings = {"name": "imagefolder", "root": str(root), "batch_size": 5, "resolution": 8, "loader_workers": 0}
    return load_dataset(parse_config({"data": {**settings, "flip": True, **data}}))


@pytest.mark.parametrize("kind", ["train", "outer", "validation"])
def test_loader_processes_change_no_batch(tmp_path, kind):
    make_image_folder(tmp_path)

    def batches(loader_workers):
        dataset = image_folder(tmp_path, loader_workers=loader_workers)
        if kind == "validation":
            return listed(dataset.evaluation_batches(kind, ALONE))
        return listed((dataset.train_batches if kind == "train" else dataset.outer_batches)(3, ALONE), 6)

    alone = batches(0)
    assert alone[0][0].shape[1:] == (3, 8, 8)
    assert same(batches(2), alone)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_number_of_workers_changes_no_streamed_batch(tmp_path, world_size):
    dataset = image_folder(make_image_folder(tmp_path))
    alone = listed(dataset.train_batches(1, ALONE))
    assert same(over_workers(lambda worker: dataset.train_batches(1, worker), world_size, None), alone)


def test_streamed_training_images_are_cropped_anew_each_epoch(tmp_path):
    dataset = image_folder(make_image_folder(tmp_path), batch_size=20)
    epochs = [torch.cat([x for x, _ in dataset.train_batches(epoch, ALONE)]) for epoch in (1, 2)]
    seen = torch.cat(epochs).flatten(1)
    assert len(seen.unique(dim=0)) == len(seen)


@pytest.mark.parametrize(
    ("parts", "validation", "test"),
    [
        (("train", "val"), "train", "val"),
        (("train", "test"), "train", "test"),
        (("train", "val", "test"), "val", "test"),
    ],
)
def test_val_is_the_test_set_unless_there_is_a_test_folder(tmp_path, parts, validation, test):
    dataset = image_folder(make_image_folder(tmp_path, parts))

    files = {
        split: [Path(dataset.files.samples[index][0]).relative_to(tmp_path) for index in dataset.splits[split].tolist()]
        for split in ("train", "validation", "test")
    }
    folders = {split: {path.parts[0] for path in paths} for split, paths in files.items()}
    assert folders == {"train": {"train"}, "validation": {validation}, "test": {test}}
    assert len(files["test"]) == 24
    assert len(set().union(*files.values())) == sum(map(len, files.values())) == 24 * len(parts)


def test_pictures_of_any_mode_stream_as_colour(tmp_path):
    make_image_folder(tmp_path)
    for index, mode in enumerate(("L", "LA", "RGBA", "P", "1")):
        Image.new(mode, (9, 12)).save(tmp_path / "val" / "cat" / f"{index:02d}.png")
    inputs, _ = next(image_folder(tmp_path).evaluation_batches("test", ALONE))
    assert inputs.shape == (24, 3, 8, 8)


@pytest.mark.parametrize("loader_workers", [0, 2])
@pytest.mark.parametrize("content", [b"not a picture", b""], ids=["text", "empty"])
def test_an_unreadable_image_is_named_with_the_mend(tmp_path, loader_workers, content):
    make_image_folder(tmp_path)
    path = tmp_path / "val" / "dog" / "05.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match="mend or remove") as caught:
        listed(image_folder(tmp_path, loader_workers=loader_workers).evaluation_batches("test", ALONE))
    assert str(path) in one_line(caught)


def test_class_folders_that_differ_are_named(tmp_path):
    make_image_folder(tmp_path)
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "horse")
    with pytest.raises(UserError) as caught:
        image_folder(tmp_path)
    assert str(tmp_path / "val") in one_line(caught)
