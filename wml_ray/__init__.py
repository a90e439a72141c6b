"""Train a whole family of differently sized networks in one run: Weighted Mutual Learning on Ray."""

__version__ = "0.1.0"
__all__ = ["__version__"]
