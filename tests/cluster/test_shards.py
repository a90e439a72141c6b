"""Training from shards in object storage."""

import pytest
from runs import history_of, ignore, start_training, wait_for_epoch
from small_sets import make_image_folder

from wml_ray.checkpoints.store import Checkpoints
from wml_ray.config.load import load_config
from wml_ray.verbs.shard import shard
from wml_ray.verbs.train import train

SETTINGS = [
    *("model.backbone=resnet20", "model.sharing=[1,1,1,2,2]", "pruning.ratios=[0,0.5]", "pruning.saliency_images=8"),
    *("data.batch_size=6", "data.resolution=8", "data.flip=true", "data.loader_workers=1", "optim.epochs=4"),
]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_run_of_two_workers_resumes_from_shards_on_s3_to_the_same_metrics(bucket, workplace):
    shard(str(make_image_folder(workplace / "images", images_a_class=16)), f"{bucket}/set")
    (workplace / "base.yaml").write_text("seed: 3\n")
    remote = ["data.name=shards", f"data.root={bucket}/set", f"data.cache_path={workplace}/cache", "scale.workers=2"]

    def config(name):
        return load_config("base.yaml", [*SETTINGS, *remote, f"run.name={name}"])

    whole = train(config("whole"), ignore)
    (workplace / "config.yaml").write_text(config("killed").to_yaml())
    process = start_training()
    wait_for_epoch(Checkpoints(config("killed").run_folder / "checkpoints", 2), 1, process)
    process.kill()
    process.wait()
    resumed = train(config("killed"), ignore)

    assert history_of(resumed.record) == history_of(whole.record)
    assert list((workplace / "cache").rglob("*.tar"))
