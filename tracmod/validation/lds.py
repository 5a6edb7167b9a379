"""The linear datamodelling score: do sums of scores predict the losses of retrained models?

    LDS(z) = Spearman over subsets S of ( sum_{i in S} score(z, i), -loss(z; trained on S) )

Its intervals account for the choice of the subsets and, for the mean over single test examples, of
the test examples. Both are resampled at once: a draw of the bootstrap counts how often each is
drawn, and all statistics are computed with these counts as weights, for many draws in one array
operation. The mean loss of a language is one quantity: that of these test examples, for which a
metagradient is computed. Other test examples would be another quantity, so only subsets are
resampled there.

Source: Park et al. 2023 (TRAK), section 2; Ilyas et al. 2022 (datamodels).

Shape suffixes: Q test examples, S subsets, B draws of the bootstrap (the first is the observation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tracmod.analysis.statistics import Resampling

LDS_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("method", "level", "test_language")),
        *((name, pa.float64()) for name in ("value", "low", "high")),
        *((f"over_first{bound}", pa.float64()) for bound in ("", "_low", "_high")),
        *((f"pearson{bound}", pa.float64()) for bound in ("", "_low", "_high")),
    ]
)
_BLOCK_NUMBERS = 1 << 22
Correlation = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Draws:
    """Draws of a bootstrap as counts; in the first draw everything is drawn once.

    Attributes:
        tests_BQ: how often each test example is drawn; examples of a parallel item together.
        others_BS: how often each subset is drawn, independently of the test examples.
        confidence: coverage of the percentile intervals.
    """

    tests_BQ: np.ndarray
    others_BS: np.ndarray
    confidence: float

    @staticmethod
    def of(clusters: Sequence[Any] | np.ndarray, others: int, resampling: Resampling) -> Draws:
        """Draw test examples and subsets.

        Args:
            clusters: (Q,) parallel item of each test example.
            others: S.
            resampling: number of draws, coverage and seed.
        """
        rng = np.random.default_rng(resampling.seed)
        _, cluster_of_Q = np.unique(np.asarray(clusters), return_inverse=True)
        items = _times_drawn(int(cluster_of_Q.max()) + 1, resampling.bootstrap, rng)
        return Draws(
            items[:, cluster_of_Q],
            _times_drawn(others, resampling.bootstrap, rng),
            resampling.confidence,
        )

    def interval(self, values_B: np.ndarray) -> dict[str, float]:
        """Return the observed `value` with `low` and `high`; draws that are NaN are left out."""
        tail = (1 - self.confidence) / 2
        drawn = values_B[1:][np.isfinite(values_B[1:])]
        low, high = np.quantile(drawn, [tail, 1 - tail]) if len(drawn) else [values_B[0]] * 2
        return {"value": float(values_B[0]), "low": float(low), "high": float(high)}


def _times_drawn(number: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Return (1 + draws, number) counts of draws with replacement, of which the first are 1."""
    drawn = rng.multinomial(number, np.full(number, 1 / number), size=draws)
    return np.concatenate([np.ones((1, number)), drawn])


def weighted_mean(values_BQ: np.ndarray, weights_BQ: np.ndarray) -> np.ndarray:
    """Return (B,) weighted means over the last axis; NaN where all weights are 0."""
    total = weights_BQ.sum(axis=-1)
    sums = (values_BQ * weights_BQ).sum(axis=-1)
    return np.where(total > 0, sums / np.where(total > 0, total, 1.0), np.nan)


