"""Small studies for the tests, and their runs in MLflow."""

from family import tiny_config
from ray import tune as ray_tune_api
from runs import client

from wml_ray.cluster.space import make_space

ACCURACY = {"val/accuracy/ensemble_weighted": "max"}
ALPHA = {"wml.alpha": ray_tune_api.uniform(0.0, 0.9)}


def small_space(*overrides, domains=ALPHA, objectives=ACCURACY):
    return make_space(tiny_config("optim.epochs=3", "scale.cpus_per_worker=1", *overrides), domains, objectives)


def children(study):
    experiment = client().get_experiment_by_name(study).experiment_id
    runs = client().search_runs([experiment], "tags.`mlflow.parentRunId` != ''")
    return sorted(runs, key=lambda run: int(run.data.tags["wml_ray.trial"]))
