"""Runs and studies as Ray jobs."""
