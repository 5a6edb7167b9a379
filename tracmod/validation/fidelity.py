"""The fidelity certificate: scores from features against exact ones, on a random sample of pairs.

Some queries and training examples are drawn by seed; their scores are computed from the stored
features and from whole gradients, over the same checkpoints with the same weights, and compared.
What differs is what the projection and the dtype of the store cost.

Shapes: Q sampled queries, N sampled training examples, G training languages, L query languages, R
resamples, D = 2 G shares (of proponents and of opponents).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor
from transformers import PreTrainedModel

from tracmod.features.rows import Features, as_rows
from tracmod.files.durable import canonical_json, sha256
from tracmod.files.tensor_cache import read_tensors, write_tensors
from tracmod.gradients.preconditioner import Preconditioner
from tracmod.influence.exact import exact_influence
from tracmod.influence.scores import TopInfluences, influence_scores, top_of_scores
from tracmod.subnetworks.head_mask import HeadMask

# Drawn where the run is large enough; a certificate costs about twice the sample's passes.
QUERIES, TRAINS = 20, 200
BUDGET = 0.025
# Below this many nothing could be said; only of a run of seconds do they cost more than 5%.
LEAST_QUERIES, LEAST_TRAINS = 8, 40
LEAST_SPEARMAN = 0.95
# What `choose_dim` chooses from, and the sample it is given: a share averaged over few queries errs
# more than one of the whole run, several times as much on the certificate's sample.
CHOICE_QUERIES, CHOICE_TRAINS = 100, 500
DIMS = (512, 1024, 2048, 4096, 8192, 16384)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """Rows of the query and of the training examples, ascending."""

    queries: list[int]
    trains: list[int]


@dataclass(frozen=True)
class Terms:
    """What a certificate is stated in.

    Attributes:
        k: strongest training examples counted in a share, in the whole run.
        num_train: training examples of the whole run.
        least_spearman: mean rank correlation below which it is not passed.
        bootstrap, confidence, seed: of the intervals, over queries.
    """

    k: int
    num_train: int
    least_spearman: float = LEAST_SPEARMAN
    bootstrap: int = 1000
    confidence: float = 0.95
    seed: int = 0


def draw_sample(
    query_languages: Sequence[str],
    num_train: int,
    passes: int | None,
    seed: int,
    queries: int = QUERIES,
    trains: int = TRAINS,
) -> Sample:
    """Queries, of every language as many, and training examples, all equally likely.

    Args:
        query_languages: of each query.
        num_train: how many training examples there are.
        passes: examples that the run passes through the model at a checkpoint, over all masks. The
            sample is made smaller where it would be more than a fortieth of them. None: never.
        seed: of the draw.
        queries, trains: how many at most.
    """
    share = 1.0 if passes is None else min(1.0, BUDGET * passes / (queries + trains))
    num_queries = max(min(queries, LEAST_QUERIES), int(share * queries))
    num_trains = max(min(trains, LEAST_TRAINS), int(share * trains))
    rng = np.random.default_rng(seed)
    seen: dict[str, int] = {}
    turns: list[tuple[int, int, int]] = []
    for row in rng.permutation(len(query_languages)).tolist():
        turn = seen[query_languages[row]] = seen.get(query_languages[row], 0) + 1
        turns.append((turn, len(turns), row))
    chosen = [row for _, _, row in sorted(turns)[:num_queries]]
    drawn = rng.choice(num_train, min(num_trains, num_train), replace=False)
    return Sample(sorted(chosen), sorted(drawn.tolist()))


def exact_sample_scores(
    model: PreTrainedModel,
    queries: Sequence[Mapping[str, Any]],
    trains: Sequence[Mapping[str, Any]],
    *,
    parameters: str,
    head_mask: HeadMask | None,
    normalize: str | None,
    dtype: str,
    batch_tokens: int,
    keep_in: Path,
    identity: dict[str, Any],
    preconditioner: Preconditioner | None = None,
) -> Tensor:
    """(Q, N) `exact_influence` at one checkpoint, on the CPU; read where it was made before.

    Args:
        model, parameters, head_mask, normalize, preconditioner: as in `exact_influence`.
        queries, trains: the sample's examples, encoded.
        dtype: float32 or bfloat16, that of the pass for the features.
        batch_tokens: bound on the tokens of a batch, that of the features' too.
        keep_in: folder for a file named by `identity`.
        identity: all that the scores depend on.
    """
    name = sha256(canonical_json(identity))[:32]
    file = keep_in / f"certificate-{name}.safetensors"
    try:
        kept = read_tensors(file, identity)
    except ValueError:  # damaged: made anew
        kept = None
    if kept is None:
        scores_QN = exact_influence(
            model,
            trains,
            queries,
            parameters,
            head_mask,
            normalize,
            min(batch_tokens, 4096),
            dtype=getattr(torch, dtype),
            preconditioner=preconditioner,
        )
        kept = {"scores": scores_QN.cpu()}
        write_tensors(file, kept, identity)
    return kept["scores"]


def over_checkpoints(scores: Sequence[Tensor], weights: Sequence[float] | None) -> Tensor:
    """(Q, N) the weighted sum of each checkpoint's scores; weights None: 1 each."""
    weights = [1.0] * len(scores) if weights is None else weights
    total_QN = torch.zeros_like(scores[0])
    for one, weight in zip(scores, weights, strict=True):
        total_QN += weight * one
    return total_QN


