"""Subnetworks: masks over attention heads, head importance, pruning and smaller models."""
