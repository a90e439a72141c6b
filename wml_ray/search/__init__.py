"""Search spaces, the trials of a study, and the study in Optuna and MLflow."""