def projected_sample_scores(
    sample: Sample,
    queries: Sequence[Features],
    trains: Sequence[Features],
    weights: Sequence[float] | None,
    normalize: str | None,
) -> Tensor:
    """(Q, N) scores from features: all checkpoints' of all queries and training examples."""
    query_rows = [as_rows(one).take(sample.queries).cpu() for one in queries]
    train_rows = [as_rows(one).take(sample.trains).cpu() for one in trains]
    return influence_scores(query_rows, train_rows, weights, normalize)


def sample_table(
    model: str, sample: Sample, test: pa.Table, train: pa.Table, exact: Tensor, projected: Tensor
) -> pa.Table:
    """A row per sampled pair, of one model: ids, languages, both scores; see `certify_table`.

    Args:
        model: `full` or `sparse`.
        sample: which rows of `test` and `train`.
        test, train: all examples.
        exact, projected: (Q, N) scores.
    """
    pairs = [(test, "test", np.repeat(sample.queries, len(sample.trains)))]
    pairs.append((train, "train", np.tile(sample.trains, len(sample.queries))))
    columns = {
        f"{split}_{name}": table.column(name).take(rows).combine_chunks()
        for table, split, rows in pairs
        for name in ("id", "language")
    }
    scores = {"exact": exact.flatten().numpy(), "projected": projected.flatten().numpy()}
    return pa.table({"model": [model] * exact.numel(), **columns, **scores})


def certify_table(table: pa.Table, terms: Terms) -> dict[str, dict[str, Any]]:
    """`certify` of each model in tables that `sample_table` made."""
    certificates = {}
    for model in table.column("model").unique().to_pylist():
        mine = table.filter(pc.equal(table.column("model"), model))
        num_queries = len(mine.column("test_id").unique())
        exact_QN, projected_QN = (
            torch.tensor(mine.column(name).to_numpy()).view(num_queries, -1)
            for name in ("exact", "projected")
        )
        num_trains = exact_QN.shape[1]
        certificates[model] = certify(
            exact_QN,
            projected_QN,
            mine.column("test_language").to_pylist()[::num_trains],
            mine.column("train_language").to_pylist()[:num_trains],
            terms,
        )
    return certificates