def rank_correlation(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Compute Spearman's correlation over the last axis, with counts as weights.

    The result is that of a sample in which each entry is repeated `counts` times. Ties have mean
    ranks. It is 0 where one side does not vary.

    Args:
        x, y, counts: (..., S) float, of shapes that can be broadcast.
    """
    ranks_x, ranks_y = _ranks(x, counts), _ranks(y, counts)
    total = counts.sum(axis=-1, keepdims=True)
    ranks_x, ranks_y = (
        ranks - (counts * ranks).sum(axis=-1, keepdims=True) / total for ranks in (ranks_x, ranks_y)
    )
    product = (counts * ranks_x * ranks_y).sum(axis=-1)
    squares = (counts * ranks_x**2).sum(axis=-1) * (counts * ranks_y**2).sum(axis=-1)
    return np.where(squares > 1e-12, product / np.sqrt(np.where(squares > 1e-12, squares, 1)), 0.0)


def linear_correlation(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Compute Pearson's correlation over the last axis, with counts as weights.

    It is 0 where one side does not vary.

    Args:
        x, y, counts: (..., S) float, of shapes that can be broadcast.
    """
    total = counts.sum(axis=-1, keepdims=True)
    x, y = (values - (counts * values).sum(axis=-1, keepdims=True) / total for values in (x, y))
    product = (counts * x * y).sum(axis=-1)
    squares = (counts * x**2).sum(axis=-1) * (counts * y**2).sum(axis=-1)
    return np.where(squares > 0, product / np.sqrt(np.where(squares > 0, squares, 1)), 0.0)


def _ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return mean ranks up to a constant: the count of lower entries plus half that of equal ones.

    All pairs of entries are compared. That costs S^2 operations but is the same for every draw of
    the bootstrap, whose counts then enter as one matrix product.
    """
    below = (values[..., None, :] < values[..., :, None]).astype(np.float64)
    below += 0.5 * (values[..., None, :] == values[..., :, None])
    return np.matmul(below, counts[..., :, None])[..., 0]


def lds_table(
    predicted: Mapping[str, np.ndarray],
    losses_QS: np.ndarray,
    languages_Q: Sequence[str],
    draws: Draws,
) -> pa.Table:
    """Build `lds.parquet`: one row per method, level and language, and one for all languages.

    At the level "example" the value is the mean of LDS(z) over test examples. At the level
    "language" it is the Spearman correlation of the *mean* loss over a language's test examples
    with the mean predicted effect on them, on which the tables of influence between languages rely;
    for all languages it is the mean of theirs, and only subsets are resampled. `pearson` is
    Pearson's correlation in place of Spearman's, at the level "language" only. `over_first` is the
    difference from the first method, null for the first method itself. Its interval uses the same
    draws for both methods, so it can separate methods whose own intervals overlap.

    Args:
        predicted: method -> (Q, S) sums of its scores over each subset.
        losses_QS: loss of each test example after training on each subset.
        languages_Q: language of each test example.
        draws: draws of subsets and test examples.

    Returns:
        A table with `LDS_SCHEMA`.
    """
    rows = []
    first: dict[tuple[str, str | None], np.ndarray] = {}
    for method, predicted_QS in predicted.items():
        for level, lds in (("example", _example_lds), ("language", _language_lds)):
            for language, values_B in lds(predicted_QS, -losses_QS, languages_Q, draws):
                row: dict[str, Any] = {"method": method, "level": level, "test_language": language}
                row |= draws.interval(values_B)
                if (level, language) in first:
                    over = draws.interval(values_B - first[level, language])
                    row["over_first"] = over.pop("value")
                    row |= {f"over_first_{bound}": value for bound, value in over.items()}
                else:
                    first[level, language] = values_B
                rows.append(row)
        pearson = _language_lds(predicted_QS, -losses_QS, languages_Q, draws, linear_correlation)
        for language, values_B in pearson:
            row = next(r for r in reversed(rows) if r["test_language"] == language)
            bounds = draws.interval(values_B)
            row["pearson"] = bounds.pop("value")
            row |= {f"pearson_{bound}": value for bound, value in bounds.items()}
    return pa.Table.from_pylist(rows, LDS_SCHEMA)


def _example_lds(
    predicted_QS: np.ndarray, effect_QS: np.ndarray, languages_Q: Sequence[str], draws: Draws
) -> Iterator[tuple[str | None, np.ndarray]]:
    """Yield (B,) mean LDS of all test examples (None), then of those of each language."""
    counts_B1S = draws.others_BS[:, None, :]
    size = max(1, _BLOCK_NUMBERS // draws.others_BS.size)
    lds_BQ = np.concatenate(
        [
            rank_correlation(
                predicted_QS[None, start : start + size],
                effect_QS[None, start : start + size],
                counts_B1S,
            )
            for start in range(0, len(predicted_QS), size)
        ],
        axis=1,
    )
    yield None, weighted_mean(lds_BQ, draws.tests_BQ)
    for language, own_Q in by_language(languages_Q).items():
        yield language, weighted_mean(lds_BQ[:, own_Q], draws.tests_BQ[:, own_Q])


def _language_lds(
    predicted_QS: np.ndarray,
    effect_QS: np.ndarray,
    languages_Q: Sequence[str],
    draws: Draws,
    correlation: Correlation = rank_correlation,
) -> Iterator[tuple[str | None, np.ndarray]]:
    """Yield (B,) mean over languages of the LDS of their means (None), then that of each."""
    lds_of = {}
    size = max(1, _BLOCK_NUMBERS // draws.others_BS.shape[1] ** 2)
    for language, own_Q in by_language(languages_Q).items():
        predicted_S, effect_S = (
            values_QS[own_Q].mean(axis=0) for values_QS in (predicted_QS, effect_QS)
        )
        lds_of[language] = np.concatenate(
            [
                correlation(predicted_S, effect_S, draws.others_BS[start : start + size])
                for start in range(0, len(draws.others_BS), size)
            ]
        )
    yield None, np.mean(list(lds_of.values()), axis=0)
    yield from lds_of.items()


def by_language(languages_Q: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the indices of each language's examples, languages in order of appearance."""
    names = np.asarray(languages_Q)
    return {language: np.flatnonzero(names == language) for language in dict.fromkeys(languages_Q)}
