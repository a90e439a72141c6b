"""Backbones, the peer tree, and what layers cost."""
