from pathlib import Path

import pytest
import torch
from PIL import Image
from small_sets import ALONE, image_folder, listed, make_image_folder, one_line, over_workers, same
from torchvision.transforms import v2

from wml_ray.errors import UserError


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


def test_a_view_is_what_torchvision_crops_and_flips_with_its_seed(tmp_path):
    dataset = image_folder(make_image_folder(tmp_path), flip=True)
    transform = v2.Compose([v2.RandomResizedCrop(8, antialias=True), v2.RandomHorizontalFlip()])
    before = torch.get_rng_state()
    views = [dataset.files.__getitems__([(index, (7, index))])[0][0] for index in range(24)]
    assert torch.equal(torch.get_rng_state(), before)
    for index, views_VHWC in enumerate(views):
        image, _ = next(dataset.images.read([index], 10**6))
        for seed, view_HWC in zip((7, index), views_VHWC, strict=True):
            torch.manual_seed(seed)
            assert torch.equal(view_HWC.permute(2, 0, 1), transform(image.contiguous()))


@pytest.mark.parametrize("channels_last", [True, False])
def test_inputs_are_pixels_less_the_mean_over_the_deviation(tmp_path, channels_last):
    dataset = image_folder(make_image_folder(tmp_path), channels_last=channels_last)
    inputs, _ = next(dataset.evaluation_batches("test", ALONE))
    pixels, _ = dataset.pixels(dataset.splits["test"])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (dataset.mean, dataset.std))
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    assert torch.equal(inputs, (pixels.float() - mean) / std)
    assert inputs.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


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

    samples = dataset.images.samples
    files = {
        split: [Path(samples[index][0]).relative_to(tmp_path) for index in dataset.splits[split].tolist()]
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
def test_an_unreadable_image_is_named_with_the_correction(tmp_path, loader_workers, content):
    make_image_folder(tmp_path)
    path = tmp_path / "val" / "dog" / "05.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match="repair or remove") as caught:
        listed(image_folder(tmp_path, loader_workers=loader_workers).evaluation_batches("test", ALONE))
    assert str(path) in one_line(caught)


def test_class_folders_that_differ_are_named(tmp_path):
    make_image_folder(tmp_path)
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "horse")
    with pytest.raises(UserError) as caught:
        image_folder(tmp_path)
    assert str(tmp_path / "val") in one_line(caught)
