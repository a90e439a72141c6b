"""Datasets: readers, splits and batches."""
