"""Projected per-example gradients: the projection, the collector and the stores on disk."""
