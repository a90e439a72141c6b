"""A study: space, trials, and what Optuna keeps of it."""
