"""Runs and studies in MLflow; the only folder that imports it."""
