"""top_k_dot against sorted scores: many sizes, streaming, ties, NaN and infinity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import DTYPES, SIZES, assert_close
from torch import Tensor

from tracmod import kernels
from tracmod.kernels import TopK, reference


def make_rows(
    checkpoints: int, rows: int, width: int, seed: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=generator).to(dtype) for _ in range(checkpoints)]


def on(rows: list[Tensor], device: torch.device) -> list[Tensor]:
    return [part.to(device) for part in rows]


def assert_same(first: TopK, second: TopK) -> None:
    for name, a, b in zip(TopK._fields, first, second, strict=True):
        if a is None:
            assert b is None
        else:
            assert torch.equal(a, b), name


def drift_of_tensor_cores(
    checkpoints: int, width: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Return the error of one chain of additions on tensor cores, relative to the largest score.

    On a GPU a bfloat16 score is one chain of C K / 16 additions that round towards zero, each off
    by up to 2^-23 (csrc/cuda/top_k_dot.cu). Elsewhere there is no such chain.
    """
    on_cpu = device.type == "cpu" and kernels._C.__name__ == "tracmod._C"
    if on_cpu or dtype is not torch.bfloat16:
        return 0.0
    return checkpoints * width / 16 * 2**-23


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [None, "cosine"])
@pytest.mark.parametrize(("checkpoints", "queries", "trains", "width", "k"), SIZES["top_k_dot"])
def test_matches_the_reference(
    checkpoints: int,
    queries: int,
    trains: int,
    width: int,
    k: int,
    normalize: Any,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    q = make_rows(checkpoints, queries, width, 0, dtype)
    n = make_rows(checkpoints, trains, width, 1, dtype)
    weights = [0.5, 2.0, 0.25][:checkpoints]
    groups = torch.arange(trains) % 4
    top = kernels.top_k_dot(
        on(q, device), on(n, device), k=k, weights=weights, normalize=normalize,
        groups=groups.to(device), num_groups=5,
    )  # fmt: skip

    def scores(dtype: torch.dtype) -> Tensor:
        return reference.scores(
            [part.to(dtype) for part in q], [part.to(dtype) for part in n], weights, normalize
        )

    truth, plain = scores(torch.float64), scores(torch.float32)
    drift = drift_of_tensor_cores(checkpoints, width, dtype, device)
    rankings = [(top.scores, top.indices, True), (top.opponent_scores, top.opponent_indices, False)]
    for actual, indices, largest in rankings:
        best, _ = reference.top_k(truth, k, largest=largest)
        assert_close(actual, best, reference.top_k(plain, k, largest=largest)[0], drift)
        # Near ties may be swapped, so the row of an index need only have the score that is given.
        assert_close(actual, truth.gather(1, indices.cpu()), plain.gather(1, indices.cpu()), drift)
        assert all(len(set(row)) == k for row in indices.tolist())
    assert top.group_sums is not None
    assert_close(
        top.group_sums.float(),
        reference.group_sums(truth, groups, 5),
        plain.double() @ one_hot(groups),
        drift,
    )
    assert not top.group_sums[:, 4].any()


def one_hot(groups: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(groups, 5).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [2, 7])
@pytest.mark.parametrize("normalize", [None, "cosine"])
@pytest.mark.parametrize("block", [1, 37, 2048, 2500])
def test_streamed_blocks_give_the_bits_of_one_call(
    block: int, normalize: Any, queries: int, dtype: torch.dtype, device: torch.device
) -> None:
    trains = 150 if block == 1 else 5000
    q = on(make_rows(2, queries, 9, 0, dtype), device)
    n = on(make_rows(2, trains, 9, 1, dtype), device)
    groups = (torch.arange(trains) * 7 % 3).to(device)
    kwargs: dict[str, Any] = {
        "k": 20,
        "weights": [1.0, 0.5],
        "normalize": normalize,
        "num_groups": 3,
    }
    whole = kernels.top_k_dot(q, n, groups=groups, **kwargs)
    state = None
    for start in range(0, trains, block):
        rows = slice(start, start + block)
        before = None if state is None else state.scores.clone()
        previous = state
        state = kernels.top_k_dot(
            q, [part[rows] for part in n], groups=groups[rows], state=state, index_offset=start,
            **kwargs,
        )  # fmt: skip
        if previous is not None:
            assert torch.equal(previous.scores, before)  # the state is not modified
    assert state is not None
    assert_same(state, whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("queries", "first"), [(300, 290), (8, 7), (8, 2)], ids=["many", "one of few", "few"]
)
def test_queries_do_not_depend_on_each_other_or_on_threads(
    queries: int, first: int, dtype: torch.dtype, device: torch.device, threads: None
) -> None:
    q = on(make_rows(2, queries, 65, 0, dtype), device)
    n = on(make_rows(2, 2100, 65, 1, dtype), device)
    whole = kernels.top_k_dot(q, n, k=9)
    part = kernels.top_k_dot([rows[first:] for rows in q], n, k=9)
    assert torch.equal(part.scores, whole.scores[first:])
    assert torch.equal(part.opponent_indices, whole.opponent_indices[first:])
    torch.set_num_threads(1 if torch.get_num_threads() > 1 else 3)
    assert_same(kernels.top_k_dot(q, n, k=9), whole)


@pytest.mark.parametrize("opponents_k", [1, 7, 30])
def test_the_ranking_of_opponents_has_a_length_of_its_own(
    opponents_k: int, device: torch.device
) -> None:
    q, n = on(make_rows(2, 11, 65, 0), device), on(make_rows(2, 2100, 65, 1), device)
    longest = kernels.top_k_dot(q, n, k=30)
    state = None
    for start in range(0, 2100, 700):
        block = [rows[start : start + 700] for rows in n]
        state = kernels.top_k_dot(
            q, block, k=9, state=state, index_offset=start, opponents_k=opponents_k
        )
    assert state is not None
    expected = longest._replace(
        scores=longest.scores[:, :9],
        indices=longest.indices[:, :9],
        opponent_scores=longest.opponent_scores[:, :opponents_k],
        opponent_indices=longest.opponent_indices[:, :opponents_k],
    )
    assert_same(state, expected)
    with pytest.raises(ValueError, match=rf"opponent_scores.*\(11, 9\), got \(11, {opponents_k}\)"):
        kernels.top_k_dot(q, n, k=9, state=state)
    with pytest.raises(ValueError, match=r"opponents_k.*0"):
        kernels.top_k_dot(q, n, k=9, opponents_k=0)


def test_ties_go_to_the_lower_index(device: torch.device) -> None:
    values = torch.tensor([0.0, 1.0, -0.0, 1.0, -1.0, 0.0, -1.0, 1.0])
    queries = torch.ones(1, 1)
    for split in (8, 3, 1):
        state = None
        for start in range(0, 8, split):
            rows = values[start : start + split, None].contiguous()
            state = kernels.top_k_dot(
                on([queries], device), on([rows], device), k=6, state=state, index_offset=start
            )
        assert state is not None
        assert state.indices.tolist() == [[1, 3, 7, 0, 2, 5]]
        assert state.opponent_indices.tolist() == [[4, 6, 0, 2, 5, 1]]
        assert not state.scores.cpu().signbit().any()  # -0 is returned as 0


@pytest.mark.parametrize("k", [20, 900])
def test_many_ties(k: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-2, 3, (3000, 1), generator=generator).float()
    queries = torch.tensor([[1.0], [-1.0], [0.0]])
    top = kernels.top_k_dot(on([queries], device), on([rows], device), k=k)
    scores = queries @ rows.T
    for indices, largest in ((top.indices, True), (top.opponent_indices, False)):
        assert torch.equal(indices.cpu(), reference.top_k(scores, k, largest=largest)[1])


def test_fewer_rows_than_k(device: torch.device) -> None:
    q, n = make_rows(1, 2, 3, 0), make_rows(1, 3, 3, 1)
    top = kernels.top_k_dot(on(q, device), on(n, device), k=5, index_offset=10)
    scores, indices = reference.top_k(reference.scores(q, n), 5)
    assert torch.equal(top.indices.cpu(), torch.where(indices < 0, -1, indices + 10))
    assert (top.scores[:, 3:] == -torch.inf).all()
    assert (top.opponent_scores[:, 3:] == torch.inf).all()
    assert top.opponent_indices[:, 3:].eq(-1).all()
    assert torch.isfinite(scores[:, :3]).all()
    assert top.group_sums is None


def test_no_rows_or_no_queries(device: torch.device) -> None:
    q, n = on(make_rows(1, 2, 3, 0), device), on(make_rows(1, 3, 3, 1), device)
    assert kernels.top_k_dot(q, [n[0][:0]], k=2).indices.tolist() == [[-1, -1]] * 2
    assert kernels.top_k_dot([q[0][:0]], n, k=2).scores.shape == (0, 2)


def test_cosine_of_a_zero_row_is_zero(device: torch.device) -> None:
    q, n = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [6.0, 8.0]])
    top = kernels.top_k_dot(on([q], device), on([n], device), k=2, normalize="cosine")
    assert torch.allclose(top.scores.cpu(), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert top.indices.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 9])
