"""How alike the languages' head subnetworks are, beside what random masks of their sizes give.

Shape legend: L layers, H heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from scipy.stats import hypergeom

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


MEASURES = ("jaccard", "cosine", "overlap", "expected_jaccard", "corrected_jaccard")

SEED_SCHEMA = pa.schema(
    [
        ("language_a", pa.string()),
        ("language_b", pa.string()),
        ("mask_pairs", pa.int64()),
        *((measure, pa.float64()) for measure in MEASURES),
    ]
)


def mask_similarity(a_LH: np.ndarray, b_LH: np.ndarray) -> dict[str, float | int]:
    """Similarity of two head masks, and how much of it chance explains.

    With A and B the sets of kept heads: jaccard |A & B| / |A | B|, cosine |A & B| / sqrt(|A| |B|),
    overlap |A & B| / min(|A|, |B|). `expected_jaccard` is the exact mean over random masks of the
    same sizes, drawn without regard to layers (|A & B| is then hypergeometric);
    `corrected_jaccard` = (jaccard - expected) / (1 - expected): 1 = the same mask, 0 = chance.
    `chance_probability`: that random masks share at least as many heads. Two empty masks are
    alike (1); where chance alone gives 1 the corrected value is 0.

    Args:
        a_LH, b_LH: (L, H), nonzero = kept.

    Returns:
        The columns of `SIMILARITY_SCHEMA` after the languages.

    Raises:
        ValueError: the masks differ in shape.
    """
    if np.shape(a_LH) != np.shape(b_LH):
        raise ValueError(
            f"mask_similarity: expected equal shapes, got {np.shape(a_LH)} and {np.shape(b_LH)}"
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


def _ratio(shared: float, of: float) -> float:
    return float(shared / of) if of else 1.0


def similarity_table(masks: Mapping[str, np.ndarray]) -> pa.Table:
    """`mask_similarity` of every unordered pair of languages (`SIMILARITY_SCHEMA`)."""
    rows = [
        {"language_a": a, "language_b": b, **mask_similarity(masks[a], masks[b])}
        for a, b in itertools.combinations(masks, 2)
    ]
    return pa.Table.from_pylist(rows, schema=SIMILARITY_SCHEMA)


def seed_similarity_table(masks: Mapping[str, Sequence[np.ndarray]]) -> pa.Table | None:
    """Mean similarity of masks from single seeds (`SEED_SCHEMA`, `similarity_seeds.parquet`).

    A row with `language_a` = `language_b` is the baseline: over the pairs of two seeds of one
    language. A row of two languages is over all pairs of a mask of the one and a mask of the other,
    so that masks of the same making are compared. Languages with one seed have no baseline row.

    Args:
        masks: language -> one (L, H) mask per seed.

    Returns:
        None where no language has two seeds.
    """
    rows = []
    for a, b in itertools.combinations_with_replacement(masks, 2):
        both = masks[a], masks[b]
        pairs = itertools.combinations(both[0], 2) if a == b else itertools.product(*both)
        found = [mask_similarity(*pair) for pair in pairs]
        if found:
            means = {m: float(np.mean([one[m] for one in found])) for m in MEASURES}
            rows.append({"language_a": a, "language_b": b, "mask_pairs": len(found), **means})
    if not any(row["language_a"] == row["language_b"] for row in rows):
        return None
    return pa.Table.from_pylist(rows, schema=SEED_SCHEMA)


def seed_baseline(seeds: pa.Table) -> dict[str, dict[str, float | None]]:
    """Means of `seed_similarity_table`: `within` a language, `between` two; rows weigh the same."""
    within = np.array(seeds["language_a"].to_pylist()) == np.array(seeds["language_b"].to_pylist())
    return {
        name: {
            measure: float(seeds[measure].to_numpy()[chosen].mean()) if chosen.any() else None
            for measure in MEASURES
        }
        for name, chosen in (("within", within), ("between", ~within))
    }


def similarity_matrix(table: pa.Table, languages: list[str], column: str) -> np.ndarray:
    """(n, n) symmetric matrix of one column of `similarity_table`; ones on the diagonal."""
    place = {language: index for index, language in enumerate(languages)}
    matrix = np.eye(len(languages))
    for row in table.to_pylist():
        if row["language_a"] in place and row["language_b"] in place:
            a, b = place[row["language_a"]], place[row["language_b"]]
            matrix[a, b] = matrix[b, a] = row[column]
    return matrix


def head_usage(masks: Mapping[str, np.ndarray]) -> np.ndarray:
    """(L, H) int: in how many languages' subnetworks each head is kept."""
    return np.sum([np.asarray(mask) != 0 for mask in masks.values()], axis=0)


def usage_summary(masks: Mapping[str, np.ndarray]) -> dict[str, float | int]:
    """Heads kept by all, exactly one and no language, beside random masks of the same sizes.

    The expected numbers take each language's mask as drawn at random and independently.
    """
    usage = head_usage(masks)
    kept = np.array([np.mean(np.asarray(mask) != 0) for mask in masks.values()])
    one = sum(kept[i] * np.prod(1 - np.delete(kept, i)) for i in range(len(kept)))
    return {
        "heads": int(usage.size),
        "languages": len(masks),
        "used_by_all": int(np.sum(usage == len(masks))),
        "used_by_one": int(np.sum(usage == 1)),
        "used_by_none": int(np.sum(usage == 0)),
        "expected_used_by_all": float(usage.size * np.prod(kept)),
        "expected_used_by_one": float(usage.size * one),
        "expected_used_by_none": float(usage.size * np.prod(1 - kept)),
    }