def certify(
    exact_QN: Tensor,
    projected_QN: Tensor,
    query_languages: Sequence[str],
    train_languages: Sequence[str],
    terms: Terms,
) -> dict[str, Any]:
    """The certificate: how well projected scores stand for exact ones.

    Every statistic has a value and a percentile interval over queries, resampled within their
    languages. Absolute differences grow by what is left to chance in a sample and again by the
    resampling, so that share errors are on the safe side: those of a whole run, averaged over more
    queries and counted over more training examples, are several times smaller.

    Args:
        exact_QN, projected_QN: scores over all checkpoints.
        query_languages, train_languages: of the sampled examples.
        terms: see `Terms`.

    Returns:
        queries, train, k (the same part of the sample as k is of all training examples), terms,
        `passed`, and of each statistic {value, low, high}: `spearman` and `pearson` (mean over
        queries; 1 where both sides are constant, 0 where one is), `top_k_overlap` (of the k
        strongest of each sign, how many are the same), `rmse` (in the scores' unit),
        `share_error_mean` and `share_error_largest` (absolute differences of the cells: for each
        query language the share of each training language among the k strongest of a sign).
    """
    num_train = exact_QN.shape[1]
    k = min(num_train, max(1, round(terms.k * num_train / terms.num_train)))
    both = [one.double().numpy() for one in (exact_QN, projected_QN)]
    tops = [top_of_scores(one, k, train_languages) for one in (exact_QN, projected_QN)]
    listed = [torch.cat([t.indices, t.opponent_indices + num_train], 1).numpy() for t in tops]
    shares_QD = [_shares(top) for top in tops]
    compared = _Compared(
        _correlations(*(rankdata(one, axis=1) for one in both)),
        _correlations(*both),
        _overlaps(listed),
        np.square(both[1] - both[0]).mean(axis=1),
        shares_QD[1] - shares_QD[0],
        np.asarray(query_languages),
    )
    intervals = compared.intervals(terms)
    return {
        "queries": len(exact_QN),
        "train": num_train,
        "k": k,
        **intervals,
        "least_spearman": terms.least_spearman,
        "passed": intervals["spearman"]["value"] >= terms.least_spearman,
        "bootstrap": terms.bootstrap,
        "confidence": terms.confidence,
        "seed": terms.seed,
    }


def _shares(top: TopInfluences) -> Array:
    """(Q, D) shares of the training languages among proponents, then among opponents."""
    sides = (top.group_shares, top.opponent_group_shares)
    return np.concatenate([side.numpy() for side in sides if side is not None], axis=1)


def _correlations(a_QN: Array, b_QN: Array) -> Array:
    """(Q,) Pearson correlation of every row."""
    a_QN, b_QN = (one - one.mean(axis=1, keepdims=True) for one in (a_QN, b_QN))
    lengths = [np.linalg.norm(one, axis=1) for one in (a_QN, b_QN)]
    constant = [length == 0 for length in lengths]
    product = np.where(constant[0] | constant[1], 1.0, lengths[0] * lengths[1])
    correlations = (a_QN * b_QN).sum(axis=1) / product
    return np.where(constant[0] & constant[1], 1.0, correlations)


def _overlaps(found: Sequence[NDArray[np.int64]]) -> Array:
    """(Q,) what part of each row's distinct entries the two have in common."""
    same = [len(np.intersect1d(*rows)) for rows in zip(*found, strict=True)]
    return np.array(same) / found[0].shape[1]


