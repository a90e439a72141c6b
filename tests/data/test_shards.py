"""Shards give the batches of the image folder they were made of, from a folder and from object storage."""

import json
import os
import tarfile

import pytest
from PIL import Image
from small_sets import ALONE, image_folder, listed, make_image_folder, one_line, over_workers, same

from wml_ray.cli.main import main
from wml_ray.config.schema import DataConfig
from wml_ray.data.shards import ShardedImages, read_header
from wml_ray.errors import UserError
from wml_ray.storage.paths import to_path
from wml_ray.verbs.shard import shard


def make_noise_folder(root, images_a_class=6):
    """A folder of PNG files, and of WebP files that fill several shards of 1 MB."""
    make_image_folder(root, images_a_class=2)
    noise = Image.effect_noise((400, 300), 80).convert("RGB")
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            for index in range(images_a_class):
                noise.rotate(7 * index).save(root / part / name / f"noise{index:02d}.webp", lossless=True)
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_noise_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("shards")
    assert len(shard(str(images), str(folder), shard_mb=1).shards) > 2
    return folder


def sharded(root, **data):
    return image_folder(root, name="shards", **data)


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_shards_give_the_batches_of_their_image_folder(images, shards, loader_workers):
    folder, of_shards = image_folder(images), sharded(shards, loader_workers=loader_workers)
    whole = listed(folder.train_batches(2, ALONE))
    assert same(listed(of_shards.train_batches(2, ALONE)), whole)
    assert same(listed(of_shards.train_batches(2, ALONE, first=4)), whole[4:])
    assert same(over_workers(lambda worker: of_shards.train_batches(2, worker), 3, None), whole)
    for split in ("validation", "test"):
        assert same(listed(of_shards.evaluation_batches(split, ALONE)), listed(folder.evaluation_batches(split, ALONE)))


def test_tar_restores_the_image_folder(images, shards, tmp_path):
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path, filter="data")

    def contents(root):
        return {path.relative_to(root): path.read_bytes() for path in root.rglob("*.*")}

    assert contents(tmp_path) == contents(images)


@pytest.mark.parametrize("loader_workers", [0, 2])
@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_a_damaged_shard_is_named_and_ends_the_stream(images, tmp_path, loader_workers, damage):
    shard(str(images), str(tmp_path), shard_mb=1)
    path = tmp_path / "shard-00001.tar"
    content = bytearray(path.read_bytes())
    content[5000::50_000] = (byte ^ 1 for byte in content[5000::50_000])
    path.write_bytes({"changed": content, "cut": content[:2000], "missing": b""}[damage])
    if damage == "missing":
        path.unlink()
    with pytest.raises(UserError) as caught:
        listed(sharded(tmp_path, loader_workers=loader_workers).train_batches(1, ALONE))
    line = one_line(caught)
    assert path.name in line
    assert line.startswith((str(tmp_path), "data.root"))


@pytest.mark.parametrize("name", ["shards.json", "index.npy"])
@pytest.mark.parametrize("content", [b"", b"{}", None], ids=["empty", "other", "missing"])
def test_a_damaged_index_is_named(images, tmp_path, name, content):
    shard(str(images), str(tmp_path))
    path = tmp_path / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=name) as caught:
        sharded(tmp_path)
    assert "wml-ray shard" in one_line(caught)


def test_a_label_that_is_no_class_is_refused(images, tmp_path):
    shard(str(images), str(tmp_path))
    header = json.loads((tmp_path / "shards.json").read_text())
    (tmp_path / "shards.json").write_text(json.dumps({**header, "classes": ["cat"]}))
    with pytest.raises(UserError, match=r"label 1 of index\.npy is none of the 1 classes of shards\.json") as caught:
        sharded(tmp_path)
    one_line(caught)


