import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import make_image_folder, one_line

from wml_ray.config.schema import DataConfig
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
    path = tmp_path / "image.png"
    Image.effect_noise((300, 200), 50).convert("RGB").save(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2] + b"\0" * 50 + raw[len(raw) // 2 + 50 :])
    with pytest.raises(UserError, match="repair or remove") as caught:
        read_image(str(path))
    assert str(path) in one_line(caught)


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