@dataclass(frozen=True)
class _Compared:
    """What each query says: (Q,) numbers, and (Q, D) differences of shares."""

    spearman_Q: Array
    pearson_Q: Array
    overlap_Q: Array
    squared_Q: Array
    differences_QD: Array
    languages_Q: NDArray[Any]

    def intervals(self, terms: Terms) -> dict[str, dict[str, float]]:
        """Every statistic's value and interval."""
        values = self._statistics(np.ones((1, len(self.spearman_Q))))
        resampled = self._statistics(self._resamples(terms))
        tail = (1 - terms.confidence) / 2
        intervals = {}
        for name, (value,) in values.items():
            low, high = np.quantile(resampled[name], [tail, 1 - tail])
            ends = {"low": min(low, value), "high": max(high, value)}
            intervals[name] = {"value": float(value)} | {key: float(v) for key, v in ends.items()}
        return intervals

    def _resamples(self, terms: Terms) -> Array:
        """(R, Q) how often each query is drawn: of its language as many as there are."""
        rng = np.random.default_rng(terms.seed)
        times_RQ = np.zeros((terms.bootstrap, len(self.languages_Q)))
        for language in np.unique(self.languages_Q):
            rows = np.flatnonzero(self.languages_Q == language)
            times_RQ[:, rows] = rng.multinomial(
                len(rows), np.full(len(rows), 1 / len(rows)), size=terms.bootstrap
            )
        return times_RQ

    def _statistics(self, times_RQ: Array) -> dict[str, Array]:
        """Each statistic of every resample, (R,)."""
        total_R = times_RQ.sum(axis=1)
        cells_RLD = []
        for language in np.unique(self.languages_Q):
            mine_RQ = times_RQ[:, self.languages_Q == language]
            sums_RD = mine_RQ @ self.differences_QD[self.languages_Q == language]
            cells_RLD.append(np.abs(sums_RD) / mine_RQ.sum(axis=1, keepdims=True))
        cells_RM = np.concatenate(cells_RLD, axis=1)
        return {
            "spearman": times_RQ @ self.spearman_Q / total_R,
            "pearson": times_RQ @ self.pearson_Q / total_R,
            "top_k_overlap": times_RQ @ self.overlap_Q / total_R,
            "rmse": np.sqrt(times_RQ @ self.squared_Q / total_R),
            "share_error_mean": cells_RM.mean(axis=1),
            "share_error_largest": cells_RM.max(axis=1),
        }


def failure(certificate: Mapping[str, Any], what: str) -> str:
    """What is to be said, loudly, of a certificate that is not passed; "" of one that is."""
    if certificate["passed"]:
        return ""
    return (
        f"fidelity of {what}: scores from features rank training examples as exact scores do only "
        f"to a Spearman correlation of {certificate['spearman']['value']:.3f}, expected "
        f"{certificate['least_spearman']} or more; take a larger projection_dim, and do not rely "
        f"on the rankings of this run"
    )


def choose_dim(
    scores_at: Callable[[int], Tensor],
    certified: Callable[[Tensor], Mapping[str, Any]],
    share_error: float,
) -> dict[str, Any]:
    """The smallest of `DIMS` whose mean error in language shares is surely below `share_error`.

    Surely: the upper end of its interval is. Where none is small enough, the largest.

    Args:
        scores_at: (Q, N) scores of the sample from features of so many numbers.
        certified: `certify` of such scores.
        share_error: what the error is to stay below.

    Returns:
        projection_dim, share_error (as asked), enough (whether it stays below), and of each size
        that was tried its `share_error_mean` and `spearman`.
    """
    tried: list[dict[str, Any]] = []
    for dim in DIMS:
        certificate = certified(scores_at(dim))
        stated = {name: certificate[name] for name in ("share_error_mean", "spearman")}
        tried.append({"projection_dim": dim, **stated})
        if stated["share_error_mean"]["high"] < share_error:
            break
    return {
        "projection_dim": tried[-1]["projection_dim"],
        "share_error": share_error,
        "enough": tried[-1]["share_error_mean"]["high"] < share_error,
        "tried": tried,
    }


def describe_choice(choice: Mapping[str, Any]) -> str:
    """What `choose_dim` chose and why, in one sentence."""
    error = choice["tried"][-1]["share_error_mean"]
    found = f"error in language shares {error['value']:.3f}, at most {error['high']:.3f}"
    if choice["enough"]:
        return (
            f"projection_dim {choice['projection_dim']}: the smallest whose error is surely below "
            f"{choice['share_error']} on a sample scored exactly ({found})"
        )
    return (
        f"projection_dim {choice['projection_dim']}: the largest that is tried; no projection's "
        f"error is surely below {choice['share_error']} on a sample scored exactly ({found})"
    )
