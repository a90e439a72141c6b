import pytest
import torch

from wml_ray.config.load import parse_config
from wml_ray.training.threads import choose_threads, describe_threads, torch_threads, training_threads


def test_small_images_train_on_one_thread():
    assert choose_threads(resolution=8, batch_per_worker=64, cores=16) == 1
    assert choose_threads(resolution=32, batch_per_worker=64, cores=16) == 1


def test_more_work_uses_more_threads_up_to_the_cores():
    chosen = [choose_threads(224, batch, cores=8) for batch in (1, 4, 16, 64, 256)]
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (1, 8)


def test_the_configured_number_of_threads_is_used():
    config = parse_config({"scale": {"cpus_per_worker": 3}})
    assert training_threads(config) == 3
    assert describe_threads(config) == "3 threads (scale.cpus_per_worker)"


def test_a_worker_uses_no_more_threads_than_its_reserved_cores():
    data = {"name": "imagefolder", "resolution": 224, "batch_size": 256}
    config = parse_config({"data": data, "scale": {"workers": 2}})
    assert [training_threads(config, cores) for cores in (1, 4)] == [1, 4]
    assert training_threads(parse_config({"scale": {"workers": 2}}), 4) == 1


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ([], "1 thread (images of 8x8 pixels, batch 64)"),
        (["scale.workers=2"], "at most 1 thread a worker (images of 8x8 pixels, batch 32)"),
        (["scale.workers=2", "scale.cpus_per_worker=2"], "2 threads a worker (scale.cpus_per_worker)"),
    ],
)
def test_the_first_line_says_the_threads_and_why(overrides, text):
    assert describe_threads(parse_config({}, overrides)) == text


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
