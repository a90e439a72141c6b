"""A search of two minutes on a laptop: one key of the losses, one of the peer weights."""

from ray import tune

OBJECTIVES = {"val/accuracy/ensemble_weighted": "max"}


def space():
    return {
        "wml.alpha": tune.uniform(0.0, 0.9),
        "wml.mirror_step_size": tune.loguniform(0.01, 1.0),
    }
