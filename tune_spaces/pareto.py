"""Two objectives: a higher accuracy of the ensemble, and fewer MACs of the whole family."""

from ray import tune

from wml_ray import increasing

OBJECTIVES = {"val/accuracy/ensemble_weighted": "max", "peers/macs/tree": "min"}


def space():
    return {
        "pruning.ratios": increasing(0.0, 0.5),
        "wml.alpha": tune.uniform(0.0, 1.0),
        "wml.mirror_step_size": tune.loguniform(0.001, 1.0),
    }