def test_nan_comes_first_in_both_rankings(
    queries: int, dtype: torch.dtype, device: torch.device
) -> None:
    rows = torch.tensor([[1.0], [torch.inf], [torch.nan], [-torch.inf], [torch.nan]]).to(dtype)
    ones = torch.ones(queries, 1, dtype=dtype)
    top = kernels.top_k_dot(on([ones], device), on([rows], device), k=3)
    assert top.indices.tolist() == [[2, 4, 1]] * queries
    assert top.opponent_indices.tolist() == [[2, 4, 3]] * queries


def test_blocks_may_come_in_any_order(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-9, 9, (300, 1), generator=generator).float()
    ones = on([torch.ones(1, 1)], device)
    whole = kernels.top_k_dot(ones, on([rows], device), k=40)
    state = None
    for start in (200, 0, 100):
        part = on([rows[start : start + 100]], device)
        state = kernels.top_k_dot(ones, part, k=40, state=state, index_offset=start)
    assert state is not None
    assert_same(state, whole)


def test_wide_rows(device: torch.device) -> None:
    q, n = make_rows(1, 2, 65536, 0), make_rows(1, 40, 65536, 1)
    top = kernels.top_k_dot(on(q, device), on(n, device), k=40)
    truth = reference.scores([q[0].double()], [n[0].double()])
    assert_close(
        top.scores, reference.top_k(truth, 40)[0], reference.top_k(reference.scores(q, n), 40)[0]
    )