def test_an_interrupted_call_is_continued_and_writes_only_what_is_missing(images, shards, tmp_path):
    shard(str(images), str(tmp_path), shard_mb=1)
    (tmp_path / "shards.json").unlink()
    (tmp_path / "parts" / "00002.json").unlink()
    cut = tmp_path / "shard-00001.tar"
    cut.write_bytes(cut.read_bytes()[:1000])
    kept = tmp_path / "shard-00000.tar"
    os.utime(kept, ns=(0, 0))
    shard(str(images), str(tmp_path), shard_mb=1)
    assert kept.stat().st_mtime_ns == 0
    for path in shards.glob("*.*"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_changed_image_is_written_again(images, tmp_path):
    folder = make_image_folder(tmp_path / "folder")
    before = shard(str(folder), str(tmp_path / "set"))
    Image.new("RGB", (9, 9), "red").save(folder / "train" / "cat" / "00.png")
    after = shard(str(folder), str(tmp_path / "set"))
    assert before.shards != after.shards
    streams = [dataset.train_batches(1, ALONE) for dataset in (image_folder(folder), sharded(tmp_path / "set"))]
    assert same(*map(listed, streams))


@pytest.mark.filterwarnings("ignore:data.skip_bad")
def test_images_that_cannot_be_decoded_are_refused_or_left_out_and_recorded(workplace, capsys):
    folder = make_image_folder(workplace / "folder")
    for name in ("train/cat/03.png", "val/dog/01.png"):
        (folder / name).write_bytes(b"not an image")
    assert main(["shard", "folder", "set"]) == 2
    shown = capsys.readouterr().err
    assert all(words in shown for words in ("2 of 48 images", "--skip-bad", "train/cat/03.png"))
    with pytest.raises(UserError, match=r"shards\.json is missing"):
        sharded("set")
    assert main(["shard", "folder", "set", "--skip-bad"]) == 0
    assert "left out 2 images" in capsys.readouterr().out
    dataset, folder_dataset = sharded("set"), image_folder("folder", skip_bad=True)
    assert sorted(dataset.skipped) == sorted(folder_dataset.skipped) == ["train/cat/03.png", "val/dog/01.png"]
    assert same(listed(dataset.train_batches(1, ALONE)), listed(folder_dataset.train_batches(1, ALONE)))


def test_resize_limits_the_shorter_side_and_keeps_smaller_images(images, tmp_path):
    shard(str(images), str(tmp_path), resize=60)
    source = ShardedImages(DataConfig(name="shards", root=str(tmp_path)))
    shapes = {tuple(image.shape[1:]) for image, _ in source.read(range(len(source.labels)), 10**6)}
    assert (60, 80) in shapes
    assert all(min(shape) <= 60 for shape in shapes)


@pytest.mark.parametrize("words", [["--shard-mb", "0"], ["--shard-mb", "1000"], ["--resize", "1"]], ids=" ".join)
def test_options_outside_their_range_are_refused(images, workplace, capsys, words):
    assert main(["shard", str(images), "set", *words]) == 2
    assert words[0] in capsys.readouterr().err


def test_object_storage_gives_the_batches_of_the_image_folder(images, bucket, tmp_path):
    shard(str(images), bucket, shard_mb=1)
    whole = listed(image_folder(images).train_batches(1, ALONE))
    sizes = [part.bytes for part in read_header(bucket).shards]
    for cached in (0, 1, len(sizes)):
        cache = tmp_path / f"cache{cached}"
        dataset = sharded(bucket, cache_gb=sum(sizes[:cached]) / 1e9, cache_path=str(cache), loader_workers=2)
        dataset.images.cache.fill()
        files = [path for path in cache.rglob("*") if path.is_file() and path.name != ".lock"]
        assert sorted(path.name for path in files) == [f"shard-{number:05d}.tar" for number in range(cached)]
        assert same(listed(dataset.train_batches(1, ALONE)), whole)


def test_the_cache_stays_within_its_limit_when_another_set_uses_it(images, bucket, tmp_path):
    data = {"cache_path": str(tmp_path / "cache"), "cache_gb": 0.003}
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "other.txt").write_text("of another program")
    for shard_mb in (1, 2):
        shard(str(images), f"{bucket}/{shard_mb}", shard_mb=shard_mb)
        sharded(f"{bucket}/{shard_mb}", **data).images.cache.fill()
    cached = list((tmp_path / "cache").rglob("*.tar"))
    assert 0 < sum(path.stat().st_size for path in cached) <= 3e6
    assert len({path.parent for path in cached}) == 1
    assert (tmp_path / "cache" / "other.txt").exists()


def test_a_damaged_shard_in_object_storage_is_named_before_it_is_cached(images, bucket, tmp_path):
    shard(str(images), bucket, shard_mb=1)
    path = to_path(f"{bucket}/shard-00001.tar")
    path.write_bytes(path.read_bytes()[:-1] + b"x")  # behind all images
    dataset = sharded(bucket, cache_path=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"shard-00001\.tar is damaged"):
        dataset.images.cache.fill()
    assert [file.name for file in (tmp_path / "cache").rglob("*.tar")] == ["shard-00000.tar"]
