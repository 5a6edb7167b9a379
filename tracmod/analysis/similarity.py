"""Similarity of the languages' head subnetworks, compared with random masks of the same sizes.

Shape suffixes: L layers, H heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
from scipy.stats import hypergeom

from tracmod.analysis.matrix_correlation import orders_of

SIMILARITY_SCHEMA = pa.schema(
    [
        ("language_a", pa.string()),
        ("language_b", pa.string()),
        ("heads_a", pa.int64()),
        ("heads_b", pa.int64()),
        ("shared_heads", pa.int64()),
        ("jaccard", pa.float64()),
        ("cosine", pa.float64()),
        ("overlap", pa.float64()),
        ("expected_jaccard", pa.float64()),
        ("corrected_jaccard", pa.float64()),
        ("chance_probability", pa.float64()),
    ]
)

SIMILARITIES = ("jaccard", "cosine", "overlap", "expected_jaccard", "corrected_jaccard")

SEED_SCHEMA = pa.schema(
    [
        ("language_a", pa.string()),
        ("language_b", pa.string()),
        ("mask_pairs", pa.int64()),
        *((name, pa.float64()) for name in SIMILARITIES),
    ]
)


def mask_similarity(a_LH: np.ndarray, b_LH: np.ndarray) -> dict[str, float | int]:
    """Compute the similarity of two head masks, and how much of it chance explains.

    With A and B the sets of kept heads, jaccard is |A & B| / |A | B|, cosine is
    |A & B| / sqrt(|A| |B|) and overlap is |A & B| / min(|A|, |B|). `expected_jaccard` is the exact
    mean over random masks of the same sizes, drawn without regard to layers, for which |A & B| is
    hypergeometric. `corrected_jaccard` = (jaccard - expected) / (1 - expected) is 1 for equal masks
    and 0 at chance; where chance alone gives 1 it is 0. `chance_probability` is the probability
    that random masks share at least as many heads. Two empty masks have a similarity of 1.

    Args:
        a_LH, b_LH: (L, H) masks, nonzero for kept heads.

    Returns:
        The columns of `SIMILARITY_SCHEMA` without the languages.

    Raises:
        ValueError: the masks differ in shape.
    """
    if np.shape(a_LH) != np.shape(b_LH):
        raise ValueError(
            f"a_LH and b_LH: expected equal shapes, got {np.shape(a_LH)} and {np.shape(b_LH)}"
        )
    a, b = np.asarray(a_LH) != 0, np.asarray(b_LH) != 0
    heads_a, heads_b, shared = int(a.sum()), int(b.sum()), int((a & b).sum())
    chance = hypergeom(a.size, heads_a, heads_b)
    support = np.arange(max(0, heads_a + heads_b - a.size), min(heads_a, heads_b) + 1)
    jaccards = np.array([_ratio(n, heads_a + heads_b - n) for n in support])
    expected = float(chance.pmf(support) @ jaccards)
    jaccard = _ratio(shared, heads_a + heads_b - shared)
    return {
        "heads_a": heads_a,
        "heads_b": heads_b,
        "shared_heads": shared,
        "jaccard": jaccard,
        "cosine": _ratio(shared, float(np.sqrt(heads_a * heads_b))),
        "overlap": _ratio(shared, min(heads_a, heads_b)),
        "expected_jaccard": expected,
        "corrected_jaccard": (jaccard - expected) / (1 - expected) if expected < 1 - 1e-12 else 0.0,
        "chance_probability": min(1.0, float(chance.sf(shared - 1))),
    }


def _ratio(shared: float, total: float) -> float:
    return float(shared / total) if total else 1.0


def similarity_table(masks: Mapping[str, np.ndarray]) -> pa.Table:
    """Build `similarity.parquet`: `mask_similarity` of every unordered pair of languages.

    Args:
        masks: language -> (L, H) mask.
    """
    rows = [
        {"language_a": a, "language_b": b, **mask_similarity(masks[a], masks[b])}
        for a, b in itertools.combinations(masks, 2)
    ]
    return pa.Table.from_pylist(rows, schema=SIMILARITY_SCHEMA)


def seed_similarity_table(masks: Mapping[str, Sequence[np.ndarray]]) -> pa.Table | None:
    """Build `similarity_seeds.parquet`: mean similarity of masks from single seeds.

    A row with `language_a` = `language_b` is the baseline, a mean over pairs of seeds of one
    language. A row with two languages is a mean over pairs of a mask of either, of different seeds
    like those of the baseline: masks of one seed come from one training, which makes them alike
    whatever the language. Of a language with one seed there is no baseline, and all pairs count.

    Args:
        masks: language -> one (L, H) mask per seed, in the same order of seeds.

    Returns:
        A table with `SEED_SCHEMA`, or None if no language has two seeds.
    """
    rows = []
    for a, b in itertools.combinations_with_replacement(masks, 2):
        both = masks[a], masks[b]
        pairs: Iterable[tuple[np.ndarray, np.ndarray]]
        if a == b:
            pairs = itertools.combinations(both[0], 2)
        else:
            several = min(map(len, both)) > 1
            pairs = (
                (first, second)
                for (i, first), (j, second) in itertools.product(*map(enumerate, both))
                if i != j or not several
            )
        similarities = [mask_similarity(*pair) for pair in pairs]
        if similarities:
            means = {
                name: float(np.mean([similarity[name] for similarity in similarities]))
                for name in SIMILARITIES
            }
            names = {"language_a": a, "language_b": b, "mask_pairs": len(similarities)}
            rows.append({**names, **means})
    if not any(row["language_a"] == row["language_b"] for row in rows):
        return None
    return pa.Table.from_pylist(rows, schema=SEED_SCHEMA)


def seed_test(
    masks: Mapping[str, Sequence[np.ndarray]], permutations: int, seed: int
) -> dict[str, float | int | bool] | None:
    """Test whether a language's masks of two seeds are more alike than those of two languages.

    The statistic is the mean `corrected_jaccard` of two seeds of one language. If masks did not
    belong to languages, it would be as large for any assignment of a seed's masks to the
    languages. The p-value is the share of assignments for which it is at least as large.

    Args:
        masks: language -> one (L, H) mask per seed, in the same order of seeds.
        permutations: number of assignments drawn where there are too many to try all.
        seed: seed of the draws.

    Returns:
        `p_value`, `permutations` (the assignments tried, the observed one included) and `exact`
        (whether these are all); None with fewer than two languages or seeds.
    """
    count = min((len(own) for own in masks.values()), default=0)
    if len(masks) < 2 or count < 2:
        return None
    seeds, languages = range(count), range(len(masks))
    own = list(masks.values())
    similarity = {
        (s, t): np.array(
            [
                [mask_similarity(own[a][s], own[b][t])["corrected_jaccard"] for b in languages]
                for a in languages
            ]
        )
        for s, t in itertools.combinations(seeds, 2)
    }

    def statistic(orders: Sequence[np.ndarray]) -> float:
        """Return the sum over pairs of seeds, with each seed's masks in an order of its own."""
        return sum(
            float(values[orders[s], orders[t]].sum()) for (s, t), values in similarity.items()
        )

    observed = np.arange(len(masks))
    least = statistic([observed] * count) - 1e-12
    if count == 2:
        orders, exact = orders_of(len(masks), permutations, seed)
        others = [[observed, order] for order in orders]
    else:
        rng, exact = np.random.default_rng(seed), False
        others = [[rng.permutation(observed) for _ in seeds] for _ in range(permutations)]
    as_large = 1 + sum(statistic(order) >= least for order in others)
    tried = 1 + len(others)
    return {"p_value": as_large / tried, "permutations": tried, "exact": exact}


