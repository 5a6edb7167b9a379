"""The numbers of a study: language shares, subnetwork similarity, dynamics and statistics."""

from tracmod.analysis.dynamics import epoch_table, in_language_course
from tracmod.analysis.languages import example_table, language_shares, language_table
from tracmod.analysis.matrix_correlation import MantelResult, mantel, partial_mantel
from tracmod.analysis.results import RunResults, ViewResults
from tracmod.analysis.similarity import head_usage, mask_similarity, similarity_table
from tracmod.analysis.statistics import (
    Interval,
    SignFlipResult,
    adjusted_p_values,
    bootstrap_difference,
    bootstrap_mean,
    sign_flip_test,
    wilson_interval,
)
from tracmod.analysis.summary import analyze

__all__ = [
    "Interval",
    "MantelResult",
    "RunResults",
    "SignFlipResult",
    "ViewResults",
    "adjusted_p_values",
    "analyze",
    "bootstrap_difference",
    "bootstrap_mean",
    "epoch_table",
    "example_table",
    "head_usage",
    "in_language_course",
    "language_shares",
    "language_table",
    "mantel",
    "mask_similarity",
    "partial_mantel",
    "sign_flip_test",
    "similarity_table",
    "wilson_interval",
]