Q, N = torch.zeros(2, 3), torch.zeros(4, 3)
GROUPS = torch.zeros(4, dtype=torch.int64)
INVALID: list[tuple[dict[str, Any], str]] = [
    ({"k": 0}, r"k: expected .*1.*, got 0"),
    ({"normalize": "l2"}, r"normalize: expected None or 'cosine', got 'l2'"),
    ({"queries": []}, r"queries: expected .* got none"),
    ({"trains": [N, N]}, r"trains: expected .* 1, got 2"),
    ({"weights": [1.0, 2.0]}, r"weights: expected .* 1, got 2"),
    ({"trains": [torch.zeros(4, 5)]}, r"trains\[0\]: expected shape \(N, K\) = \(4, 3\), got"),
    ({"trains": [N.double()]}, r"trains\[0\]: expected float32, got float64"),
    ({"queries": [Q.half()], "trains": [N.half()]}, r"queries\[0\]: expected float32 or bfloat16"),
    ({"trains": [torch.zeros(3, 4).T]}, r"trains\[0\]: expected a contiguous tensor"),
    ({"groups": GROUPS}, r"num_groups: expected .*1.*, got 0"),
    (
        {"groups": GROUPS[:3], "num_groups": 1},
        r"groups: expected shape \(N,\) = \(4,\), got \(3,\)",
    ),
    ({"groups": GROUPS.int(), "num_groups": 1}, r"groups: expected int64, got int32"),
    (
        {"state": kernels.top_k_dot([Q], [N], k=3)},
        r"state.scores: expected shape \(Q, k\) = \(2, 2\), got \(2, 3\)",
    ),
    (
        {"state": kernels.top_k_dot([Q], [N], k=2), "groups": GROUPS, "num_groups": 2},
        r"state\.group_sums: expected 2 .*, got None",
    ),
]


@pytest.mark.parametrize(("change", "message"), INVALID, ids=[message for _, message in INVALID])
def test_errors_name_the_invalid_argument(
    change: dict[str, Any], message: str, device: torch.device
) -> None:
    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(part) for part in value]
        if isinstance(value, TopK):
            return TopK(*(None if part is None else part.to(device) for part in value))  # type: ignore[arg-type]
        return value.to(device) if isinstance(value, Tensor) else value

    arguments = {"queries": [Q], "trains": [N], "k": 2, **change}
    with pytest.raises(ValueError, match=f"top_k_dot: {message}"):
        kernels.top_k_dot(**{name: move(value) for name, value in arguments.items()})


def test_an_invalid_group_raises_on_the_cpu_and_gives_nan_on_a_gpu(device: torch.device) -> None:
    groups = torch.tensor([0, 1, 2, 0]).to(device)
    q, n = on([Q], device), on([N], device)
    if device.type == "cpu":
        with pytest.raises(
            ValueError, match=r"groups: expected values from 0 .* = 1, got 2 at row 2"
        ):
            kernels.top_k_dot(q, n, k=1, groups=groups, num_groups=2)
    else:
        top = kernels.top_k_dot(q, n, k=1, groups=groups, num_groups=2)
        assert top.group_sums is not None
        assert top.group_sums.isnan().all()
