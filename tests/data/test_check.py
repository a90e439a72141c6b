import json
from pathlib import Path

import pytest
from PIL import Image
from small_sets import ALONE, image_folder, listed, make_image_folder

from wml_ray.cli.main import main
from wml_ray.config.schema import DataConfig
from wml_ray.data import check
from wml_ray.data.check import undecodable_images
from wml_ray.errors import UserError


def truncate(path, image, share):
    image.save(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])


def damaged_folder(root):
    """24 good images, one of them with bytes behind its end, and the names of four that cannot be decoded."""
    make_image_folder(root)
    noise = Image.effect_noise((120, 90), 50).convert("RGB")
    cat = root / "train" / "cat"
    truncate(cat / "cut.jpg", noise, 0.6)
    truncate(cat / "cut.png", noise, 0.9)
    (cat / "text.jpg").write_text("not an image")
    (root / "val" / "dog" / "line\nbreak.jpeg").write_bytes(b"")
    noise.save(cat / "padded.jpg")
    with (cat / "padded.jpg").open("ab") as file:
        file.write(b"\0" * 50)
    return ["train/cat/cut.jpg", "train/cat/cut.png", "train/cat/text.jpg", "val/dog/line\nbreak.jpeg"]


def settings(root, **data):
    return DataConfig(name="imagefolder", root=str(root), **data)


@pytest.mark.parametrize("decode_all", [False, True])
def test_all_images_that_are_cut_short_or_no_images_are_listed_at_once(tmp_path, monkeypatch, decode_all):
    monkeypatch.setattr(check, "SAMPLE", 1)  # the first image: the others are found by their headers and ends
    names = damaged_folder(tmp_path)
    with pytest.raises(UserError, match="4 of 53 images") as caught:
        undecodable_images(settings(tmp_path), decode_all)
    first, *rest = str(caught.value).splitlines()
    assert "repair or remove them, or set data.skip_bad=true" in first
    assert [line.split(":")[0].strip() for line in rest] == [name.replace("\n", "\\n") for name in names]
    assert all(reason and str(tmp_path) not in reason for reason in (line.partition(": ")[2] for line in rest))
    assert sorted(undecodable_images(settings(tmp_path, skip_bad=True), decode_all)) == names


def test_damage_inside_a_file_is_found_by_decoding_all(tmp_path):
    make_image_folder(tmp_path, images_a_class=40)
    path = tmp_path / "train" / "cat" / "01.png"
    Image.effect_noise((120, 90), 50).convert("RGB").save(path)
    raw = path.read_bytes()
    path.write_bytes(raw[:5000] + b"\0" * 50 + raw[5050:])
    assert list(undecodable_images(settings(tmp_path, skip_bad=True), decode_all=True)) == ["train/cat/01.png"]


def test_a_message_lists_at_most_20_images(tmp_path):
    make_image_folder(tmp_path, images_a_class=30)
    for index in range(25):
        (tmp_path / "train" / "cat" / f"{index:02d}.png").write_text("text")
    with pytest.raises(UserError, match="25 of 120 images") as caught:
        undecodable_images(settings(tmp_path))
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[-1].strip() == "and 5 more"


def test_a_whole_folder_has_no_undecodable_image(tmp_path):
    assert undecodable_images(settings(make_image_folder(tmp_path)), decode_all=True) == {}


@pytest.mark.filterwarnings("ignore:data.skip_bad")
def test_with_skip_bad_every_image_that_is_left_streams(tmp_path):
    names = damaged_folder(tmp_path)
    dataset = image_folder(tmp_path, skip_bad=True)
    assert sorted(dataset.skipped) == names

    def count(split):
        return sum(len(targets) for _, targets in listed(dataset.evaluation_batches(split, ALONE)))

    assert count("train") + count("validation") == 25
    assert count("test") == 24


def test_one_warning_names_the_number_of_images_left_out(tmp_path):
    damaged_folder(tmp_path)
    with pytest.warns(UserWarning, match="4 images cannot be decoded and are left out") as caught:
        image_folder(tmp_path, skip_bad=True)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


SMALL = [
    *("data.name=imagefolder", "data.root=images", "data.resolution=8", "data.batch_size=5", "data.loader_workers=0"),
    *("pruning.saliency_images=8", "optim.epochs=1"),
]


@pytest.fixture
def config_file(workplace):
    Path("config.yaml").write_text("seed: 0\n")
    return "config.yaml"


@pytest.mark.parametrize(
    "command", [["plan"], ["plan", "--check-data"], ["train", "--dry-run"], ["train", "--check-data"]], ids=" ".join
)
def test_commands_list_the_images_that_cannot_be_decoded_and_fail(config_file, capsys, command):
    names = damaged_folder(Path("images"))
    assert main([command[0], config_file, *command[1:], *SMALL]) == 2
    shown = "".join(capsys.readouterr())
    assert all(name.replace("\n", "\\n") in shown for name in names)
    assert not Path("results").exists()


def test_a_run_records_the_images_it_left_out(config_file, capsys):
    names = damaged_folder(Path("images"))
    assert main(["train", config_file, *SMALL, "data.skip_bad=true"]) == 0
    assert capsys.readouterr().err.count("cannot be decoded and are left out") == 1
    (result,) = Path("results").glob("*/*/result.json")
    assert json.loads(result.read_text())["skipped_images"] == names
    plans = list(result.parent.glob("checkpoints/*/plan.json"))
    assert plans
    assert all(json.loads(plan.read_text())["skipped_images"] == names for plan in plans)
