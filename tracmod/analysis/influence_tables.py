"""Tables of influence: the strongest examples, shares by language, their course over the epochs."""

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
    """Collects the rankings of one model and view, one part of the test examples after the other.

    A view may use a different head mask for each language. Its test examples are then searched
    mask by mask: `add` is called for the test examples of every mask, and `write` joins the parts.
    """

    def __init__(
        self,
        train: pa.Table,
        test: pa.Table,
        predictions: Sequence[int],
        ks: Sequence[int] | None = None,
    ) -> None:
        """Create empty tables.

        Args:
            train, test: the examples, in the order of the features.
            predictions: (Q,) predicted label of every test example, under the mask of the view.
            ks: numbers of strongest training examples to count shares over, the main number first
                (numbers above the number of training examples are lowered to it). None counts over
                all examples that are passed to `add`.
        """
        self.train = train
        self.test = test
        self.predictions = np.asarray(predictions)
        self.ks = None if ks is None else list(dict.fromkeys(min(k, len(train)) for k in ks))
        self._examples: dict[int, list[pa.Table]] = {}  # k -> parts
        self._epoch_examples: dict[int, list[pa.Table]] = {}  # epoch -> parts
        self._null_shares: list[np.ndarray] = []
        self._top: list[pa.Table] = []

    def add(
        self,
        rows: Sequence[int],
        top: TopInfluences,
        left_out: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Add the influence over all checkpoints on some test examples.

        Args:
            rows: their rows in the test table.
            top: their rankings, at least as long as the largest of `ks` (or N), with groups.
            left_out: for each of `rows`, the training examples that `top` was computed without.
        """
        sizes_QG = None
        if left_out is not None:
            sizes_QG = remaining_sizes(self.train, left_out)
            self._null_shares.append(sizes_QG / sizes_QG.sum(axis=1, keepdims=True))
        for k in self.ks or [top.indices.shape[1]]:
            part = self._example_table(rows, first_places(top, k), sizes_QG)
            self._examples.setdefault(k, []).append(part)
        listed = first_places(top, max(self._examples))
        self._top.append(top_table(listed, self.test.take(rows), self.train))

    def add_epoch(self, epoch: int, rows: Sequence[int], top: TopInfluences) -> None:
        """Add the influence at one checkpoint alone; shares are counted over all of `top`."""
        self._epoch_examples.setdefault(epoch, []).append(self._example_table(rows, top))

    def write(self, folder: Path, *, bootstrap: int, confidence: float, seed: int) -> None:
        """Write the tables as Parquet files.

        The files are examples, languages and top; with `ks` also shares_by_k, and epochs if any
        were added.

        Args:
            folder: where to write.
            bootstrap, confidence, seed: see `bootstrap_mean`.
        """
        ids, groups = (self.test[name].to_pylist() for name in ("id", "group"))
        examples = {k: pa.concat_tables(parts) for k, parts in self._examples.items()}
        languages = {
            k: language_table(
                table,
                Counter(self.train.column("language").to_pylist()),
                clusters=dict(zip(ids, groups, strict=True)),
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
            by_epoch = {
                epoch: pa.concat_tables(parts)
                for epoch, parts in sorted(self._epoch_examples.items())
            }
            write_parquet(folder / "epochs.parquet", epoch_table(by_epoch))

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


def first_places(top: TopInfluences, k: int) -> TopInfluences:
    """Return the first k places of both rankings, with the sums but without the shares."""
    return TopInfluences(
        top.indices[:, :k],
        top.scores[:, :k],
        top.opponent_indices[:, :k],
        top.opponent_scores[:, :k],
        top.group_names,
        top.group_sums,
    )


def shares_by_k_table(languages: Mapping[int, pa.Table]) -> pa.Table:
    """Build `shares_by_k.parquet`: the shares of `languages.parquet`, with bounds, for every k.

    Args:
        languages: k -> table of `language_table`.
    """
    parts = []
    for k, table in sorted(languages.items()):
        names = [name for name in table.column_names if not name.startswith(("mean_", "num_"))]
        column = pa.array([k] * len(table), pa.int64())
        parts.append(table.select(names).add_column(0, "k", column))
    return pa.concat_tables(parts)


def self_influence_table(
    train: pa.Table, self_influence_N: Tensor, mask_language: str | None = None
) -> pa.Table:
    """Build `self_influence.parquet`: one row per training example, `sum_c w_c |g_c|^2`.

    Args:
        train: the N examples.
        self_influence_N: result of `influence.self_influence`.
        mask_language: language whose mask was applied to the model; None without such a mask.
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
    """Build `top.parquet`: one row per test example, sign and rank, where rank 1 is the strongest.

    Args:
        top: (Q, k) rankings. Positive scores mean that the training example lowered the loss.
        test: the Q test examples.
        train: all training examples.
    """
    k = top.indices.shape[1]
    sides = [(1, top.indices, top.scores), (-1, top.opponent_indices, top.opponent_scores)]
    test_rows = np.repeat(np.arange(len(test)), 2 * k)
    train_rows = np.stack([indices.cpu().numpy() for _, indices, _ in sides], axis=1).reshape(-1)
    scores = np.stack([scores.cpu().numpy() for _, _, scores in sides], axis=1).reshape(-1)
    signs = np.tile(np.repeat([1, -1], k), len(test)).astype(np.int8)
    return pa.table(
        {
            "test_id": test.column("id").take(test_rows),
            "test_language": test.column("language").take(test_rows),
            "sign": signs,
            "rank": np.tile(np.arange(1, k + 1), 2 * len(test)).astype(np.int32),
            "train_id": train.column("id").take(train_rows),
            "train_language": train.column("language").take(train_rows),
            "score": scores,
        }
    )
