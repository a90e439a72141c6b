"""The paper's settings: pruning ratios, alpha and the mirror-descent step eta. Uncomment lines to search more."""

from ray import tune

from wml_ray import increasing

OBJECTIVES = {"val/accuracy/ensemble_weighted": "max"}


def space():
    return {
        "pruning.ratios": increasing(0.0, 0.5),
        "wml.alpha": tune.uniform(0.0, 1.0),
        "wml.mirror_step_size": tune.loguniform(0.001, 1.0),
        # "wml.update_every": tune.lograndint(1, 101),                          # T
        # "wml.unroll_learning_rate": tune.loguniform(0.001, 0.1),              # gamma
        # "wml.temperature": tune.uniform(1.0, 5.0),                            # tau
        # "model.sharing": tune.choice([[1, 1, 1, 4, 4], [1, 1, 2, 4, 4], [4, 4, 4, 4, 4]]),
        # "optim.learning_rate": tune.loguniform(0.01, 0.3),
    }
