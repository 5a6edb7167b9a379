"""Influence scores from features or from whole gradients."""
