"""The tables of an influence computation: strongest examples, shares by language, their course."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch import Tensor

from tracmod.analysis.dynamics import epoch_table
from tracmod.analysis.languages import example_table, language_table
from tracmod.analysis.same_group import remaining_sizes
from tracmod.files.durable import write_parquet
from tracmod.influence.scores import TopInfluences


class InfluenceTables:
    """Tables of one model and view, filled mask by mask."""

    def __init__(
        self,
        train: pa.Table,
        test: pa.Table,
        predictions: Sequence[int],
        ks: Sequence[int] | None = None,
    ) -> None:
        """Begin the tables.

        Args:
            train, test: the examples, in the order of the features.
            predictions: (Q,) predicted label of every test example, under the view's mask.
            ks: over how many of the strongest training examples shares are counted, the main
                number first (one above the number of training examples counts as that);
                absent: over all that `add` is given.
        """
        self.train = train
        self.test = test
        self.predictions = np.asarray(predictions)
        self.ks = None if ks is None else list(dict.fromkeys(min(k, len(train)) for k in ks))
        self._examples: dict[int, list[pa.Table]] = {}
        self._null_shares: list[np.ndarray] = []
        self._epoch_examples: dict[int, list[pa.Table]] = {}
        self._top: list[pa.Table] = []

    def add(
        self,
        rows: Sequence[int],
        top: TopInfluences,
        left_out: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Influence over all checkpoints on the test examples `rows`.

        Args:
            rows: of the test table.
            top: at least as many strongest examples as the largest of `ks`, if there are so many.
            left_out: for each of `rows`, the training examples that `top` was made without.
        """
        sizes_QG = None
        if left_out is not None:
            sizes_QG = remaining_sizes(self.train, left_out)
            self._null_shares.append(sizes_QG / sizes_QG.sum(axis=1, keepdims=True))
        for k in self.ks or [top.indices.shape[1]]:
            table = self._example_table(rows, first(top, k), sizes_QG)
            self._examples.setdefault(k, []).append(table)
        listed = first(top, max(self._examples))
        self._top.append(top_table(listed, self.test.take(rows), self.train))

    def add_epoch(self, epoch: int, rows: Sequence[int], top: TopInfluences) -> None:
        """Influence of one checkpoint alone; the shares are of all that `top` lists."""
        self._epoch_examples.setdefault(epoch, []).append(self._example_table(rows, top))

    def write(self, folder: Path, *, bootstrap: int, confidence: float, seed: int) -> None:
        """Write examples, languages, top; shares_by_k with `ks`; epochs if they were added."""
        examples = {k: pa.concat_tables(tables) for k, tables in self._examples.items()}
        languages = {
            k: language_table(
                table,
                Counter(self.train.column("language").to_pylist()),
                clusters=self._clusters(),
                bootstrap=bootstrap,
                confidence=confidence,
                seed=seed,
                null_shares=np.concatenate(self._null_shares) if self._null_shares else None,
            )
            for k, table in examples.items()
        }
        main_k = next(iter(examples))
        write_parquet(folder / "examples.parquet", examples[main_k])
        write_parquet(folder / "languages.parquet", languages[main_k])
        write_parquet(folder / "top.parquet", pa.concat_tables(self._top))
        if self.ks is not None:
            write_parquet(folder / "shares_by_k.parquet", shares_by_k_table(languages))
        if self._epoch_examples:
            by_epoch = {e: pa.concat_tables(t) for e, t in sorted(self._epoch_examples.items())}
            write_parquet(folder / "epochs.parquet", epoch_table(by_epoch))

    def _clusters(self) -> dict[str, str]:
        columns = (self.test.column(name).to_pylist() for name in ("id", "group"))
        return dict(zip(*columns, strict=True))

    def _example_table(
        self, rows: Sequence[int], top: TopInfluences, group_sizes: np.ndarray | None = None
    ) -> pa.Table:
        test = self.test.take(rows)
        assert top.group_sums is not None
        assert top.group_names is not None
        return example_table(
            top.indices.cpu().numpy(),
            top.opponent_indices.cpu().numpy(),
            top.group_sums.cpu().numpy(),
            languages=top.group_names,
            train_languages=self.train.column("language").to_pylist(),
            test_ids=test.column("id").to_pylist(),
            test_languages=test.column("language").to_pylist(),
            test_labels=test.column("label").to_pylist(),
            test_predictions=self.predictions[rows].tolist(),
            group_sizes=group_sizes,
        )


def first(top: TopInfluences, k: int) -> TopInfluences:
    """The k strongest of each sign; sums stay, the shares are left to the tables."""
    return TopInfluences(
        top.indices[:, :k],
        top.scores[:, :k],
        top.opponent_indices[:, :k],
        top.opponent_scores[:, :k],
        top.group_names,
        top.group_sums,
    )


def shares_by_k_table(languages: Mapping[int, pa.Table]) -> pa.Table:
    """`shares_by_k.parquet`: the shares of `languages.parquet`, with bounds, for every k."""
    parts = []
    for k, table in sorted(languages.items()):
        chosen = [name for name in table.column_names if not name.startswith(("mean_", "num_"))]
        column = pa.array([k] * len(table), pa.int64())
        parts.append(table.select(chosen).add_column(0, "k", column))
    return pa.concat_tables(parts)


def self_influence_table(
    train: pa.Table, self_influence_N: Tensor, mask_language: str | None = None
) -> pa.Table:
    """`self_influence.parquet`: a row per training example, `sum_c w_c |g_c|^2`.

    Args:
        train: the examples.
        self_influence_N: from `influence.self_influence`.
        mask_language: whose mask the gradients are under; None: no language's.
    """
    return pa.table(
        {
            "train_id": train.column("id"),
            "train_language": train.column("language"),
            "mask_language": pa.array([mask_language] * len(train), pa.string()),
            "self_influence": self_influence_N.numpy(),
        }
    )


def top_table(top: TopInfluences, test: pa.Table, train: pa.Table) -> pa.Table:
    """`top.parquet`: a row per test example, sign and rank, rank 1 the strongest.

    Positive scores: the training example lowered the test example's loss.
    """
    k = top.indices.shape[1]
    sides = [(1, top.indices, top.scores), (-1, top.opponent_indices, top.opponent_scores)]
    rows = np.repeat(np.arange(len(test)), 2 * k)
    picked = np.stack([indices.cpu().numpy() for _, indices, _ in sides], axis=1).reshape(-1)
    scores = np.stack([scores.cpu().numpy() for _, _, scores in sides], axis=1).reshape(-1)
    signs = np.tile(np.repeat([1, -1], k), len(test)).astype(np.int8)
    return pa.table(
        {
            "test_id": test.column("id").take(rows),
            "test_language": test.column("language").take(rows),
            "sign": signs,
            "rank": np.tile(np.arange(1, k + 1), 2 * len(test)).astype(np.int32),
            "train_id": train.column("id").take(picked),
            "train_language": train.column("language").take(picked),
            "score": scores,
        }
    )
