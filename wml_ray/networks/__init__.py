"""Backbones, the peer tree, and the costs of layers."""
