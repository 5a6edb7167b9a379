"""Influence scores from features: dense, the strongest per query, sums by group, self-influence.

    TracInCP(z, z') = sum_c w_c <g_c(z), g_c(z')>            (Pruthi et al. 2020)
    cosine form:      sum_c w_c cos(g_c(z), g_c(z'))         (Hammoudeh and Lowd 2022)

A positive score means that the training example lowered the loss of the query example (a
proponent), a negative score that it raised it (an opponent). With inner products the unit is that
of the loss; with cosines the term of each checkpoint lies in [-w_c, w_c].

Features may be tensors, arrays or stores on disk, of one checkpoint or of several. This module
checks them and the options; `streaming` does the search, and results are completed here with the
names and shares of groups.

Shape suffixes: Q queries, N training examples, K projection_dim, C checkpoints, G groups, P places
of a ranking, L examples left out by a query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracmod.choices import DEFAULT_MEMORY, is_real, switch, whole_number
from tracmod.features.rows import (
    Features,
    Rows,
    TensorRows,
    as_rows,
    extreme_exponents,
    scaled_rows,
)
from tracmod.features.store import FeatureStore
from tracmod.files.durable import identity_differences
from tracmod.influence.streaming import Search, check_scores, query_exponents, search_rows
from tracmod.models.modes import checked_device

# Features at one checkpoint, or at several.
OneOrMore = Features | Sequence[Features]


@dataclass(frozen=True)
class TopInfluences:
    """The k most positive and the k most negative training examples of every query.

    Equal scores are ranked by the number of the training example, lower first.

    Attributes:
        indices: (Q, k) int64, training examples of the proponents, highest score first.
        scores: (Q, k) float32, their scores.
        opponent_indices: (Q, k) int64, training examples of the opponents, lowest score first;
            (Q, 0) if opponents were not asked for.
        opponent_scores: (Q, k) float32, their scores, or (Q, 0).
        group_names: names of the G groups, sorted; None without groups, like the fields below.
        group_sums: (Q, G) float64, sum of the scores of *all* training examples of each group.
        group_shares: (Q, G) float64, share of each group among the proponents; rows sum to 1.
        opponent_group_shares: (Q, G) float64, the same among the opponents; None without them.
    """

    indices: Tensor
    scores: Tensor
    opponent_indices: Tensor
    opponent_scores: Tensor
    group_names: list[Any] | None = None
    group_sums: Tensor | None = None
    group_shares: Tensor | None = None
    opponent_group_shares: Tensor | None = None


# --- scores ----------------------------------------------------------------------------------


def influence_scores(
    query_features: OneOrMore,
    train_features: OneOrMore,
    weights: Sequence[float] | None = None,
    normalize: str | None = None,
) -> Tensor:
    """Compute the score of every query with every training example.

    `score[q, n] = sum_c weights[c] <query_c[q], train_c[n]>`, or with cosines in place of inner
    products.

    Args:
        query_features: (Q, K) features, or a sequence of these with one entry per checkpoint.
            Tensors and NumPy arrays of any float dtype, or a `FeatureStore`.
        train_features: (N, K) features, or a sequence of these, likewise.
        weights: C weights of the checkpoints, usually their learning rates; None for 1 each.
        normalize: None for inner products or "cosine". A zero gradient has cosine 0 with
            everything.

    Returns:
        (Q, N) float32, on the device of the query features. For large N use `top_influences`,
        which never holds all scores.

    Raises:
        ValueError: shapes, number of checkpoints or weights do not agree, or two stores were made
            with different models, projections or masks.

    Source: Pruthi et al. 2020, arXiv 2002.08484, section 3 (TracInCP); Hammoudeh and Lowd 2022,
        arXiv 2201.10600 (cosine).

    Examples:
        Two queries and three training examples at two checkpoints, weighted by learning rates:

        >>> import torch
        >>> import tracmod as tm
        >>> query = [torch.tensor([[1.0, 0.0], [0.0, 1.0]])] * 2
        >>> train = [torch.tensor([[2.0, 1.0], [0.0, -1.0], [0.0, 0.0]])] * 2
        >>> tm.influence_scores(query, train, weights=[0.5, 0.25])
        tensor([[ 1.5000,  0.0000,  0.0000],
                [ 0.7500, -0.7500,  0.0000]])
    """
    queries, trains, weights = _checked(query_features, train_features, weights, normalize)
    num_queries, num_train = queries[0].shape[0], trains[0].shape[0]
    scores_QN = torch.zeros(num_queries, num_train, device=_device(queries))
    exponents = query_exponents(queries, 0, num_queries, normalize)
    for query, train, weight, query_exponent in zip(
        queries, trains, weights, exponents, strict=True
    ):
        query_QK, train_NK = (rows.read(0, rows.shape[0]).float() for rows in (query, train))
        query_QK = scaled_rows(query_QK, query_exponent)
        if normalize == "cosine":
            train_exponent = extreme_exponents(train.magnitudes(0, num_train))
            query_QK, train_NK = _unit(query_QK), _unit(scaled_rows(train_NK, train_exponent))
        scores_QN.addmm_(query_QK, train_NK.T, alpha=weight)
    if not scores_QN.numel():
        return scores_QN
    computed_Q = scores_QN.abs().amax(dim=1)
    if normalize != "cosine" and exponents[0] is not None:
        factors_Q1 = torch.exp2(exponents[0])[:, None].to(scores_QN.device)
        scores_QN = (scores_QN * factors_Q1).float()
    search = Search(queries, trains, 1, weights, normalize, None, 0, scores_QN.device)
    check_scores(search, 0, computed_Q, scores_QN, scores_QN)
    return scores_QN


def _unit(features: Tensor) -> Tensor:
    """Divide rows of a magnitude that is not extreme by their norms; rows of zeros stay zero."""
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return torch.where(norm > 0, features / norm, 0)


def top_influences(
    query_features: OneOrMore,
    train_features: OneOrMore,
    k: int = 100,
    groups: Sequence[Any] | Tensor | None = None,
    weights: Sequence[float] | None = None,
    normalize: str | None = None,
    *,
    memory: int = DEFAULT_MEMORY,
    progress: Path | None = None,
    device: torch.device | str | None = None,
    advance: Callable[[int], Any] | None = None,
    parts: int = 1,
    part: int | None = None,
    opponents: bool = True,
) -> TopInfluences:
    """Find the strongest proponents and opponents of every query, and sum scores by group.

    The score is that of `influence_scores`, but the score matrix is never stored: training
    features stream past the queries in blocks, see `tracmod.influence.streaming`. Features in
    stores need bounded memory, whatever their number, and neither `memory` nor an interruption
    changes a bit of the result.

    Args:
        query_features: (Q, K) features, or one such entry per checkpoint, as in
            `influence_scores`. bfloat16 on both sides is multiplied as it is, any other dtype in
            float32.
        train_features: (N, K) features, or one such entry per checkpoint.
        k: length of each ranking; at most N are returned. Where fewer than k scores are positive,
            the proponents continue with the least negative ones.
        groups: N values, the group of each training example, such as its language; None for no
            sums and shares.
        weights: C weights of the checkpoints; None for 1 each.
        normalize: None or "cosine".
        memory: bytes that features from stores may take, with rankings and buffers. Where not all
            queries fit at once, the training features are read several times.
        progress: folder for intermediate results of a search in stores, from which the same call
            resumes after an interruption. Remove it once the results are safe. None starts an
            interrupted call again from the beginning.
        device: where scores are computed; None for the device of the query features (for stores
            the CPU).
        advance: called with the number of scores just computed; Q x N in total.
        parts: minimum number of blocks of queries, fewer if there are too few queries, so that
            several processes with the same `progress` can share the work.
        part: from 0 to parts - 1: the part of the blocks to search and return; None for all.
        opponents: False to rank proponents only, in less time and memory. The proponents are the
            same bit for bit.

    Returns:
        Rankings (Q, k) and, with groups, sums and shares (Q, G); see `TopInfluences`.

    Raises:
        ValueError: as in `influence_scores`; k is below 1, `groups` does not have N entries, there
            is too little memory, or a store is damaged.

    Source: Pruthi et al. 2020, arXiv 2002.08484, section 3 (TracInCP); Hammoudeh and Lowd 2022,
        arXiv 2201.10600 (cosine).

    Examples:
        >>> import torch
        >>> import tracmod as tm
        >>> query = torch.tensor([[1.0, 0.0]])
        >>> train = torch.tensor([[2.0, 1.0], [-1.0, 0.0], [0.0, 3.0], [0.5, 0.5]])
        >>> top = tm.top_influences(query, train, k=2, groups=["en", "de", "en", "de"])
        >>> top.indices, top.scores
        (tensor([[0, 3]]), tensor([[2.0000, 0.5000]]))
        >>> top.opponent_indices, top.opponent_scores
        (tensor([[1, 2]]), tensor([[-1.,  0.]]))
        >>> top.group_names
        ['de', 'en']
        >>> top.group_sums
        tensor([[-0.5000,  2.0000]], dtype=torch.float64)
        >>> top.group_shares
        tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """
    memory, parts = whole_number("memory", memory), whole_number("parts", parts)
    opponents = switch("opponents", opponents)
    part = None if part is None else whole_number("part", part, 0, parts - 1)
    queries, trains, weights = _checked(query_features, train_features, weights, normalize)
    num_train = trains[0].shape[0]
    k = _bounded_k(k, num_train)
    device = _device(queries) if device is None else checked_device(device)
    names, groups_N = _number_groups(groups, num_train, device)
    search = Search(
        queries, trains, k, weights, normalize, groups_N, len(names or ()), device, opponents
    )
    top = search_rows(search, memory, progress, advance, parts, part)
    opponents_k = k if opponents else 0
    return _with_shares(
        top.scores, top.indices, top.opponent_scores[:, :opponents_k],
        top.opponent_indices[:, :opponents_k], names, groups_N, top.group_sums,
    )  # fmt: skip


def top_of_scores(
    scores_QN: Tensor,
    k: int = 100,
    groups: Sequence[Any] | Tensor | None = None,
    *,
    opponents: bool = True,
) -> TopInfluences:
    """Rank scores that have been computed already, such as those of `exact_influence`.

    With `influence_scores`, it gives the dense scores and the rankings from one computation.

    Args:
        scores_QN: (Q, N) scores.
        k, groups, opponents: as in `top_influences`.

    Returns:
        What `top_influences` would return for these scores, ties included.

    Raises:
        ValueError: k is below 1, there is no training example, or `groups` does not have N
            entries.

    Examples:
        >>> import torch
        >>> import tracmod as tm
        >>> scores = torch.tensor([[2.0, -1.0, 0.0, 0.5]])
        >>> top = tm.top_of_scores(scores, k=2, opponents=False)
        >>> top.indices, top.scores
        (tensor([[0, 3]]), tensor([[2.0000, 0.5000]]))
        >>> top.opponent_indices.shape
        torch.Size([1, 0])
    """
    opponents = switch("opponents", opponents)
    k = _bounded_k(k, scores_QN.shape[1])
    names, groups_N = _number_groups(groups, scores_QN.shape[1], scores_QN.device)
    # Stable sorts keep equal scores in the order of their indices.
    scores, indices = scores_QN.sort(dim=1, descending=True, stable=True)
    opponent_scores, opponent_indices = scores_QN[:, :0], indices[:, :0]
    if opponents:
        opponent_scores, opponent_indices = scores_QN.sort(dim=1, stable=True)
    sums_QG = None
    if groups_N is not None:
        sums_QG = torch.zeros(len(scores), len(names or ()), dtype=torch.float64).to(scores.device)
        sums_QG.index_add_(1, groups_N, scores_QN.double())
    return _with_shares(
        scores[:, :k], indices[:, :k], opponent_scores[:, :k], opponent_indices[:, :k], names,
        groups_N, sums_QG,
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
    """Return what `top_influences` would find if each query left out some training examples.

    No second search is needed. The examples are removed from rankings that are long enough to
    still have k places without them, and their scores, computed directly, are subtracted from the
    sums.

    Args:
        top: result of `top_influences` for the same features, groups, weights and normalize, with
            at least k + (the most examples that a query leaves out) places, or N.
        left_out: for each of the Q queries the rows of the training examples to leave out.
        k: length of each ranking, lowered to the fewest training examples that a query has left.
        query_features, train_features, groups, weights, normalize: as in `top_influences`.

    Returns:
        Rankings (Q, k), and with groups the sums and shares of the remaining training examples.

    Raises:
        ValueError: as in `top_influences`; `left_out` does not have Q entries, a query has no
            training example left, or the rankings of `top` are too short.
    """
    queries, trains, weights = _checked(query_features, train_features, weights, normalize)
    num_train, listed = trains[0].shape[0], top.indices.shape[1]
    if len(left_out) != queries[0].shape[0]:
        raise ValueError(f"left_out: expected {queries[0].shape[0]} lists, got {len(left_out)}")
    left_out = [sorted(set(rows)) for rows in left_out]
    most = max(map(len, left_out), default=0)
    k = _bounded_k(k, num_train - most)
    if listed < min(num_train, k + most):
        raise ValueError(f"top: expected rankings of at least {k + most} places, got {listed}")
    names, groups_N = _number_groups(groups, num_train, top.indices.device)
    places, opponent_places = (
        _remaining_places(indices, left_out)[:, :k]
        for indices in (top.indices, top.opponent_indices)
    )
    sums_QG = None
    if groups_N is not None and top.group_sums is not None:
        sums_QG = top.group_sums.clone()
        for train_rows, query_rows in _queries_by_left_out(left_out):
            query_block = [rows.take(query_rows) for rows in queries]
            train_block = [rows.take(train_rows) for rows in trains]
            scores = influence_scores(query_block, train_block, weights, normalize)
            subtracted_QG = torch.zeros_like(sums_QG[query_rows])
            subtracted_QG.index_add_(1, groups_N[train_rows], scores.to(subtracted_QG))
            sums_QG[query_rows] -= subtracted_QG
    return _with_shares(
        top.scores.gather(1, places), top.indices.gather(1, places),
        top.opponent_scores.gather(1, opponent_places),
        top.opponent_indices.gather(1, opponent_places), names, groups_N, sums_QG,
    )  # fmt: skip


def _remaining_places(indices_QP: Tensor, left_out: Sequence[Sequence[int]]) -> Tensor:
    """Return the (Q, P) places of each ranking, those of examples that are left out last."""
    most = max(map(len, left_out), default=0)
    padded = [[*rows, *[-1] * (most - len(rows))] for rows in left_out]
    left_out_QL = torch.tensor(padded, dtype=indices_QP.dtype, device=indices_QP.device)
    left_out_Q1L = left_out_QL.reshape(len(left_out), 1, most)
    is_left_out_QP = (indices_QP[:, :, None] == left_out_Q1L).any(dim=2)
    return is_left_out_QP.to(torch.int8).argsort(dim=1, stable=True)


def _queries_by_left_out(left_out: Sequence[Sequence[int]]) -> list[tuple[list[int], list[int]]]:
    """Return each distinct list of training examples, with the queries that leave it out.

    Queries of one parallel group leave out the same examples, so their scores are one product.
    """
    queries_of: dict[tuple[int, ...], list[int]] = {}
    for query, rows in enumerate(left_out):
        if rows:
            queries_of.setdefault(tuple(rows), []).append(query)
    return [(list(rows), queries) for rows, queries in queries_of.items()]


def self_influence(features: OneOrMore, weights: Sequence[float] | None = None) -> Tensor:
    """Compute the influence of every example on itself, `sum_c weights[c] |g_c(z)|^2`.

    It is high for examples that the model had to memorise, mislabelled ones among them. There is
    no cosine form: it would be the sum of the weights for every example.

    Args:
        features: (N, K) features, or a sequence of these with one entry per checkpoint, as in
            `influence_scores`.
        weights: C weights of the checkpoints; None for 1 each.

    Returns:
        (N,) float64, on the CPU.

    Raises:
        ValueError: checkpoints or weights do not agree, or a store is damaged.

    Source: Pruthi et al. 2020, arXiv 2002.08484, section 4.2.

    Examples:
        >>> import torch
        >>> import tracmod as tm
        >>> tm.self_influence(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), weights=[0.5])
        tensor([12.5000,  0.5000], dtype=torch.float64)
    """
    checkpoints = _as_rows("features", features)
    counts = [rows.shape[0] for rows in checkpoints]
    if len(set(counts)) != 1:
        raise ValueError(f"features: expected as many rows at every checkpoint, got {counts}")
    weights = checkpoint_weights(weights, len(checkpoints))
    total_N = torch.zeros(counts[0], dtype=torch.float64)
    for rows, weight in zip(checkpoints, weights, strict=True):
        total_N += weight * rows.norms().double().square()
    return total_N


# --- checks ----------------------------------------------------------------------------------


def _checked(
    query_features: OneOrMore,
    train_features: OneOrMore,
    weights: Sequence[float] | None,
    normalize: str | None,
) -> tuple[list[Rows], list[Rows], list[float]]:
    """Return queries, training examples and weights of the C checkpoints.

    Raises:
        ValueError: they do not fit together.
    """
    queries = _as_rows("query_features", query_features)
    trains = _as_rows("train_features", train_features)
    _check_same_origin(query_features, train_features)
    if normalize not in (None, "cosine"):
        raise ValueError(f"normalize: expected None or 'cosine', got {normalize!r}")
    if not queries or len(queries) != len(trains):
        raise ValueError(
            f"query_features and train_features: expected the same number of checkpoints, at least "
            f"1, got {len(queries)} and {len(trains)}"
        )
    for name, checkpoints in (("query_features", queries), ("train_features", trains)):
        expected = (checkpoints[0].shape[0], queries[0].shape[1])
        for number, rows in enumerate(checkpoints):
            if rows.shape != expected:
                raise ValueError(
                    f"{name}: checkpoint {number}: expected shape {expected}, got {rows.shape}"
                )
    return queries, trains, checkpoint_weights(weights, len(queries))


def checkpoint_weights(weights: Sequence[float] | None, num_checkpoints: int) -> list[float]:
    """Return the weights of the checkpoints, 1 each by default.

    Raises:
        ValueError: not one per checkpoint; one is not a number from 0 to the largest float32; or
            all are 0 (or so small that they are 0 in float32), which would make every score 0.
    """
    if weights is None:
        return [1.0] * num_checkpoints
    # Numbers of torch and NumPy become Python's.
    numbers = [
        x.item() if hasattr(x, "item") else x for x in _as_values("weights", weights, "numbers")
    ]
    if not all(map(is_real, numbers)) or (not numbers and num_checkpoints):
        raise ValueError(f"weights: expected a list of numbers, got {weights!r}")
    values = [float(number) for number in numbers]
    if len(values) != num_checkpoints:
        raise ValueError(
            f"weights: expected {num_checkpoints}, one per checkpoint, got {len(values)}"
        )
    limits = torch.finfo(torch.float32)
    for value in values:
        if not 0 <= value <= limits.max:
            raise ValueError(
                f"weights: expected finite numbers of at least 0, got {value} in {values}"
            )
    if values and max(values) < limits.tiny:
        raise ValueError(
            f"weights: expected a weight above 0 at one checkpoint or more, got {values}: every "
            f"score would be 0"
        )
    return values


def _as_values(name: str, values: Any, kind: str) -> list[Any]:
    """Return the values of a list, tensor, array, series or column.

    Raises:
        ValueError: they have no order (a set), would be the keys of a dict (steps in place of their
            rates) or the letters of a text, or there is only one.
    """
    for method in ("to_pylist", "tolist"):  # of pyarrow; of torch, NumPy and pandas
        if hasattr(values, method):
            return _as_values(name, getattr(values, method)(), kind)
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        raise ValueError(f"{name}: expected a list of {kind}, got {values!r}")
    return list(values)


def _as_list(features: OneOrMore) -> list[Features]:
    """Return the features of each checkpoint."""
    return list(features) if isinstance(features, Sequence) else [features]


def _as_rows(name: str, features: OneOrMore) -> list[Rows]:
    """Return the rows of each checkpoint.

    Raises:
        ValueError: they are no features, not two-dimensional, or a row is not finite in float32.
            Rows of stores were checked when they were written.
    """
    return [
        _checked_rows(f"{name}: checkpoint {number}", checkpoint)
        for number, checkpoint in enumerate(_as_list(features))
    ]


def _checked_rows(where: str, features: Features) -> Rows:
    """Return the rows of one checkpoint; see `_as_rows`."""
    if isinstance(features, np.ndarray) and features.dtype.kind == "f":
        features = torch.as_tensor(np.ascontiguousarray(features))
    if not isinstance(features, Tensor):
        if not isinstance(features, FeatureStore) and not hasattr(features, "magnitudes"):
            of_dtype = f" of {features.dtype}" if isinstance(features, np.ndarray) else ""
            raise ValueError(
                f"{where}: expected a tensor or array of floating-point numbers or a "
                f"FeatureStore, got {type(features).__name__}{of_dtype}"
            )
        return as_rows(features)
    if not features.is_floating_point():
        raise ValueError(f"{where}: expected floating-point numbers, got {features.dtype}")
    if features.ndim != 2 or not features.shape[1]:
        raise ValueError(
            f"{where}: expected two dimensions (rows, numbers), got shape {tuple(features.shape)}"
        )
    # A sum is not finite if a number is not, and costs one fast read. Sums of huge numbers may
    # overflow too, so the numbers of such rows are looked at.
    for row in features.sum(dim=1).isfinite().logical_not().nonzero().flatten().tolist():
        if not bool(features[row].isfinite().all()):
            raise ValueError(f"{where}: row {row}: expected finite numbers, got NaN or infinity")
    if features.dtype == torch.float64:
        limits = torch.finfo(torch.float32)
        largest_N = features.abs().amax(dim=1)
        outside_N = (largest_N > limits.max) | ((largest_N < limits.tiny) & (largest_N > 0))
        for row in outside_N.nonzero().flatten().tolist():
            raise ValueError(
                f"{where}: row {row}: expected numbers of which the largest is between "
                f"{limits.tiny:.1e} and {limits.max:.1e} (float32), got {largest_N[row]:.1e}; "
                f"multiply the features by a constant"
            )
    return as_rows(features)


def _check_same_origin(query_features: OneOrMore, train_features: OneOrMore) -> None:
    """Check that both stores of a checkpoint come from the same model, projection and mask.

    Raises:
        ValueError: they do not; the message says in what they differ.
    """
    pairs = zip(_as_list(query_features), _as_list(train_features), strict=False)
    for number, (query, train) in enumerate(pairs):
        if isinstance(query, FeatureStore) and isinstance(train, FeatureStore):
            differing = identity_differences(train.identity, query.identity, ignore=["data"])
            if differing:
                raise ValueError(
                    f"query features {query.path} (checkpoint {number}) do not match the training "
                    f"features {train.path}: {'; '.join(differing)}"
                )


def _device(features: Sequence[Rows]) -> torch.device:
    """Return the device of tensors, and the CPU for rows on disk."""
    first = features[0]
    return first.tensor.device if isinstance(first, TensorRows) else torch.device("cpu")


def _bounded_k(k: int, num_train: int) -> int:
    k = whole_number("k", k)
    if num_train < 1:
        raise ValueError("train_features: expected at least 1 training example, got none")
    return min(k, num_train)


# --- groups ----------------------------------------------------------------------------------


def _number_groups(
    groups: Sequence[Any] | Tensor | None, num_train: int, device: torch.device
) -> tuple[list[Any] | None, Tensor | None]:
    """Return the distinct groups, sorted, and the (N,) number of each training example's group."""
    if groups is None:
        return None, None
    values = _as_values("groups", groups, "names")
    if len(values) != num_train:
        raise ValueError(
            f"groups: expected {num_train}, one per training example, got {len(values)}"
        )
    for row, value in enumerate(values):
        if value is None or isinstance(value, list | dict | set) or value != value:
            raise ValueError(f"groups: row {row}: expected the name of a group, got {value!r}")
    try:
        names = sorted(set(values))
    except TypeError:
        kinds = sorted({type(value).__name__ for value in values})
        raise ValueError(f"groups: expected names of one kind, got {' and '.join(kinds)}") from None
    number_of = {name: number for number, name in enumerate(names)}
    return names, torch.tensor([number_of[value] for value in values], device=device)


def _with_shares(
    scores: Tensor,
    indices: Tensor,
    opponent_scores: Tensor,
    opponent_indices: Tensor,
    names: list[Any] | None,
    groups_N: Tensor | None,
    sums_QG: Tensor | None,
) -> TopInfluences:
    """Return rankings and sums as `TopInfluences`, with the shares of the groups."""
    shares = opponent_shares = None
    if names is not None and groups_N is not None:
        shares = _shares(groups_N[indices], len(names))
        if opponent_indices.shape[1]:
            opponent_shares = _shares(groups_N[opponent_indices], len(names))
    return TopInfluences(
        indices, scores, opponent_indices, opponent_scores, names, sums_QG, shares, opponent_shares
    )


def _shares(groups_QP: Tensor, num_groups: int) -> Tensor:
    """Return the (Q, G) share of each group in rankings that list these groups."""
    num_queries, k = groups_QP.shape
    # One count over (query, group) cells, numbered row by row.
    first_cell_Q = num_groups * torch.arange(num_queries, device=groups_QP.device)
    cells = (groups_QP + first_cell_Q[:, None]).flatten()
    counts = cells.bincount(minlength=num_queries * num_groups)
    return counts.reshape(num_queries, num_groups).double() / k
