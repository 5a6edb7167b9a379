"""Influence: TracIn scores from features or exactly, streaming top-k, sums by language.

    TracInCP(z, z') = sum_c w_c <g_c(z), g_c(z')>            (Pruthi et al. 2020)
    cosine form:      sum_c w_c cos(g_c(z), g_c(z'))         (Hammoudeh and Lowd 2022)

Positive: the training example lowered the query example's loss (a proponent). With dot products the
unit is loss; with cosine each checkpoint's term lies in [-w_c, w_c].

Shapes: Q queries, N training examples, K projection_dim, C checkpoints, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracmod.features.rows import Features, Rows, TensorRows, as_rows
from tracmod.features.store import FeatureStore
from tracmod.files.durable import identity_differences
from tracmod.influence.streaming import MEMORY, Search, search_rows

# Of one checkpoint, or of several.
OneOrMore = Features | Sequence[Features]


@dataclass(frozen=True)
class TopInfluences:
    """The k most positive and the k most negative training examples of every query.

    Attributes:
        indices, scores: (Q, k) proponents, highest score first.
        opponent_indices, opponent_scores: (Q, k) opponents, lowest score first.
        group_names: names of the G groups, None without groups.
        group_sums: (Q, G) float64 sum of the scores of *all* training examples of each group.
        group_shares: (Q, G) share of each group among the proponents; rows sum to 1.
        opponent_group_shares: (Q, G) the same among the opponents.
    """

    indices: Tensor
    scores: Tensor
    opponent_indices: Tensor
    opponent_scores: Tensor
    group_names: list[Any] | None = None
    group_sums: Tensor | None = None
    group_shares: Tensor | None = None
    opponent_group_shares: Tensor | None = None


def influence_scores(
    query_features: OneOrMore,
    train_features: OneOrMore,
    weights: Sequence[float] | None = None,
    normalize: str | None = None,
) -> Tensor:
    """The dense score matrix `sum_c w_c <q_c, t_c>`, or of cosines.

    Args:
        query_features: (Q, K), or one such per checkpoint: torch or numpy, of any float dtype
            (computed in float32, bfloat16 pairs as they are), or a `FeatureStore`.
        train_features: (N, K), or one such per checkpoint, likewise.
        weights: C numbers, usually the checkpoints' learning rates; None for 1 each.
        normalize: None or "cosine"; a zero gradient has cosine 0 with everything.

    Returns:
        (Q, N) float32. For large N use `top_influences`, which never stores it.

    Raises:
        ValueError: shapes, number of checkpoints or weights that do not agree.
    """
    queries, trains, weights = _checkpoints(query_features, train_features, weights, normalize)
    scores_QN = torch.zeros(queries[0].shape[0], trains[0].shape[0], device=_device(queries))
    for query, train, weight in zip(queries, trains, weights, strict=True):
        query_QK, train_NK = (rows.read(0, rows.shape[0]).float() for rows in (query, train))
        if normalize == "cosine":
            query_QK, train_NK = _unit(query_QK), _unit(train_NK)
        scores_QN.addmm_(query_QK, train_NK.T, alpha=weight)
    return scores_QN


def top_influences(
    query_features: OneOrMore,
    train_features: OneOrMore,
    k: int = 100,
    groups: Sequence[Any] | Tensor | None = None,
    weights: Sequence[float] | None = None,
    normalize: str | None = None,
    *,
    memory: int = MEMORY,
    progress: Path | None = None,
    device: torch.device | str | None = None,
    advance: Callable[[int], Any] | None = None,
    passes: int = 1,
    only: int | None = None,
) -> TopInfluences:
    """Strongest proponents and opponents of every query, and sums by group, in one streaming pass.

    Of features in stores, a block is read while the one before is scored; no number of training
    examples needs more memory, and neither `memory` nor an interruption changes the result.

    Args:
        query_features, train_features, weights, normalize: as in `influence_scores`.
        k: how many of each sign; lowered to N where there are fewer training examples. Where fewer
            than k scores are positive, the proponents go on with the least negative ones.
        groups: each training example's group, N values (a language, say); None for no sums.
        memory: bytes that rows from stores may take at a time, with rankings and buffers. Where
            not all queries fit, the training examples are passed over several times.
        progress: folder in which the work on stores is kept, so that the same call goes on where
            it was; to be removed when the results are safe. None: an interrupted call starts anew.
        device: where scores are computed; None for where the query features are (stores: the CPU).
        advance: called with the number of scores done; Q x N in all.
        passes: into how many blocks queries are cut at least, if there are enough: to share the
            work between processes that have `progress` in common.
        only: 0 to passes - 1: the share of the blocks that is worked on, and that the result is
            of; absent: all.

    Raises:
        ValueError: as in `influence_scores`, k below 1, not N groups, too little memory, or a store
            that is damaged.
    """
    queries, trains, weights = _checkpoints(query_features, train_features, weights, normalize)
    num_train = trains[0].shape[0]
    k = _bounded_k(k, num_train)
    on = _device(queries) if device is None else torch.device(device)
    names, groups_N = _group_ids(groups, num_train, on)
    search = Search(queries, trains, k, weights, normalize, groups_N, len(names or ()), on)
    top = search_rows(search, memory, progress, advance, passes, only)
    return _with_shares(
        top.scores, top.indices, top.opponent_scores, top.opponent_indices, names, groups_N,
        top.group_sums,
    )  # fmt: skip


def without_examples(
    top: TopInfluences,
    left_out: Sequence[Sequence[int]],
    query_features: OneOrMore,
    train_features: OneOrMore,
    k: int = 100,
    groups: Sequence[Any] | None = None,
    weights: Sequence[float] | None = None,
    normalize: str | None = None,
) -> TopInfluences:
    """What `top_influences` would find without some training examples, others for every query.

    No second pass: they are struck out of rankings that are long enough, and their scores, made
    directly, are taken from the sums.

    Args:
        top: `top_influences` of the same features, groups, weights and normalize, with at least
            k + the most that a query leaves out places (or all N).
        left_out: for each of the Q queries, rows of training examples.
        k: how many of each sign; lowered to the fewest training examples that a query has left.
        query_features, train_features, groups, weights, normalize: as in `top_influences`.

    Raises:
        ValueError: as in `top_influences`; not Q lists, a query left with no training example, or
            rankings that are too short.
    """
    queries, trains, weights = _checkpoints(query_features, train_features, weights, normalize)
    num_train, listed = trains[0].shape[0], top.indices.shape[1]
    if len(left_out) != queries[0].shape[0]:
        raise ValueError(f"left_out: expected {queries[0].shape[0]} lists, got {len(left_out)}")
    left_out = [sorted(set(rows)) for rows in left_out]
    most = max(map(len, left_out), default=0)
    k = _bounded_k(k, num_train - most)
    if listed < min(num_train, k + most):
        raise ValueError(f"top: expected at least {k + most} places a query, got {listed}")
    names, groups_N = _group_ids(groups, num_train, top.indices.device)
    places, opponent_places = (
        _places_left(indices, left_out)[:, :k] for indices in (top.indices, top.opponent_indices)
    )
    sums_QG = None
    if groups_N is not None and top.group_sums is not None:
        sums_QG = top.group_sums.clone()
        for query_rows, train_rows in _blocks_left_out(left_out):
            query_block = [one.take(query_rows) for one in queries]
            train_block = [one.take(train_rows) for one in trains]
            scores = influence_scores(query_block, train_block, weights, normalize)
            of_groups = torch.zeros_like(sums_QG[query_rows])
            of_groups.index_add_(1, groups_N[train_rows], scores.to(of_groups))
            sums_QG[query_rows] -= of_groups
    return _with_shares(
        top.scores.gather(1, places), top.indices.gather(1, places),
        top.opponent_scores.gather(1, opponent_places),
        top.opponent_indices.gather(1, opponent_places), names, groups_N, sums_QG,
    )  # fmt: skip


def _places_left(indices_QP: Tensor, left_out: Sequence[Sequence[int]]) -> Tensor:
    """(Q, P) the places of a ranking, those of examples that are left out moved to its end."""
    most = max(map(len, left_out), default=0)
    padded = [[*rows, *[-1] * (most - len(rows))] for rows in left_out]
    struck_Qm = torch.tensor(padded, dtype=indices_QP.dtype, device=indices_QP.device)
    struck_QP = (indices_QP[:, :, None] == struck_Qm.reshape(len(left_out), 1, most)).any(dim=2)
    return struck_QP.to(torch.int8).argsort(dim=1, stable=True)


def _blocks_left_out(left_out: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], list[int]]]:
    """Queries that leave out the same training examples, with these."""
    queries_of: dict[tuple[int, ...], list[int]] = {}
    for query, rows in enumerate(left_out):
        if rows:
            queries_of.setdefault(tuple(rows), []).append(query)
    for rows, query_rows in queries_of.items():
        yield query_rows, list(rows)


def self_influence(features: OneOrMore, weights: Sequence[float] | None = None) -> Tensor:
    """Influence of every example on itself, `sum_c w_c |g_c(z)|^2`, from its features' norms.

    High for examples that the model learnt by heart, mislabelled ones among them. The cosine form
    is the sum of the weights for all, so there is none.

    Args:
        features: (N, K), or one such per checkpoint, as in `influence_scores`.
        weights: C numbers; None for 1 each.

    Returns:
        (N,) float64, on the CPU.

    Raises:
        ValueError: checkpoints or weights that do not agree; a store that is damaged.

    Source: Pruthi et al. 2020, section 4.2.
    """
    several = _all_rows("features", features)
    counts = [one.shape[0] for one in several]
    if len(set(counts)) != 1:
        raise ValueError(f"features: expected as many rows at every checkpoint, got {counts}")
    total_N = torch.zeros(counts[0], dtype=torch.float64)
    for one, weight in zip(several, _weights(weights, len(several)), strict=True):
        total_N += weight * one.norms().double().square()
    return total_N


def top_of_scores(
    scores_QN: Tensor, k: int = 100, groups: Sequence[Any] | Tensor | None = None
) -> TopInfluences:
    """`top_influences` of scores that are already there, such as exact ones.

    Ties go to the lower index, as in `top_influences`.
    """
    k = _bounded_k(k, scores_QN.shape[1])
    names, groups_N = _group_ids(groups, scores_QN.shape[1], scores_QN.device)
    scores, indices = scores_QN.sort(dim=1, descending=True, stable=True)
    opponent_scores, opponent_indices = scores_QN.sort(dim=1, stable=True)
    sums_QG = None
    if groups_N is not None:
        sums_QG = torch.zeros(len(scores), len(names or ()), dtype=torch.float64).to(scores.device)
        sums_QG.index_add_(1, groups_N, scores_QN.double())
    return _with_shares(
        scores[:, :k], indices[:, :k], opponent_scores[:, :k], opponent_indices[:, :k], names,
        groups_N, sums_QG,
    )  # fmt: skip


def _unit(features: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return torch.where(norm > 0, features / norm, 0)


def _checkpoints(
    query_features: OneOrMore,
    train_features: OneOrMore,
    weights: Sequence[float] | None,
    normalize: str | None,
) -> tuple[list[Rows], list[Rows], list[float]]:
    queries = _all_rows("query_features", query_features)
    trains = _all_rows("train_features", train_features)
    _check_same_origin(query_features, train_features)
    if normalize not in (None, "cosine"):
        raise ValueError(f"normalize: expected None or 'cosine', got {normalize!r}")
    if not queries or len(queries) != len(trains):
        raise ValueError(
            f"features: expected as many checkpoints of queries as of training examples, at least "
            f"one, got {len(queries)} and {len(trains)}"
        )
    for name, features in (("query_features", queries), ("train_features", trains)):
        for checkpoint, one in enumerate(features):
            expected = (features[0].shape[0], queries[0].shape[1])
            if one.shape != expected:
                raise ValueError(
                    f"{name}: checkpoint {checkpoint}: expected shape {expected}, got {one.shape}"
                )
    return queries, trains, _weights(weights, len(queries))


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    values = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(values) != count:
        raise ValueError(f"weights: expected {count}, one per checkpoint, got {len(values)}")
    return values


def _several(features: OneOrMore) -> list[Features]:
    return list(features) if isinstance(features, Sequence) else [features]


def _all_rows(name: str, features: OneOrMore) -> list[Rows]:
    several = _several(features)
    for checkpoint, one in enumerate(several):
        if isinstance(one, Tensor | np.ndarray) and one.ndim != 2:
            raise ValueError(
                f"{name}: checkpoint {checkpoint}: expected rows x numbers, got shape "
                f"{tuple(one.shape)}"
            )
    return [as_rows(one) for one in several]


def _check_same_origin(query_features: OneOrMore, train_features: OneOrMore) -> None:
    """Refuse stores that were not made by the same model, projection, mask, ... as each other."""
    both = [
        list(one) if isinstance(one, Sequence) else [one]
        for one in (query_features, train_features)
    ]
    for checkpoint, (query, train) in enumerate(zip(*both, strict=False)):
        if isinstance(query, FeatureStore) and isinstance(train, FeatureStore):
            differing = identity_differences(train.identity, query.identity, ignore=["data"])
            if differing:
                raise ValueError(
                    f"query features {query.path} (checkpoint {checkpoint}) were made otherwise "
                    f"than the training features {train.path}: {'; '.join(differing)}"
                )


def _device(features: Sequence[Rows]) -> torch.device:
    first = features[0]
    return first.tensor.device if isinstance(first, TensorRows) else torch.device("cpu")


def _bounded_k(k: int, num_train: int) -> int:
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    if num_train < 1:
        raise ValueError("train_features: expected at least one training example, got none")
    return min(k, num_train)


def _group_ids(
    groups: Sequence[Any] | Tensor | None, num_train: int, device: torch.device
) -> tuple[list[Any] | None, Tensor | None]:
    """Distinct groups, sorted, and each training example's place among them."""
    if groups is None:
        return None, None
    values = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if len(values) != num_train:
        raise ValueError(
            f"groups: expected {num_train}, one per training example, got {len(values)}"
        )
    names = sorted(set(values))
    rank = {name: place for place, name in enumerate(names)}
    return names, torch.tensor([rank[value] for value in values], device=device)


def _with_shares(
    scores: Tensor,
    indices: Tensor,
    opponent_scores: Tensor,
    opponent_indices: Tensor,
    names: list[Any] | None,
    groups_N: Tensor | None,
    sums_QG: Tensor | None,
) -> TopInfluences:
    shares = opponent_shares = None
    if names is not None and groups_N is not None:
        shares = _shares(groups_N[indices], len(names))
        opponent_shares = _shares(groups_N[opponent_indices], len(names))
    return TopInfluences(
        indices, scores, opponent_indices, opponent_scores, names, sums_QG, shares, opponent_shares
    )


def _shares(groups_QK: Tensor, num_groups: int) -> Tensor:
    num_queries, k = groups_QK.shape
    first_of_Q = num_groups * torch.arange(num_queries, device=groups_QK.device)
    counts = (
        (groups_QK + first_of_Q[:, None]).flatten().bincount(minlength=num_queries * num_groups)
    )
    return counts.reshape(num_queries, num_groups).double() / k
