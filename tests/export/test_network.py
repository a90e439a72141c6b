import numpy as np
import pytest
import torch
from family import tiny_config
from PIL import Image

from wml_ray.data.load import load_dataset
from wml_ray.errors import UserError
from wml_ray.export.network import network_of
from wml_ray.training.start import initial_checkpoint

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def dataset():
    return load_dataset(CONFIG)


@pytest.fixture(scope="module")
def start(dataset):
    start = initial_checkpoint(CONFIG, dataset)
    weights = {f"weights/peer{peer}": share for peer, share in enumerate((0.4, 0.3, 0.2, 0.1))}
    start.metadata["history"] = [{"epoch": 1, "metrics": {"val/accuracy/peer1": 0.5, **weights}}]
    return start


def logits(start, dataset, images):
    """(M, B, K) logits of the tree on normalised images."""
    from wml_ray.checkpoints.load import rebuild_tree

    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (dataset.mean, dataset.std))
    with torch.no_grad():
        return rebuild_tree(start, "start").eval()((images - mean) / std)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_peers_and_ensembles_take_pixels_of_any_type_as_the_dataset_stores_them(start, dataset, dtype):
    images = dataset.images[:8].to(dtype)
    logits_MBK = logits(start, dataset, dataset.images[:8])
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1])
    expected = {
        1: logits_MBK[1],
        "average": logits_MBK.mean(0),
        "weighted": (weights[:, None, None] * logits_MBK).sum(0),
    }
    for choice, logits_BK in expected.items():
        network = network_of(start, "start", choice)
        torch.testing.assert_close(network(images), logits_BK, rtol=1e-5, atol=1e-6)
        assert network.classes == tuple("0123456789")
    assert network_of(start, "start", 1).info.validation_accuracy == 0.5


def test_files_pil_images_and_tensors_of_one_image_are_predicted_alike(start, dataset, tmp_path):
    network = network_of(start, "start", 0)
    stored = dataset.images[3]
    grey = Image.fromarray((stored[0].numpy() * (255 / 16)).round().astype(np.uint8))
    grey.save(tmp_path / "a.png")
    rotated = grey.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned right by 90 degrees
    rotated.save(tmp_path / "turned.png", exif=exif)
    frame = network.predict([tmp_path / "a.png", grey, stored, str(tmp_path / "turned.png")])
    assert frame["class"].nunique() == 1
    assert frame["probability"].round(5).nunique() == 1
    larger = grey.resize((32, 32), Image.Resampling.NEAREST)
    assert network.predict(larger)["label"].between(0, 9).all()


def test_wrong_images_and_choices_are_refused_in_one_line(start):
    network = network_of(start, "start", 0)
    with pytest.raises(UserError, match=r"shape \(2, 3, 8, 8\); this network takes \(images, 1, 8, 8\)"):
        network(torch.zeros(2, 3, 8, 8))
    with pytest.raises(UserError, match="no peer 4; give a number from 0 to 3"):
        network_of(start, "start", 4)
    with pytest.raises(UserError, match="'best' is no ensemble; allowed: average, weighted"):
        network_of(start, "start", "best")
    with pytest.warns(UserWarning, match="between 0 and 1"):
        network.predict(torch.full((1, 8, 8), 0.5))
