"""Runs and studies on Ray."""
