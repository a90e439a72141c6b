"""Exported files: what they compute, what is refused, and the card beside them."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from wml_ray.errors import UserError
from wml_ray.export import formats
from wml_ray.export.network import load_network
from wml_ray.verbs.export import export_network


@pytest.fixture
def network(teacher_run, empty_workplace):
    return load_network(teacher_run, 2, trust=True)


@pytest.mark.parametrize("choice", [2, "average"])
@pytest.mark.parametrize("to", ["onnx", "pt2", "safetensors"])
def test_an_exported_file_computes_the_logits_of_the_network_for_any_number_of_images(
    teacher_run, empty_workplace, to, choice
):
    network = load_network(teacher_run, choice, trust=True)
    exported = export_network(network, to, "out")
    assert exported.verification.images >= 256
    assert exported.verification.equal_predictions == 1
    run = formats.FORMATS[to].open(exported.folder)
    images = np.random.default_rng(0).integers(0, 17, (7, 1, 8, 8), dtype=np.uint8)
    expected = network(torch.from_numpy(images)).numpy()
    for count in (1, 7):
        np.testing.assert_allclose(run(images[:count]), expected[:count], atol=1e-5)


def test_what_safetensors_wrote_reloads_bit_equal_and_is_exported_again(network, empty_workplace):
    export_network(network, "safetensors", "out")
    again = load_network(empty_workplace / "out", 2, trust=True)
    images = torch.randint(17, (9, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(again(images), network(images))
    assert replace(again.info, plan={}, test_accuracy=None) == replace(network.info, plan={}, test_accuracy=None)
    export_network(again, "safetensors", "again")
    assert (empty_workplace / "again" / "model.safetensors").exists()
    with pytest.raises(UserError, match=r"out holds peer 2 of digits-stages-\w+ and no other network"):
        load_network(empty_workplace / "out", 1, trust=True)


def test_a_file_that_computes_something_else_is_refused_and_does_not_stay(network, empty_workplace, monkeypatch):
    def write(given, folder):
        given.mean_C11 += 0.01
        formats.write_onnx(given, folder)
        given.mean_C11 -= 0.01

    monkeypatch.setitem(formats.FORMATS, "onnx", replace(formats.FORMATS["onnx"], write=write))
    with pytest.raises(UserError, match=r"differs from PyTorch by up to .* in its logits, more than 0.0001"):
        export_network(network, "onnx", "out")
    assert list(empty_workplace.iterdir()) == []


def test_int8_is_smaller_to_compute_with_and_refused_where_it_costs_too_much(network, empty_workplace):
    exported = export_network(network, "onnx", "out", int8=True, max_drop=1.0)
    assert exported.card["format"] == "onnx int8"
    assert exported.verification.logit_difference > 1e-4
    before = (empty_workplace / "out" / "model.onnx").read_bytes()
    with pytest.raises(UserError, match=r"in int8, peer 2 of .* validation images, more than --max-drop -1 below"):
        export_network(network, "onnx", "out", int8=True, max_drop=-1.0)
    assert (empty_workplace / "out" / "model.onnx").read_bytes() == before


@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_the_lines_of_the_card_run_without_wml_ray(network, empty_workplace, to):
    folder = export_network(network, to, "out").folder
    (lines,) = re.findall(r"```python\n(.*?)```", (folder / "card.md").read_text(), flags=re.DOTALL)
    assert lines.count("\n") == 5
    program = f"import sys; sys.modules['wml_ray'] = None\n{lines}"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout.strip() in network.classes, done.stderr


def test_the_card_has_origin_accuracies_with_their_intervals_and_costs(network, empty_workplace):
    exported = export_network(network, "onnx", "out")
    card = json.loads((exported.folder / "card.json").read_text())
    assert (card["run_id"], card["network"], card["epoch"]) == (network.info.run_id, "peer2", 1)
    assert card["config"] == network.info.config.dump()
    assert card["classes"] == list("0123456789")
    for split, value in (("validation", network.info.validation_accuracy), ("test", network.info.test_accuracy)):
        low, high = card["accuracy"][split]["interval"]
        assert card["accuracy"][split]["value"] == value
        assert low < value < high
    assert card["verification"]["torch_accuracy"] == pytest.approx(network.info.validation_accuracy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "tflite"}, "--to tflite is unknown; allowed: onnx, pt2, safetensors"),
        ({"to": "pt2", "int8": True}, "--int8 needs --to onnx"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(network, empty_workplace, options, message):
    with pytest.raises(UserError, match=message):
        export_network(network, out="out", **options)
    assert list(empty_workplace.iterdir()) == []


def test_a_layer_that_cannot_be_exported_is_one_line(network, empty_workplace):
    class Foreign(torch.nn.Module):
        def forward(self, inputs):
            return torch.from_numpy(np.sort(inputs.numpy()))

    network.tree.stages["stage0"][0].append(Foreign())
    with pytest.raises(UserError, match=r"peer 2 of .* cannot be exported to onnx \(.*\); try --to pt2, safetensors"):
        export_network(network, "onnx", "out")
    assert list(empty_workplace.iterdir()) == []
