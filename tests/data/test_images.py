import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import make_image_folder, one_line
from torchvision.datasets import ImageFolder

from wml_ray.config.schema import DataConfig
from wml_ray.data.check import undecodable_images
from wml_ray.data.images import list_images, read_image
from wml_ray.errors import UserError

ORIENTATION = 0x0112  # the EXIF tag


def top_red_bottom_blue():
    pixels = np.zeros((16, 8, 3), np.uint8)
    pixels[:8, :, 0] = pixels[8:, :, 2] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize(
    ("orientation", "transpose"),
    [(1, None), (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90), (8, Image.Transpose.ROTATE_270)],
)
def test_images_are_rotated_as_their_exif_orientation_says(tmp_path, suffix, orientation, transpose):
    upright, exif = top_red_bottom_blue(), Image.Exif()
    exif[ORIENTATION] = orientation
    stored = upright if transpose is None else upright.transpose(transpose)
    stored.save(tmp_path / f"image.{suffix}", exif=exif)
    image = read_image(str(tmp_path / f"image.{suffix}"))
    assert image.shape == (3, 16, 8)
    assert (image[0, :6] > 200).all()
    assert (image[2, 10:] > 200).all()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16"])
def test_png_files_of_any_mode_are_read_as_rgb(tmp_path, mode):
    Image.new(mode, (9, 12)).save(tmp_path / "image.png")
    image = read_image(str(tmp_path / "image.png"))
    assert (image.shape, image.dtype) == ((3, 12, 9), torch.uint8)


def test_sixteen_bits_a_pixel_are_scaled_to_eight(tmp_path):
    Image.fromarray(np.full((4, 4), 128 * 256, np.uint16)).save(tmp_path / "image.png")
    assert (read_image(str(tmp_path / "image.png")) == 128).all()


def test_a_damaged_png_is_an_error_and_no_crash(tmp_path):
    """torchvision's decoder ends the process with a segmentation fault on this file."""
    path = tmp_path / "new\nline.png"
    Image.effect_noise((300, 200), 50).convert("RGB").save(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2] + b"\0" * 50 + raw[len(raw) // 2 + 50 :])
    with pytest.raises(UserError, match="repair or remove") as caught:
        read_image(str(path))
    assert str(path).replace("\n", "\\n") in one_line(caught)


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "ppm", "pgm", "bmp", "tif", "tiff", "webp"])
def test_every_suffix_that_is_listed_is_decoded(tmp_path, suffix):
    make_image_folder(tmp_path)
    Image.new("L", (9, 12)).save(tmp_path / "train" / "cat" / f"new.{suffix.upper()}")
    listing = list_images(DataConfig(name="imagefolder", root=str(tmp_path)))
    (path,) = (path for path, _ in listing.samples if "new" in path)
    assert read_image(path).shape == (3, 12, 9)


def test_files_of_other_kinds_are_not_listed(tmp_path):
    make_image_folder(tmp_path)
    for name in ("notes.txt", "image.gif", "png", ".hidden"):
        (tmp_path / "train" / "cat" / name).touch()
    assert list_images(DataConfig(name="imagefolder", root=str(tmp_path))).num_train == 24


def test_loops_of_links_count_no_image_twice_and_other_links_are_followed(tmp_path):
    make_image_folder(tmp_path)
    cat, elsewhere = tmp_path / "train" / "cat", tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("L", (9, 12)).save(elsewhere / "more.png")
    for name, target in {
        "a": cat,
        "b": cat,
        "up": cat.parent,
        "root": "/",
        "more": elsewhere,
        "again": elsewhere,
    }.items():
        (cat / name).symlink_to(target)
    (elsewhere / "back").symlink_to(cat)
    samples = list_images(DataConfig(name="imagefolder", root=str(tmp_path))).samples
    in_cat = [str(Path(path).relative_to(cat)) for path, _ in samples if Path(path).is_relative_to(cat)]
    assert in_cat == [*(f"{index:02d}.png" for index in range(12)), "again/more.png"]


def test_a_nested_folder_is_listed_in_the_order_of_torchvision(tmp_path):
    make_image_folder(tmp_path)
    for name in ("sub/z.png", "sub/a.png", "sub-b/a.png", "Zub/deep/a.PNG"):
        (tmp_path / "train" / "cat" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "cat" / name).touch()
    samples = list_images(DataConfig(name="imagefolder", root=str(tmp_path))).samples
    assert samples[:28] == ImageFolder(str(tmp_path / "train")).samples


@pytest.mark.parametrize("side", [30_000, 11_000])
def test_an_image_with_too_many_pixels_is_refused_by_its_header(tmp_path, side):
    """The default limit is between the two that Pillow has: for its warning and for its error."""
    path = tmp_path / "image.png"
    Image.new("1", (side, side)).save(path)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"more than data.max_pixels = 100,000,000 pixels"):
        read_image(str(path))
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


def test_the_limit_of_pixels_is_a_setting_and_the_check_before_a_run_keeps_it(tmp_path, monkeypatch):
    make_image_folder(tmp_path)
    Image.new("L", (50, 40)).save(tmp_path / "train" / "cat" / "large.png")
    monkeypatch.setattr("wml_ray.data.check.SAMPLE", 1)
    for limit, expected in ((1999, ["train/cat/large.png"]), (2000, [])):
        config = DataConfig(name="imagefolder", root=str(tmp_path), max_pixels=limit, skip_bad=True)
        assert list(undecodable_images(config)) == expected


def test_leaving_out_images_moves_no_other_to_another_part_or_label(tmp_path):
    make_image_folder(tmp_path, ("train", "val", "test"))
    listing = list_images(DataConfig(name="imagefolder", root=str(tmp_path)))
    skipped = {"train/cat/03.png", "test/dog/00.png", "val/dog/11.png"}
    rest = listing.without(skipped)
    assert rest.samples == [sample for sample in listing.samples if listing.name(sample[0]) not in skipped]
    assert (rest.num_train, rest.num_test, len(rest.samples)) == (23, 23, 69)


def test_a_class_folder_with_no_image_left_is_named(tmp_path):
    listing = list_images(DataConfig(name="imagefolder", root=str(make_image_folder(tmp_path, images_a_class=2))))
    with pytest.raises(UserError, match=r"val/dog") as caught:
        listing.without(["val/dog/00.png", "val/dog/01.png"])
    assert "data.skip_bad" in one_line(caught)
