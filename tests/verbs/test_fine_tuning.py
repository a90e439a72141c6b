"""From a folder of photos and a trained network of a library to an int8 file on a device."""

import json

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from wml_ray.cli.main import main

SIZES = [(40, 32), (33, 57), (64, 48)]


def write_photos(folder, images_a_class):
    """JPEGs of mixed sizes: bright and dark noise."""
    random = np.random.default_rng(0)
    for part in ("train", "test"):
        for label, brightness in (("dark", 60), ("light", 190)):
            (folder / part / label).mkdir(parents=True)
            for number in range(images_a_class):
                width, height = SIZES[number % len(SIZES)]
                pixels = random.normal(brightness, 30, (height, width, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{number}.jpg")


@pytest.mark.core
def test_jpegs_of_mixed_sizes_and_a_trained_timm_network_become_an_int8_file_with_a_card(workplace, capsys):
    write_photos(workplace / "photos", images_a_class=40)
    save_file(timm.create_model("mobilenetv3_small_100", num_classes=7).state_dict(), workplace / "trained.safetensors")
    words = ["train", "c.yaml", "data.name=imagefolder", "data.root=photos", "data.resolution=32", "data.batch_size=16"]
    words += ["model.backbone=timm:mobilenetv3_small_100", "model.pretrained=trained.safetensors"]
    words += ["model.sharing=[1,1,1,2,2,2]", "pruning.ratios=[0,0.3]", "pruning.saliency_images=16", "optim.epochs=2"]
    words += ["optim.learning_rate=0.01", "data.loader_workers=0"]
    (workplace / "c.yaml").write_text("")
    assert main(words) == 0, capsys.readouterr().err
    (run,) = (workplace / "results" / "wml").iterdir()
    assert main(["export", str(run), "--peer", "1", "--to", "onnx", "--int8", "--max-drop", "0.5", "--out", "out"]) == 0
    card = json.loads((workplace / "out" / "card.json").read_text())
    assert (card["format"], card["classes"]) == ("onnx int8", ["dark", "light"])
    assert card["config"]["model"]["pretrained"] == "trained.safetensors"
    assert card["verification"]["images"] >= 64
