"""Names of the MLflow tags that wml_ray sets."""

from __future__ import annotations

from typing import Literal

REASON_TAG = "wml_ray.reason"
TOKEN_TAG = "wml_ray.token"

KIND_TAG, TRIAL_TAG, STATE_TAG, EPOCHS_TAG = "wml_ray.kind", "wml_ray.trial", "wml_ray.state", "wml_ray.epochs"
STUDY_TAG = "wml_ray.study"  # of the parent run: what the report must know of a study, as JSON
PARENT_TAG = "mlflow.parentRunId"

TrialState = Literal["COMPLETE", "STOPPED", "FAILED", "RUNNING"]
"""COMPLETE has had the full budget of epochs, STOPPED was stopped before it by the scheduler."""
