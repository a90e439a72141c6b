"""Names of the MLflow tags that wml_ray sets."""

from __future__ import annotations

from typing import Literal

REASON_TAG = "wml_ray.reason"
TOKEN_TAG = "wml_ray.token"
RUN_ID_TAG = "wml_ray.run_id"

KIND_TAG, TRIAL_TAG, STATE_TAG, EPOCHS_TAG = "wml_ray.kind", "wml_ray.trial", "wml_ray.state", "wml_ray.epochs"
BEST_TRIAL_TAG = "wml_ray.best_trial"  # number, or "none"
STUDY_TAG = "wml_ray.study"  # of a study's own run: objectives, searched keys and settings, as JSON
VARIANT_TAG = "wml_ray.variant"  # of a trial of a comparison
PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"  # Markdown, shown on the overview page of a run

TrialState = Literal["COMPLETE", "STOPPED", "FAILED", "RUNNING"]
"""COMPLETE trials trained for the full budget of epochs, STOPPED ones were stopped early by the scheduler."""
