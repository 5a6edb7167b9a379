"""Classifiers, their checkpoints and their inputs."""
