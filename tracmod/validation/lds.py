"""The linear datamodelling score: do sums of influence predict the losses of retrained models?

    LDS(z) = Spearman over subsets S of ( sum_{i in S} score(z, i), -loss(z; trained on S) )

Source: Park et al. 2023 (TRAK), section 2; Ilyas et al. 2022 (datamodels).

Shape legend: Q test examples, S subsets, B draws of the bootstrap (the first is what was observed).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    ]
)
_BLOCK_NUMBERS = 1 << 22


@dataclass(frozen=True)
class Draws:
    """Bootstrap draws: how often each thing is drawn, first everything once.

    Attributes:
        tests_BQ: of test examples, whole parallel items together.
        others_BS: of subsets, or of retrainings; drawn independently of the test examples.
        confidence: of the percentile intervals.
    """

    tests_BQ: np.ndarray
    others_BS: np.ndarray
    confidence: float

    @staticmethod
    def of(clusters: Sequence[Any] | np.ndarray, others: int, resampling: Resampling) -> Draws:
        """Draw; `clusters` has the parallel item of each test example."""
        rng = np.random.default_rng(resampling.seed)
        _, cluster_of_Q = np.unique(np.asarray(clusters), return_inverse=True)
        items = _times_drawn(int(cluster_of_Q.max()) + 1, resampling.bootstrap, rng)
        return Draws(
            items[:, cluster_of_Q],
            _times_drawn(others, resampling.bootstrap, rng),
            resampling.confidence,
        )

    def interval(self, values_B: np.ndarray) -> dict[str, float]:
        """`value` as observed, `low` and `high`; draws without any value are left out."""
        tail = (1 - self.confidence) / 2
        drawn = values_B[1:][np.isfinite(values_B[1:])]
        low, high = np.quantile(drawn, [tail, 1 - tail]) if len(drawn) else [values_B[0]] * 2
        return {"value": float(values_B[0]), "low": float(low), "high": float(high)}


def _times_drawn(number: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(1 + draws, number) float64: ones, then how often each is drawn of `number` with return."""
    drawn = rng.multinomial(number, np.full(number, 1 / number), size=draws)
    return np.concatenate([np.ones((1, number)), drawn])


def weighted_mean(values_BQ: np.ndarray, weights_BQ: np.ndarray) -> np.ndarray:
    """(B,) means over the last axis; NaN where all weights are 0."""
    total = weights_BQ.sum(axis=-1)
    sums = (values_BQ * weights_BQ).sum(axis=-1)
    return np.where(total > 0, sums / np.where(total > 0, total, 1.0), np.nan)


def rank_correlation(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Spearman over the last axis, where each place counts `counts` times; ties have mean ranks.

    The same as of a sample in which every place is repeated so often. 0 where one side has no order
    at all.

    Args:
        x, y, counts: (..., S), of shapes that broadcast.
    """
    ranks_x, ranks_y = _ranks(x, counts), _ranks(y, counts)
    total = counts.sum(axis=-1, keepdims=True)
    ranks_x, ranks_y = (
        ranks - (counts * ranks).sum(axis=-1, keepdims=True) / total for ranks in (ranks_x, ranks_y)
    )
    product = (counts * ranks_x * ranks_y).sum(axis=-1)
    squares = (counts * ranks_x**2).sum(axis=-1) * (counts * ranks_y**2).sum(axis=-1)
    return np.where(squares > 1e-12, product / np.sqrt(np.where(squares > 1e-12, squares, 1)), 0.0)


def _ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean ranks but for a constant: how many are below, and half of those equal."""
    below = (values[..., None, :] < values[..., :, None]).astype(np.float64)
    below += 0.5 * (values[..., None, :] == values[..., :, None])
    return np.matmul(below, counts[..., :, None])[..., 0]


def lds_table(
    predicted: Mapping[str, np.ndarray],
    losses_QS: np.ndarray,
    languages_Q: Sequence[str],
    draws: Draws,
) -> pa.Table:
    """`lds.parquet`: `LDS_SCHEMA`, a row per method, level and language, and one of all.

    Level `example`: the mean of LDS(z) over test examples. Level `language`: the same Spearman of
    the *mean* loss over a language's test examples and the mean predicted effect on them, which is
    what the tables of influence between languages rest on; of all languages, the mean of theirs.
    `over_first`: the difference from the first method, null for that one itself. Its interval is of
    the same draws for both, so it tells them apart where their own intervals overlap.

    Args:
        predicted: method -> (Q, S) sums of its scores over each subset.
        losses_QS: loss of each test example after training on each subset.
        languages_Q: of the test examples.
        draws: over subsets and test examples, both drawn again.
    """
    rows = []
    first: dict[tuple[str, str | None], np.ndarray] = {}
    for method, predicted_QS in predicted.items():
        for level, of in (("example", _by_example), ("language", _by_language)):
            for language, values_B in of(predicted_QS, -losses_QS, languages_Q, draws):
                row: dict[str, Any] = {"method": method, "level": level, "test_language": language}
                row |= draws.interval(values_B)
                if (level, language) in first:
                    over = draws.interval(values_B - first[level, language])
                    row["over_first"] = over.pop("value")
                    row |= {f"over_first_{bound}": value for bound, value in over.items()}
                else:
                    first[level, language] = values_B
                rows.append(row)
    return pa.Table.from_pylist(rows, LDS_SCHEMA)


def _by_example(
    predicted_QS: np.ndarray, effect_QS: np.ndarray, languages_Q: Sequence[str], draws: Draws
) -> Iterator[tuple[str | None, np.ndarray]]:
    """(B,) mean LDS of all test examples (None) and of each language's."""
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


def _by_language(
    predicted_QS: np.ndarray, effect_QS: np.ndarray, languages_Q: Sequence[str], draws: Draws
) -> Iterator[tuple[str | None, np.ndarray]]:
    """(B,) Spearman of each language's means over the subsets, and their mean (None)."""
    found = {}
    size = max(1, _BLOCK_NUMBERS // draws.others_BS.shape[1] ** 2)
    for language, own_Q in by_language(languages_Q).items():
        weights_BQ = draws.tests_BQ[:, own_Q]
        # Sums order the subsets as means do, but for draws without an example of the language.
        sums = [weights_BQ @ values_QS[own_Q] for values_QS in (predicted_QS, effect_QS)]
        values_B = np.concatenate(
            [
                rank_correlation(
                    sums[0][start : start + size],
                    sums[1][start : start + size],
                    draws.others_BS[start : start + size],
                )
                for start in range(0, len(weights_BQ), size)
            ]
        )
        found[language] = np.where(weights_BQ.sum(axis=1) > 0, values_B, np.nan)
    yield None, np.mean(list(found.values()), axis=0)
    yield from found.items()


def by_language(languages_Q: Sequence[str]) -> dict[str, np.ndarray]:
    """Language -> places of its examples, in the order in which languages come."""
    names = np.asarray(languages_Q)
    return {language: np.flatnonzero(names == language) for language in dict.fromkeys(languages_Q)}
