"""Attention heads: masks, importance, pruning and smaller models."""
