"""The fidelity certificate: scores from features compared with exact ones on a sample of pairs.

Some queries and training examples are drawn by seed. Their scores are computed from the stored
features and from whole gradients, over the same checkpoints with the same weights. The differences
are the cost of the projection and of the dtype of the store.

Shape suffixes: Q sampled queries, N sampled training examples, G training languages, L query
languages, R resamples, D = 2 G shares (of proponents and of opponents), M = L x D cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from tracmod.choices import ParameterSelection
from tracmod.features.rows import Features, as_rows
from tracmod.files.durable import canonical_json, sha256
from tracmod.files.tensor_cache import read_tensors, write_tensors
from tracmod.gradients.preconditioner import Preconditioner
from tracmod.influence.exact import exact_influence
from tracmod.influence.scores import TopInfluences, influence_scores, top_of_scores
from tracmod.models.loss import ExampleLoss
from tracmod.subnetworks.head_mask import HeadMask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Largest sample, and its largest share of the passes of a run. A certificate costs about twice the
# passes of its sample.
QUERIES, TRAINS = 20, 200
BUDGET = 0.025
# Smallest sample: a smaller one would say nothing. It costs more than 5% only of runs of seconds.
LEAST_QUERIES, LEAST_TRAINS = 8, 40
LEAST_SPEARMAN = 0.95
# `choose_dim` tries these sizes on a larger sample. A share that is averaged over few queries has a
# larger error than in the whole run, on the sample of a certificate several times as large.
CHOICE_QUERIES, CHOICE_TRAINS = 100, 500
DIMS = (512, 1024, 2048, 4096, 8192, 16384)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """A sample of pairs: every sampled query with every sampled training example.

    Attributes:
        queries: row numbers of the queries, ascending.
        trains: row numbers of the training examples, ascending.
    """

    queries: list[int]
    trains: list[int]


@dataclass(frozen=True)
class Terms:
    """Options of a certificate.

    Attributes:
        k: number of strongest training examples that shares are counted over in the whole run.
        num_train: number of training examples of the whole run.
        least_spearman: mean rank correlation from which the certificate is passed.
        bootstrap, confidence, seed: options of the intervals, which resample queries.
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
    """Draw as many queries of every language, and training examples with equal probability.

    Args:
        query_languages: language of each query of the run.
        num_train: number of training examples of the run.
        passes: number of examples that the run passes through the model at a checkpoint, over all
            masks. The sample is reduced to at most a fortieth of them. None does not reduce it.
        seed: seed of the draw.
        queries, trains: largest numbers to draw.
    """
    share = 1.0 if passes is None else min(1.0, BUDGET * passes / (queries + trains))
    num_queries = max(min(queries, LEAST_QUERIES), int(share * queries))
    num_trains = max(min(trains, LEAST_TRAINS), int(share * trains))
    rng = np.random.default_rng(seed)
    # The first query of every language in random order, then the second of every language, ...
    count_of: dict[str, int] = {}
    turns: list[tuple[int, int, int]] = []
    for row in rng.permutation(len(query_languages)).tolist():
        turn = count_of[query_languages[row]] = count_of.get(query_languages[row], 0) + 1
        turns.append((turn, len(turns), row))
    query_rows = [row for _, _, row in sorted(turns)[:num_queries]]
    train_rows = rng.choice(num_train, min(num_trains, num_train), replace=False)
    return Sample(sorted(query_rows), sorted(train_rows.tolist()))


def exact_sample_scores(
    model: PreTrainedModel,
    queries: Sequence[Mapping[str, Any]],
    trains: Sequence[Mapping[str, Any]],
    *,
    parameters: ParameterSelection,
    head_mask: HeadMask | None,
    normalize: str | None,
    dtype: str,
    batch_tokens: int,
    keep_in: Path,
    identity: dict[str, Any],
    preconditioner: Preconditioner | None = None,
    include_frozen: bool = False,
    loss: ExampleLoss | None = None,
) -> Tensor:
    """Return `exact_influence` of a sample at one checkpoint, computed once and then read.

    Args:
        model, parameters, head_mask, normalize, preconditioner, include_frozen: as in
            `exact_influence`.
        queries, trains: examples of the sample, encoded.
        dtype: "float32" or "bfloat16", as in the pass for the features.
        batch_tokens: bound on the tokens of a batch, as in the pass for the features.
        keep_in: folder for the scores, in a file named after `identity`.
        identity: everything that the scores depend on.
        loss: the loss that the model was trained with; queries are measured without its label
            smoothing and weights. None for the one that transformers chooses.

    Returns:
        (Q, N) float32, on the CPU.
    """
    name = sha256(canonical_json(identity))[:32]
    file = keep_in / f"certificate-{name}.safetensors"
    try:
        tensors = read_tensors(file, identity)
    except ValueError:  # damaged: computed again
        tensors = None
    if tensors is None:
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
            include_frozen=include_frozen,
            loss=loss,
            query_loss=None if loss is None else loss.measured,
        )
        tensors = {"scores": scores_QN.cpu()}
        write_tensors(file, tensors, identity)
    return tensors["scores"]


