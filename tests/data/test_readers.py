import hashlib
import pickle

import numpy as np
import pytest
import torch
from small_sets import digits, fashion_mnist, make_fashion_mnist, one_line
from torchvision.datasets import CIFAR10, CIFAR100

from wml_ray.cli.main import main
from wml_ray.config.load import parse_config
from wml_ray.data.load import load_dataset
from wml_ray.errors import UserError


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
def test_a_broken_idx_file_is_named_with_the_correction(tmp_path, name, compress, damage):
    make_fashion_mnist(tmp_path, compress=compress)
    path = tmp_path / (name + ".gz" * compress)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="again") as caught:
        fashion_mnist(tmp_path)
    assert str(path) in one_line(caught) or "do not match" in one_line(caught)


def with_sizes(*sizes):
    """A change of an IDX header."""
    return lambda raw: raw[:4] + b"".join(size.to_bytes(4, "big") for size in sizes) + raw[4 + 4 * len(sizes) :]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("train-images-idx3-ubyte", lambda raw: b"\0\0\x08\x01" + raw[4:]),
        ("train-images-idx3-ubyte", lambda raw: b"\0\0\x0d\x03" + raw[4:]),
        ("train-images-idx3-ubyte", with_sizes(200, 14, 56)),
        ("train-images-idx3-ubyte", with_sizes(100, 28, 28)),
        ("t10k-labels-idx1-ubyte", lambda raw: b"\0\0\x08\x03" + raw[4:]),
        ("t10k-labels-idx1-ubyte", with_sizes(25)),
    ],
    ids=["magic number", "floats", "other shape", "other number", "magic number of labels", "other number of labels"],
)
def test_an_idx_file_of_another_kind_or_shape_is_refused(tmp_path, name, change):
    make_fashion_mnist(tmp_path)
    path = tmp_path / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=rf"{name} is cut short or not an IDX file") as caught:
        fashion_mnist(tmp_path)
    one_line(caught)


@pytest.mark.parametrize("label", [10, 255])
def test_a_label_that_is_no_class_is_refused_also_by_plan(tmp_path, capsys, label):
    make_fashion_mnist(tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + bytes([label]))
    (tmp_path / "c.yaml").write_text(f"data: {{name: fashion_mnist, root: {tmp_path}}}")
    assert main(["plan", str(tmp_path / "c.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"label {label} of fashion_mnist is none of its 10 classes" in line


def test_a_missing_companion_is_named_with_the_correction(tmp_path):
    make_fashion_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="fetch") as caught:
        fashion_mnist(tmp_path)
    assert str(tmp_path / "t10k-labels-idx1-ubyte") in one_line(caught)


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100", "imagefolder"])
def test_a_missing_folder_is_named_with_the_correction(tmp_path, name):
    root = tmp_path / "nowhere"
    with pytest.raises(UserError, match=r"data\.root") as caught:
        load_dataset(parse_config({"data": {"name": name, "root": str(root)}}))
    assert str(root) in one_line(caught)
    assert ("train/<class>" if name == "imagefolder" else "data.download=true") in one_line(caught)
    assert not root.exists()


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "imagefolder"])
@pytest.mark.parametrize("download", [False, True])
def test_a_folder_that_cannot_be_read_is_one_line(tmp_path, name, download):
    """A loop of links; a name that no file system takes is refused with the config."""
    (tmp_path / "loop").symlink_to("loop")
    data = {"name": name, "download": download}
    with pytest.raises(UserError, match=r"data\.root") as caught:
        load_dataset(parse_config({"data": {**data, "root": str(tmp_path / "loop")}}))
    one_line(caught)
    with pytest.raises(UserError, match=r"data\.root: a part of it is longer than 255 bytes") as caught:
        parse_config({"data": {**data, "root": "x" * 256}})


def test_a_batch_larger_than_the_training_split_is_refused():
    with pytest.raises(UserError, match=r"data\.batch_size = 1500.* \d+ training images .*smaller"):
        digits(data={"batch_size": 1500})


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
