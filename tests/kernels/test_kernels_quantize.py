"""quantize_rows: the bits of the reference, its error, and tiny, zero and non-finite rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import DTYPES, SIZES
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from tracmod import kernels
from tracmod.kernels import QuantizedRows, reference

WIDTHS = [width for (width,) in SIZES["quantize_rows"]]
SMALLEST = 2.0**-118
ON_A_GPU = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True
)


def make_rows(
    count: int, width: int, dtype: torch.dtype = torch.float32, spread: bool = True
) -> Tensor:
    """Make random rows; `spread` over all magnitudes that are stored as codes."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    rows /= rows.abs().amax(dim=1, keepdim=True)
    if spread:
        rows *= torch.logspace(-35, 38, count, dtype=torch.float64)[:, None]
    return rows.to(dtype)


def assert_same(actual: QuantizedRows, expected: tuple[Tensor, Tensor]) -> None:
    """Check that all bits are equal, except that any NaN equals any other."""
    codes, scales = (part.cpu() for part in actual)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert torch.equal(codes, expected[0].cpu())
    torch.testing.assert_close(scales, expected[1].cpu(), rtol=0, atol=0, equal_nan=True)


def check(rows: Tensor, device: torch.device) -> QuantizedRows:
    """Quantize on the device and compare with the reference on the CPU."""
    quantized = kernels.quantize_rows(rows.to(device))
    assert quantized.codes.device == quantized.scales.device == rows.to(device).device
    assert_same(quantized, reference.quantize_rows(rows))
    return quantized


