"""Sequence classifiers: loading them, their checkpoints, inputs and digests."""