def seed_baseline(seeds: pa.Table) -> dict[str, dict[str, float | None]]:
    """Average the rows of `seed_similarity_table`, `within` a language and `between` two."""
    within = np.array(seeds["language_a"].to_pylist()) == np.array(seeds["language_b"].to_pylist())
    return {
        name: {
            similarity: float(seeds[similarity].to_numpy()[rows].mean()) if rows.any() else None
            for similarity in SIMILARITIES
        }
        for name, rows in (("within", within), ("between", ~within))
    }


def similarity_matrix(table: pa.Table, languages: list[str], column: str) -> np.ndarray:
    """Return a column of `similarity_table` as a symmetric matrix with ones on the diagonal.

    Args:
        table: result of `similarity_table`.
        languages: the n languages of the rows and columns.
        column: name of the column.
    """
    index_of = {language: index for index, language in enumerate(languages)}
    matrix = np.eye(len(languages))
    for row in table.to_pylist():
        if row["language_a"] in index_of and row["language_b"] in index_of:
            a, b = index_of[row["language_a"]], index_of[row["language_b"]]
            matrix[a, b] = matrix[b, a] = row[column]
    return matrix


def head_usage(masks: Mapping[str, np.ndarray]) -> np.ndarray:
    """Count in how many languages' subnetworks each head is kept, (L, H) int."""
    return np.sum([np.asarray(mask) != 0 for mask in masks.values()], axis=0)


def usage_summary(masks: Mapping[str, np.ndarray]) -> dict[str, float | int]:
    """Count the heads kept by all languages, by exactly one and by none.

    The expected numbers are those of independent random masks of the same sizes.
    """
    usage = head_usage(masks)
    shares = np.array([np.mean(np.asarray(mask) != 0) for mask in masks.values()])
    by_one = sum(shares[i] * np.prod(1 - np.delete(shares, i)) for i in range(len(shares)))
    return {
        "heads": int(usage.size),
        "languages": len(masks),
        "used_by_all": int(np.sum(usage == len(masks))),
        "used_by_one": int(np.sum(usage == 1)),
        "used_by_none": int(np.sum(usage == 0)),
        "expected_used_by_all": float(usage.size * np.prod(shares)),
        "expected_used_by_one": float(usage.size * by_one),
        "expected_used_by_none": float(usage.size * np.prod(1 - shares)),
    }