def quantize_into(rows: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Call the native op with given outputs, which `kernels.quantize_rows` would allocate."""
    capsules = map(to_dlpack, (rows, codes, scales))
    kernels._C.quantize_rows(*capsules, torch.get_num_threads(), kernels._stream(rows.device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_matches_the_reference(width: int, dtype: torch.dtype, device: torch.device) -> None:
    for count in (1, 3, 31, 33, 127):
        check(make_rows(count, width, dtype), device)


@ON_A_GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_has_the_same_bits_on_a_gpu(dtype: torch.dtype, device: torch.device) -> None:
    rows = make_rows(33, 127, dtype)
    assert_same(
        QuantizedRows(*reference.quantize_rows(rows.to(device))), reference.quantize_rows(rows)
    )


def test_a_number_is_off_by_half_a_scale_at_most(device: torch.device) -> None:
    rows = make_rows(200, 500)
    codes, scales = check(rows, device)
    back = codes.float() * scales[:, None]
    error = (back.cpu().double() - rows.double()).abs()
    assert (error <= scales.cpu().double()[:, None] * (0.5 + 2.0**-15)).all()
    assert (error > scales.cpu().double()[:, None] * 0.49).any()
    assert (codes.cpu().int().abs().amax(dim=1) == 127).all()  # the whole range is used


def test_ties_go_to_even(device: torch.device) -> None:
    rows = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5]])
    codes, scales = check(rows, device)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126]]
    assert scales.tolist() == [1.0]


def test_a_product_is_rounded_to_float32_before_it_is_rounded_to_a_code(
    device: torch.device,
) -> None:
    rows = []
    for largest in torch.linspace(1, 2, 40).tolist():
        factor = torch.tensor(127.0) / torch.tensor(largest)
        ties = torch.arange(126).add(0.5) / factor
        infinite = torch.full_like(ties, torch.inf)
        neighbours = [ties, torch.nextafter(ties, infinite), torch.nextafter(ties, -infinite)]
        rows.append(torch.cat([torch.tensor([largest]), *neighbours]))
    stacked = torch.stack(rows)
    factors = torch.full((40,), 127.0) / stacked[:, 0]
    at_once = (stacked.double() * factors.double()[:, None]).round()
    assert (at_once != (stacked * factors[:, None]).round()).sum() > 100  # the order matters
    check(stacked, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_and_tiny_rows_have_scale_and_codes_zero(
    dtype: torch.dtype, device: torch.device
) -> None:
    below = torch.nextafter(torch.tensor(SMALLEST), torch.tensor(0.0)).item()
    if dtype is torch.bfloat16:
        below = SMALLEST * (1 - 2.0**-8)
    largest = [0.0, -0.0, 1e-45, 2.0**-133, 2.0**-126, below, SMALLEST, -SMALLEST]
    rows = torch.zeros(len(largest), 21, dtype=dtype)
    rows[:, 5] = torch.tensor(largest, dtype=dtype)
    codes, scales = check(rows, device)
    assert scales.tolist() == [0.0] * 6 + [(torch.tensor(SMALLEST) / 127).item()] * 2
    assert not scales.cpu().signbit().any()
    assert codes[:, 5].tolist() == [0] * 6 + [127, -127]
    assert not codes[:, :5].any()


def test_flushing_denormals_to_zero_changes_nothing() -> None:
    rows = make_rows(4, 300)
    rows *= torch.tensor([SMALLEST, 2 * SMALLEST, 2.0**-126, 2.0**-140])[:, None]
    rows[:2, :100] = torch.linspace(-(2.0**-126), 2.0**-126, 102)[1:-1]
    rows[:2, 100] = torch.tensor([SMALLEST, -2 * SMALLEST])
    expected = check(rows, torch.device("cpu"))
    try:
        assert torch.set_flush_denormal(True)
        flushed = kernels.quantize_rows(rows)
    finally:
        torch.set_flush_denormal(False)
    assert_same(flushed, expected)
    assert not expected.codes[:2, :100].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers(dtype: torch.dtype, device: torch.device) -> None:
    largest = torch.finfo(dtype).max
    rows = torch.tensor([[largest, -largest, largest / 2, 1.0, 0.0]], dtype=dtype)
    codes, scales = check(rows, device)
    assert codes.tolist() == [[127, -127, 64, 0, 0]]
    assert scales.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("column", [0, 20, 130])
def test_nan_and_infinity_appear_in_the_scale_of_their_row_only(
    column: int, dtype: torch.dtype, device: torch.device
) -> None:
    rows = make_rows(7, 131, dtype, spread=False)
    rows[1, column] = torch.nan
    rows[2, column] = torch.inf
    rows[3, column] = -torch.inf
    rows[4, 60], rows[4, column] = torch.inf, -torch.nan
    bits = rows.view(torch.int16 if dtype is torch.bfloat16 else torch.int32)
    bits[5, column] = bits[2, column] + 1  # the smallest NaN, a signalling one
    codes, scales = check(rows, device)
    assert scales[[1, 4, 5]].isnan().all()
    assert scales[[2, 3]].tolist() == [torch.inf] * 2
    assert not codes[1:6].any()
    assert scales[[0, 6]].isfinite().all()
    assert codes[[0, 6]].any(dim=1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others_nor_on_threads(
    dtype: torch.dtype, device: torch.device, threads: None
) -> None:
    rows = make_rows(700, 65, dtype).to(device)
    whole = kernels.quantize_rows(rows)
    for part in (slice(0, 1), slice(3, 60), slice(699, None)):
        quantized = kernels.quantize_rows(rows[part])
        assert_same(quantized, (whole.codes[part], whole.scales[part]))
    torch.set_num_threads(1 if torch.get_num_threads() > 1 else 3)
    assert_same(kernels.quantize_rows(rows), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 15, 16, 64, 130])
def test_unaligned_outputs_are_written_and_nothing_beside_them(
    width: int, dtype: torch.dtype, device: torch.device
) -> None:
    rows = make_rows(5, width, dtype).to(device)
    size = rows.numel()
    shifted = torch.cat([rows.flatten()[:1], rows.flatten()])[1:].view(5, width)
    codes = torch.full((size + 2,), 77, dtype=torch.int8, device=device)
    scales = torch.full((7,), 77.0, device=device)
    quantize_into(shifted, codes[1:-1].view(5, width), scales[1:-1])
    written = QuantizedRows(codes[1:-1].view(5, width), scales[1:-1])
    assert_same(written, kernels.quantize_rows(rows))
    assert codes[[0, -1]].tolist() == [77, 77]
    assert scales[[0, -1]].tolist() == [77.0, 77.0]


def test_float16_is_widened(device: torch.device) -> None:
    rows = make_rows(9, 33, spread=False).half().to(device)
    assert_same(kernels.quantize_rows(rows), kernels.quantize_rows(rows.float()))


def test_the_default_dtype_changes_nothing(device: torch.device) -> None:
    try:
        torch.set_default_dtype(torch.float64)
        check(make_rows(3, 9, torch.float32), device)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_rows(dtype: torch.dtype, device: torch.device) -> None:
    for count, width in ((0, 5), (4, 0), (0, 0)):
        codes, scales = check(torch.ones(count, width, dtype=dtype), device)
        assert (codes.shape, scales.tolist()) == ((count, width), [0.0] * count)


def test_a_real_size(device: torch.device) -> None:
    check(make_rows(300, 4096), device)


@ON_A_GPU
def test_more_numbers_than_fit_32_bit_indices(device: torch.device) -> None:
    rows = torch.zeros(2**19 + 3, 4096, dtype=torch.bfloat16, device=device)
    last = make_rows(2, 4096, torch.bfloat16)
    rows[-2:] = last.to(device)
    codes, scales = kernels.quantize_rows(rows)
    assert_same(QuantizedRows(codes[-2:], scales[-2:]), reference.quantize_rows(last))
    assert not scales[:-2].any()


def test_rows_with_gaps_are_refused(device: torch.device) -> None:
    rows = torch.zeros(3, 4, device=device)[:, :2]
    with pytest.raises(ValueError, match=r"rows: expected a contiguous .*, got strides \(4, 1\)"):
        kernels.quantize_rows(rows)


ROWS = torch.zeros(2, 3)
INVALID: list[tuple[Tensor, str]] = [
    (ROWS.double(), "rows: expected float32 or bfloat16, got float64"),
    (ROWS.long(), "rows: expected float32 or bfloat16, got int64"),
    (ROWS[0], r"rows: expected shape \(N, K\), got \(3,\)"),
    (ROWS[None], r"rows: expected shape \(N, K\), got \(1, 2, 3\)"),
    (torch.zeros(3, 2).T, r"rows: expected a contiguous tensor, got strides \(1, 2\)"),
    (torch.zeros(3, 2).half().T, r"rows: expected a contiguous tensor, got strides \(1, 2\)"),
]


@pytest.mark.parametrize(("rows", "message"), INVALID, ids=[message for _, message in INVALID])
def test_errors_name_invalid_rows(rows: Tensor, message: str, device: torch.device) -> None:
    with pytest.raises(ValueError, match=f"quantize_rows: {message}"):
        kernels.quantize_rows(rows.to(device))


CODES, SCALES = torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2)
INVALID_OUTPUTS: list[tuple[dict[str, Any], str]] = [
    ({"codes": CODES.int()}, "codes: expected int8, got int32"),
    ({"codes": CODES[:1]}, r"codes: expected shape \(N, K\) = \(2, 3\), got \(1, 3\)"),
    ({"codes": torch.zeros(3, 2, dtype=torch.int8).T}, "codes: expected a contiguous tensor"),
    ({"scales": SCALES.double()}, "scales: expected float32, got float64"),
    ({"scales": SCALES[:1]}, r"scales: expected shape \(N,\) = \(2,\), got \(1,\)"),
]


@pytest.mark.parametrize(
    ("change", "message"), INVALID_OUTPUTS, ids=[m for _, m in INVALID_OUTPUTS]
)
def test_errors_name_invalid_outputs(change: dict[str, Any], message: str) -> None:
    arguments = {"rows": ROWS, "codes": CODES, "scales": SCALES} | change
    with pytest.raises(ValueError, match=f"quantize_rows: {message}"):
        quantize_into(**arguments)


@ON_A_GPU
def test_errors_name_outputs_on_another_device(device: torch.device) -> None:
    with pytest.raises(ValueError, match="codes: expected the device of rows, cuda:0, got cpu"):
        quantize_into(ROWS.to(device), CODES, SCALES)
