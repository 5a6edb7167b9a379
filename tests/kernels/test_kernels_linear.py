"""`kernels.linear` against float64: both directions, many sizes, threads, invalid input."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import SIZES

from tracmod import kernels
from tracmod.kernels import reference


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", SIZES["linear"], ids=str)
def test_matches_the_reference(size: tuple[int, int, int], biased: bool, transposed: bool) -> None:
    rows, size_in, size_out = size
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size_out, size_in, generator=generator)
    x = torch.randn(rows, size_out if transposed else size_in, generator=generator)
    columns = size_in if transposed else size_out
    bias = torch.randn(columns, generator=generator) if biased else None
    expected = reference.linear(
        x.double(), weight.double(), None if bias is None else bias.double(), transposed=transposed
    )
    actual = kernels.linear(x, weight, bias, transposed=transposed)
    plain = reference.linear(x, weight, bias, transposed=transposed)
    allowed = max(2 * float((plain - expected).abs().max()), 1e-6 * float(expected.abs().max()))
    assert float((actual - expected).abs().max()) <= allowed


@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_does_not_depend_on_the_others_nor_on_threads(transposed: bool) -> None:
    x, weight = torch.randn(300, 70), torch.randn(70, 70)
    whole = kernels.linear(x, weight, transposed=transposed)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(kernels.linear(x, weight, transposed=transposed), whole)
    finally:
        torch.set_num_threads(before)
    part = kernels.linear(x[5:7].contiguous(), weight, transposed=transposed)
    assert torch.equal(part, whole[5:7])


def test_nan_is_propagated() -> None:
    x = torch.ones(4, 40)
    x[2, 3] = torch.nan
    product = kernels.linear(x, torch.ones(20, 40))
    assert product[2].isnan().all()
    assert product[[0, 1, 3]].eq(40).all()


def test_no_rows() -> None:
    assert kernels.linear(torch.ones(0, 5), torch.ones(3, 5)).shape == (0, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 4)}, r"linear: x: expected .*, got \(2, 4\)"),
        ({"x": torch.ones(2, 5).double()}, "linear: x: expected float32, got float64"),
        ({"x": torch.ones(5, 2).T}, "linear: x: expected .*contiguous"),
        ({"weight": torch.ones(3)}, r"linear: weight: expected .*\(O, I\)"),
        ({"bias": torch.ones(5)}, r"linear: bias: expected .*, got \(5,\)"),
    ],
)
def test_errors_name_the_invalid_argument(changes: dict[str, torch.Tensor], message: str) -> None:
    arguments = {"x": torch.ones(2, 5), "weight": torch.ones(3, 5), "bias": torch.ones(3)} | changes
    with pytest.raises(ValueError, match=message):
        kernels.linear(**arguments)
