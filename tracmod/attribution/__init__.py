"""Influence for any model and data, and queries of what was collected."""
