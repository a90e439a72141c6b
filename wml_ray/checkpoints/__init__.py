"""Checkpoints: written, uploaded, read back as networks."""