def over_checkpoints(scores: Sequence[Tensor], weights: Sequence[float] | None) -> Tensor:
    """Return the (Q, N) weighted sum of the scores of checkpoints; weights None means 1 each."""
    weights = [1.0] * len(scores) if weights is None else weights
    total_QN = torch.zeros_like(scores[0])
    for scores_QN, weight in zip(scores, weights, strict=True):
        total_QN += weight * scores_QN
    return total_QN


def projected_sample_scores(
    sample: Sample,
    queries: Sequence[Features],
    trains: Sequence[Features],
    weights: Sequence[float] | None,
    normalize: str | None,
) -> Tensor:
    """Compute the scores of a sample from features.

    Args:
        sample: which rows of the features.
        queries, trains: features of all examples of the run, one entry per checkpoint.
        weights, normalize: as in `influence_scores`.

    Returns:
        (Q, N) float32, on the CPU.
    """
    query_rows = [as_rows(features).take(sample.queries).cpu() for features in queries]
    train_rows = [as_rows(features).take(sample.trains).cpu() for features in trains]
    return influence_scores(query_rows, train_rows, weights, normalize)


def sample_table(
    model: str, sample: Sample, test: pa.Table, train: pa.Table, exact: Tensor, projected: Tensor
) -> pa.Table:
    """Build a table with one row per sampled pair: ids, languages and both scores.

    Args:
        model: "full" or "sparse".
        sample: which rows of `test` and `train`.
        test, train: all examples.
        exact, projected: (Q, N) scores.

    Returns:
        A table for `certify_table`.
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
    """Return the certificate of each model in a table that `sample_table` made."""
    certificates = {}
    for model in table.column("model").unique().to_pylist():
        pairs = table.filter(pc.equal(table.column("model"), model))
        num_queries = len(pairs.column("test_id").unique())
        exact_QN, projected_QN = (
            torch.tensor(pairs.column(name).to_numpy()).view(num_queries, -1)
            for name in ("exact", "projected")
        )
        num_trains = exact_QN.shape[1]
        certificates[model] = certify(
            exact_QN,
            projected_QN,
            pairs.column("test_language").to_pylist()[::num_trains],
            pairs.column("train_language").to_pylist()[:num_trains],
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
    """State how well projected scores represent exact ones.

    Every statistic has a value and a percentile interval over queries, which are resampled within
    their languages. Absolute differences include the sampling error of a small sample and again
    that of the resampling, so share errors are conservative: those of a whole run, which averages
    over more queries and counts over more training examples, are several times smaller.

    Args:
        exact_QN, projected_QN: (Q, N) scores over all checkpoints.
        query_languages, train_languages: languages of the sampled examples.
        terms: options of the certificate.

    Returns:
        queries, train, k (the same share of the sample as k is of all training examples),
        least_spearman, bootstrap, confidence, seed, `passed`, and {value, low, high} for each of

        - spearman, pearson: mean over queries; 1 where both sides are constant, 0 where one is;
        - top_k_overlap: common share of the k strongest of each sign;
        - rmse: root mean square error, in the unit of the scores;
        - share_error_mean, share_error_largest: over cells, the absolute difference in the share of
          a training language among the k strongest of a sign, for a query language.
    """
    num_train = exact_QN.shape[1]
    k = min(num_train, max(1, round(terms.k * num_train / terms.num_train)))
    sides = (exact_QN, projected_QN)
    exact, projected = (scores_QN.double().numpy() for scores_QN in sides)
    tops = [top_of_scores(scores_QN, k, train_languages) for scores_QN in sides]
    # An example may be among both signs; as an opponent it has a number of its own.
    listed = [torch.cat([top.indices, top.opponent_indices + num_train], 1).numpy() for top in tops]
    exact_shares_QD, projected_shares_QD = (_shares(top) for top in tops)
    comparison = _Comparison(
        _correlations(rankdata(exact, axis=1), rankdata(projected, axis=1)),
        _correlations(exact, projected),
        _overlaps(listed),
        np.square(projected - exact).mean(axis=1),
        projected_shares_QD - exact_shares_QD,
        np.asarray(query_languages),
    )
    intervals = comparison.intervals(terms)
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
    """Return (Q, D) shares of the training languages among proponents, then among opponents."""
    sides = (top.group_shares, top.opponent_group_shares)
    return np.concatenate([side.numpy() for side in sides if side is not None], axis=1)


def _correlations(a_QN: Array, b_QN: Array) -> Array:
    """Return the (Q,) Pearson correlation of every row, as defined in `certify`."""
    a_QN = a_QN - a_QN.mean(axis=1, keepdims=True)
    b_QN = b_QN - b_QN.mean(axis=1, keepdims=True)
    a_Q, b_Q = np.linalg.norm(a_QN, axis=1), np.linalg.norm(b_QN, axis=1)
    product_Q = np.where((a_Q == 0) | (b_Q == 0), 1.0, a_Q * b_Q)
    return np.where((a_Q == 0) & (b_Q == 0), 1.0, (a_QN * b_QN).sum(axis=1) / product_Q)


def _overlaps(listed: Sequence[NDArray[np.int64]]) -> Array:
    """Return the (Q,) share of entries that two lists have in common in every row."""
    common = [len(np.intersect1d(*rows)) for rows in zip(*listed, strict=True)]
    return np.array(common) / listed[0].shape[1]


@dataclass(frozen=True)
class _Comparison:
    """Comparison of projected with exact scores, per query."""

    spearman_Q: Array
    pearson_Q: Array
    overlap_Q: Array
    squared_error_Q: Array
    differences_QD: Array
    languages_Q: NDArray[Any]

    def intervals(self, terms: Terms) -> dict[str, dict[str, float]]:
        """Return the value and interval of every statistic."""
        values = self._statistics(np.ones((1, len(self.spearman_Q))))
        resampled = self._statistics(self._resamples(terms))
        tail = (1 - terms.confidence) / 2
        intervals = {}
        for name, (value,) in values.items():
            low, high = np.quantile(resampled[name], [tail, 1 - tail])
            # Absolute differences are biased upwards by resampling, so that the value itself may
            # lie outside the percentiles.
            low, high = min(low, value), max(high, value)
            intervals[name] = {"value": float(value), "low": float(low), "high": float(high)}
        return intervals

    def _resamples(self, terms: Terms) -> Array:
        """Return (R, Q) how often each query is drawn, as many per language as there are."""
        rng = np.random.default_rng(terms.seed)
        times_RQ = np.zeros((terms.bootstrap, len(self.languages_Q)))
        for language in np.unique(self.languages_Q):
            rows = np.flatnonzero(self.languages_Q == language)
            times_RQ[:, rows] = rng.multinomial(
                len(rows), np.full(len(rows), 1 / len(rows)), size=terms.bootstrap
            )
        return times_RQ

    def _statistics(self, times_RQ: Array) -> dict[str, Array]:
        """Return each statistic of every resample, (R,)."""
        total_R = times_RQ.sum(axis=1)
        cells_LRD = []
        for language in np.unique(self.languages_Q):
            own_Q = self.languages_Q == language
            own_times_RQ = times_RQ[:, own_Q]
            sums_RD = own_times_RQ @ self.differences_QD[own_Q]
            cells_LRD.append(np.abs(sums_RD) / own_times_RQ.sum(axis=1, keepdims=True))
        cells_RM = np.concatenate(cells_LRD, axis=1)
        return {
            "spearman": times_RQ @ self.spearman_Q / total_R,
            "pearson": times_RQ @ self.pearson_Q / total_R,
            "top_k_overlap": times_RQ @ self.overlap_Q / total_R,
            "rmse": np.sqrt(times_RQ @ self.squared_error_Q / total_R),
            "share_error_mean": cells_RM.mean(axis=1),
            "share_error_largest": cells_RM.max(axis=1),
        }


def failure(certificate: Mapping[str, Any], subject: str) -> str:
    """Return the warning for a certificate that is not passed, and "" for one that is.

    Args:
        certificate: result of `certify`.
        subject: what was certified, for the message.
    """
    if certificate["passed"]:
        return ""
    # Rounded down: 0.9496 would be shown as the 0.950 that is expected.
    value = math.floor(certificate["spearman"]["value"] * 1000) / 1000
    return (
        f"fidelity of {subject}: expected a Spearman correlation of at least "
        f"{certificate['least_spearman']} between scores from features and exact scores, got "
        f"{value:.3f}; use a larger projection_dim (scores of a model "
        f"that has learned little differ less than their errors, so it needs more numbers), and do "
        f"not rely on the rankings of this run"
    )


def choose_dim(
    scores_at: Callable[[int], Tensor],
    certified: Callable[[Tensor], Mapping[str, Any]],
    share_error: float,
) -> dict[str, Any]:
    """Choose the smallest of `DIMS` whose mean error in language shares is below a bound.

    The upper end of the interval of the error must be below it. If that is so for none of the
    sizes, the largest is chosen.

    Args:
        scores_at: returns the (Q, N) scores of the sample from features of a given size.
        certified: returns `certify` of such scores.
        share_error: the bound.

    Returns:
        projection_dim, share_error, enough (whether the error is below the bound), and `tried`: the
        `share_error_mean` and `spearman` of each projection_dim that was tried.
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
    """Describe in one sentence what `choose_dim` chose and why."""
    error = choice["tried"][-1]["share_error_mean"]
    if choice["enough"]:
        reason = "the smallest whose mean error in language shares is below the bound"
    else:
        reason = "the largest that is tried; the mean error in language shares is above the bound"
    return (
        f"projection_dim {choice['projection_dim']}: {reason} of {choice['share_error']} on a "
        f"sample with exact scores ({error['value']:.3f}, upper bound {error['high']:.3f})"
    )
