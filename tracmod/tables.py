"""The tables of an influence computation: strongest examples, shares by language, their course."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from tracmod.analysis.dynamics import epoch_table
from tracmod.analysis.languages import example_table, language_table
from tracmod.durable import write_parquet
from tracmod.influence import TopInfluences


class InfluenceTables:
    """Tables of one model and view, filled mask by mask."""

    def __init__(self, train: pa.Table, test: pa.Table, predictions: Sequence[int]) -> None:
        """Begin the tables.

        Args:
            train, test: the examples, in the order of the features.
            predictions: (Q,) predicted label of every test example, under the view's mask.
        """
        self.train = train
        self.test = test
        self.predictions = np.asarray(predictions)
        self._examples: list[pa.Table] = []
        self._epoch_examples: dict[int, list[pa.Table]] = {}
        self._top: list[pa.Table] = []

    def add(self, rows: Sequence[int], top: TopInfluences) -> None:
        """Influence over all checkpoints on the test examples `rows`."""
        self._examples.append(self._example_table(rows, top))
        self._top.append(top_table(top, self.test.take(rows), self.train))

    def add_epoch(self, epoch: int, rows: Sequence[int], top: TopInfluences) -> None:
        """Influence of one checkpoint alone."""
        self._epoch_examples.setdefault(epoch, []).append(self._example_table(rows, top))

    def write(self, folder: Path, *, bootstrap: int, confidence: float, seed: int) -> None:
        """Write examples, languages, top and, if epochs were added, epochs.parquet."""
        examples = pa.concat_tables(self._examples)
        languages = language_table(
            examples,
            Counter(self.train.column("language").to_pylist()),
            clusters=self._clusters(),
            bootstrap=bootstrap,
            confidence=confidence,
            seed=seed,
        )
        write_parquet(folder / "examples.parquet", examples)
        write_parquet(folder / "languages.parquet", languages)
        write_parquet(folder / "top.parquet", pa.concat_tables(self._top))
        if self._epoch_examples:
            by_epoch = {e: pa.concat_tables(t) for e, t in sorted(self._epoch_examples.items())}
            write_parquet(folder / "epochs.parquet", epoch_table(by_epoch))

    def _clusters(self) -> dict[str, str]:
        columns = (self.test.column(name).to_pylist() for name in ("id", "group"))
        return dict(zip(*columns, strict=True))

    def _example_table(self, rows: Sequence[int], top: TopInfluences) -> pa.Table:
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
