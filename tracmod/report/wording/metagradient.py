"""Sentences about the metagradient, and where it disagrees with TracIn's shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from tracmod.report.wording.findings import listed
from tracmod.report.wording.labels import MODEL_NAMES


def verdicts(summary: Mapping[str, Any]) -> list[str]:
    """Return how smooth the training of each model was measured to be.

    Args:
        summary: content of metagradient/summary.json.
    """
    return [
        f"{MODEL_NAMES[model]}: {measured['verdict']}"
        for model, measured in summary["models"].items()
    ]


def disagreement(
    model: str, foretold: pd.DataFrame, shares: pd.DataFrame, actual: pd.DataFrame | None
) -> str:
    """Return for which test languages the two name another most helpful training language.

    The language itself is left out, because both tend to name it. Retraining without each of the
    two languages is the judge: the one without which the loss is higher helps more.

    Args:
        model: name of the model.
        foretold: test x training languages, sums of the metagradient.
        shares: the same, shares of TracIn among proponents.
        actual: the same, changes of mean loss by retraining; None if there was none.
    """
    named = {
        test: (_most_helpful(foretold, test), _most_helpful(shares, test))
        for test in foretold.index
        if test in shares.index and len(foretold.columns.drop(test, errors="ignore")) > 1
    }
    if not named:
        return ""
    different = {test: pair for test, pair in named.items() if pair[0] != pair[1]}
    start = f"{MODEL_NAMES[model]}: which other training language helps a test language most?"
    if not different:
        return f"{start} The metagradient and TracIn's shares agree for all {len(named)}."
    cases = [f"{test} ({ours}, not {theirs})" for test, (ours, theirs) in different.items()]
    text = (
        f"{start} The metagradient and TracIn's shares disagree for {len(different)} of "
        f"{len(named)}: {listed(cases)}."
    )
    if actual is None:
        return f"{text} No retraining without a language decides between them (section `retrain`)."
    right = [
        test
        for test, (ours, theirs) in different.items()
        if actual.loc[test, ours] > actual.loc[test, theirs]
    ]
    return (
        f"{text} Retraining without each language agrees with the metagradient in {len(right)} of "
        f"these {len(different)}."
    )


def _most_helpful(matrix: pd.DataFrame, test: str) -> str:
    """Return the training language of the largest entry in a row, the language itself left out."""
    return str(matrix.loc[test].drop(test, errors="ignore").idxmax())
