"""Correlation of two matrices over pairs of items, tested by permuting the items (Mantel).

Pairs of languages share languages, so the entries of a matrix are not independent and a plain
correlation test rejects far too often. Permuting the items, rows and columns together, keeps their
dependence.

The errors of this module become the `reason` of a test that could not be made, in summary.json.

Shape suffixes: n items, M = n (n - 1) / 2 pairs, C controls and a constant, P permutations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import rankdata

MAX_ORDERS = 5040  # of up to seven items; more are sampled instead of enumerated


@dataclass(frozen=True)
class MantelResult:
    """Result of a Mantel test.

    Attributes:
        correlation: over the pairs of items.
        p_value: two-sided.
        permutations: orders of the items that were tried, including the observed one.
        exact: whether these are all orders there are.
        pairs: number of pairs.
    """

    correlation: float
    p_value: float
    permutations: int
    exact: bool
    pairs: int


def mantel(
    a: np.ndarray,
    b: np.ndarray,
    *,
    permutations: int = 1000,
    seed: int = 0,
    method: Literal["spearman", "pearson"] = "spearman",
) -> MantelResult:
    """Correlate the off-diagonal entries of two symmetric matrices and test it by permutation.

    Rows and columns of `a` are permuted together: p = (1 + number of permutations with |r| >= the
    observed |r|) / (1 + permutations). If there are at most 5,040 orders n! all of them are tried,
    and the observed one is the 1; otherwise `permutations` are drawn.

    Args:
        a, b: (n, n) symmetric float, n >= 3; diagonals are not read.
        permutations: number of draws if n! is above 5,040.
        seed: seed of `numpy.random.default_rng`.
        method: "spearman" (ranks) or "pearson" (product-moment).

    Raises:
        ValueError: shapes differ or are not square, there are fewer than 3 items, or a matrix is
            not symmetric, not finite or without any variation.

    Source: Mantel 1967; Phipson and Smyth 2010 (the 1 + in p).

    Examples:
        >>> import numpy as np
        >>> from tracmod.analysis import mantel
        >>> distances = np.array([[0, 1, 2, 4], [1, 0, 3, 5], [2, 3, 0, 6], [4, 5, 6, 0]])
        >>> result = mantel(distances, distances ** 2)
        >>> round(result.correlation, 6), result.exact, result.permutations
        (1.0, True, 24)
    """
    a_nn, b_nn = _symmetric(a, "first"), _symmetric(b, "second")
    if a_nn.shape != b_nn.shape:
        raise ValueError(f"mantel: expected equal shapes, got {a_nn.shape} and {b_nn.shape}")
    n = len(a_nn)
    rows, columns = np.triu_indices(n, k=1)
    a_unit_nn = np.zeros((n, n))
    a_unit_nn[rows, columns] = _standardised(a_nn[rows, columns], method, "first")
    a_unit_nn += a_unit_nn.T
    b_unit = _standardised(b_nn[rows, columns], method, "second")
    orders, exact = orders_of(n, permutations, seed)
    correlations = a_unit_nn[orders[:, rows], orders[:, columns]] @ b_unit
    observed = float(a_unit_nn[rows, columns] @ b_unit)
    # Orders with the same r must count as equal, although rounding may make them differ.
    at_least = int(np.sum(np.abs(correlations) >= abs(observed) - 1e-12))
    p_value = (1 + at_least) / (1 + len(orders))
    return MantelResult(observed, p_value, len(orders) + exact, exact, len(rows))


def partial_mantel(
    a: np.ndarray,
    b: np.ndarray,
    controls: Sequence[np.ndarray],
    *,
    permutations: int = 1000,
    seed: int = 0,
    method: Literal["spearman", "pearson"] = "spearman",
) -> MantelResult:
    """Correlate two symmetric matrices after removing the linear effect of controls from both.

    r is the correlation of the residuals of `a` and of `b` after regression on the controls (and a
    constant); for Spearman all of them are ranks. The test permutes rows and columns of the
    residuals of `a` together and removes the controls from them again, so that every r is computed
    like the observed one; p is that of `mantel`. Ranks of controls are removed linearly: where a
    control alone determines both matrices and rows have strong effects of their own, 7 to 10% of
    Spearman tests reject at the 5% level in simulation (Pearson: 6 to 8% with 5 or 6 items, 6% with
    more).

    Args:
        a, b: (n, n) symmetric float; diagonals are not read.
        controls: matrices of the same shape, at least one. One without any variation has no effect.
        permutations, seed, method: as in `mantel`.

    Raises:
        ValueError: as in `mantel`; there are no controls, or they explain all of `a` or `b`.

    Source: Smouse, Long and Sokal 1986 (the statistic); Legendre 2000 (permuted residuals).
    """
    if not controls:
        raise ValueError("partial_mantel: expected at least one control, got none")
    matrices = [_symmetric(m, which) for m, which in ((a, "first"), (b, "second"))]
    matrices += [_symmetric(control, "control") for control in controls]
    if len({matrix.shape for matrix in matrices}) > 1:
        shapes = [matrix.shape for matrix in matrices]
        raise ValueError(f"partial_mantel: expected equal shapes, got {shapes}")
    n = len(matrices[0])
    rows, columns = np.triu_indices(n, k=1)
    vectors = [matrix[rows, columns] for matrix in matrices]
    if method == "spearman":
        vectors = [rankdata(vector) for vector in vectors]
    basis_MC = _orthonormal(vectors[2:])
    if len(rows) - basis_MC.shape[1] < 2:
        raise ValueError(
            f"partial_mantel: expected at least 2 more pairs than controls with a constant, got "
            f"{len(rows)} pairs and {basis_MC.shape[1]}"
        )
    a_M, b_M = (
        _residual(vectors[i], basis_MC, which) for i, which in ((0, "first"), (1, "second"))
    )
    a_nn = np.zeros((n, n))
    a_nn[rows, columns] = a_nn[columns, rows] = a_M
    orders, exact = orders_of(n, permutations, seed)
    permuted_PM = a_nn[orders[:, rows], orders[:, columns]]
    permuted_PM -= (permuted_PM @ basis_MC) @ basis_MC.T
    lengths_P = np.maximum(np.linalg.norm(permuted_PM, axis=1), 1e-12)
    correlations_P = permuted_PM @ b_M / lengths_P
    observed = float(a_M @ b_M)
    at_least = int(np.sum(np.abs(correlations_P) >= abs(observed) - 1e-12))
    p_value = (1 + at_least) / (1 + len(orders))
    return MantelResult(observed, p_value, len(orders) + exact, exact, len(rows))


@dataclass(frozen=True)
class CellsResult:
    """Result of `permuted_columns`.

    Attributes:
        correlation, p_value: as in `MantelResult`; None if one matrix does not vary.
        permutations, exact: as in `MantelResult`.
        cells: number of cells that were compared.
    """

    correlation: float | None
    p_value: float | None
    permutations: int
    exact: bool
    cells: int


def permuted_columns(
    a: np.ndarray,
    b: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    between_only: bool = False,
    permutations: int = 1000,
    seed: int = 0,
) -> CellsResult:
    """Correlate the cells of two matrices (Spearman) that need be neither symmetric nor square.

    The items of the columns are permuted in `a`, in the columns and in the rows that have the same
    names, so that a cell of an item with itself remains such a cell. The test therefore does not
    ask whether these cells stand out, but whether anything else in `a` is related to `b`. p is
    two-sided, and orders are drawn as in `mantel`.

    Args:
        a, b: (R, C) float.
        rows, columns: names of the items; the name of every column is also that of a row.
        between_only: whether to leave out the cells of an item with itself.
        permutations, seed: as in `mantel`.

    Source: Hubert and Schultz 1976 (quadratic assignment).
    """
    assert a.shape == b.shape == (len(rows), len(columns))
    row_of = {name: row for row, name in enumerate(rows)}
    own = np.array([row_of[name] for name in columns])
    mask = np.ones(a.shape, dtype=bool)
    if between_only:
        mask[own, np.arange(len(columns))] = False
    orders, exact = orders_of(len(columns), permutations, seed)
    tried, cells = len(orders) + exact, int(mask.sum())
    if cells < 2 or np.ptp(a[mask]) == 0 or np.ptp(b[mask]) == 0:
        return CellsResult(None, None, tried, exact, cells)
    a_unit, b_unit = np.zeros(a.shape), np.zeros(b.shape)
    a_unit[mask] = _standardised(a[mask], "spearman", "first")
    b_unit[mask] = _standardised(b[mask], "spearman", "second")
    observed = float((a_unit * b_unit).sum())
    at_least = 0
    for order in orders:
        order_of_rows = np.arange(len(rows))
        order_of_rows[own] = own[order]
        correlation = float((a_unit[order_of_rows][:, order] * b_unit).sum())
        at_least += abs(correlation) >= abs(observed) - 1e-12
    return CellsResult(observed, (1 + at_least) / (1 + len(orders)), tried, exact, cells)


def _orthonormal(controls: Sequence[np.ndarray]) -> np.ndarray:
    """Return (M, C) orthonormal columns that span a constant and the controls.

    Directions that repeat others up to rounding are left out.
    """
    scaled = [np.ones(len(controls[0]))]
    for control in controls:
        centred = control - control.mean()
        scaled.append(centred / max(1e-300, float(np.abs(centred).max())))
    left, sizes, _ = np.linalg.svd(np.stack(scaled, axis=1), full_matrices=False)
    return left[:, sizes > 1e-9 * sizes[0]]


def _residual(vector_M: np.ndarray, basis_MC: np.ndarray, which: str) -> np.ndarray:
    """Return the part of a vector that is orthogonal to the basis, scaled to length 1."""
    residual_M = vector_M - basis_MC @ (basis_MC.T @ vector_M)
    length = np.linalg.norm(residual_M)
    if length <= 1e-9 * np.linalg.norm(vector_M):
        raise ValueError(f"partial_mantel: {which} matrix: the controls leave nothing of it")
    return residual_M / length


def orders_of(n: int, permutations: int, seed: int) -> tuple[np.ndarray, bool]:
    """Return the orders to try, without the observed one, and whether these are all others."""
    if math.factorial(min(n, 20)) <= MAX_ORDERS:
        return np.array(list(itertools.permutations(range(n)))[1:]), True
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(n), (permutations, 1)), axis=1), False


def _symmetric(matrix: np.ndarray, which: str) -> np.ndarray:
    """Return a checked copy with zeros on the diagonal."""
    matrix = np.array(matrix, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"mantel: {which} matrix: expected (n, n), got {matrix.shape}")
    if len(matrix) < 3:
        raise ValueError(f"mantel: expected at least 3 items, got {len(matrix)}")
    np.fill_diagonal(matrix, 0.0)
    if not np.isfinite(matrix).all() or not np.allclose(matrix, matrix.T, rtol=1e-9, atol=1e-12):
        raise ValueError(f"mantel: {which} matrix: expected a symmetric one of finite numbers")
    return matrix


def _standardised(values: np.ndarray, method: str, which: str) -> np.ndarray:
    """Centre values and scale them to length 1, so that a dot product is a correlation."""
    if method == "spearman":
        values = rankdata(values)
    centred = values - values.mean()
    length = np.linalg.norm(centred)
    if length <= 1e-12 * max(1.0, float(np.abs(values).max())):
        raise ValueError(f"mantel: {which} matrix: every pair has the same value")
    return centred / length
