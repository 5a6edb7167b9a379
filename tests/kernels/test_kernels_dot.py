"""gradient_dot: both algorithms against the float64 reference, and bitwise reproducibility."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import DTYPES, LAYERS, SIZES, Batch, assert_close, make_batch
from torch import Tensor

from tracmod import kernels
from tracmod.kernels import reference

KINDS = [
    (layer, bias) for layer in LAYERS for bias in (False, True) if layer != "embedding" or not bias
]


def products(first: Batch, second: Batch, **kwargs: Any) -> Tensor:
    out = torch.zeros(len(first.g), len(second.g), device=first.g.device)
    kernels.gradient_dot(
        first.x, first.g, second.x, second.g, out, lengths1=first.lengths, lengths2=second.lengths,
        **kwargs,
    )  # fmt: skip
    return out


def reference_of(first: Batch, second: Batch, dtype: torch.dtype, **kwargs: Any) -> Tensor:
    out = torch.zeros(len(first.g), len(second.g), dtype=dtype)
    x1, g1, lengths1 = first.cast(dtype)
    x2, g2, lengths2 = second.cast(dtype)
    reference.gradient_dot(x1, g1, x2, g2, out, lengths1=lengths1, lengths2=lengths2, **kwargs)
    return out


def check(first: Batch, second: Batch, device: torch.device, **kwargs: Any) -> None:
    assert_close(
        products(first.to(device), second.to(device), **kwargs),
        reference_of(first, second, torch.float64, **kwargs),
        reference_of(first, second, torch.float32, **kwargs),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES["gradient_dot"], ids=str)
@pytest.mark.parametrize(("layer", "bias"), KINDS)
def test_matches_the_reference(
    layer: str, bias: bool, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    batch1, tokens1, batch2, tokens2, size_in, size_out = sizes
    first = make_batch(layer, batch1, tokens1, size_in, size_out, dtype)
    second = make_batch(layer, batch2, tokens2, size_in, size_out, dtype, seed=1)
    check(first, second, device, layer=layer, bias=bias)


def test_a_real_layer(device: torch.device) -> None:
    first = make_batch("linear", 4, 64, 768, 3072)
    second = make_batch("linear", 3, 64, 768, 3072, seed=1)
    check(first, second, device, bias=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "size"), [(3, 200), (33, 20)], ids=["pairs", "formed"])
def test_nan_and_infinity_are_propagated(
    tokens: int, size: int, dtype: torch.dtype, value: float, device: torch.device
) -> None:
    first = make_batch("linear", 5, tokens, size, size, dtype, ragged=False)
    second = make_batch("linear", 4, tokens, size, size, dtype, ragged=False, seed=1)
    for part in (first.x, first.g):
        clean = part.clone()
        part[2, -1, -1] = value
        finite = products(first.to(device), second.to(device)).isfinite().cpu()
        assert not finite[2].any()
        assert finite[[0, 1, 3, 4]].all()
        part.copy_(clean)


@pytest.mark.parametrize("layer", LAYERS)
def test_inputs_without_a_token_dimension_have_one_token(layer: str, device: torch.device) -> None:
    batch = make_batch(layer, 5, 1, 33, 31, ragged=False).to(device)
    flat = Batch(batch.x.squeeze(1), batch.g.squeeze(1), None)
    assert torch.equal(products(batch, batch, layer=layer), products(flat, flat, layer=layer))


def test_adds_to_out(device: torch.device) -> None:
    batch = make_batch("linear", 3, 5, 7, 6).to(device)
    out = torch.ones(3, 3, device=device)
    kernels.gradient_dot(
        batch.x, batch.g, batch.x, batch.g, out, lengths1=batch.lengths, lengths2=batch.lengths
    )
    assert torch.equal(out, 1 + products(batch, batch))


def test_empty_batches(device: torch.device) -> None:
    x, empty = torch.zeros(2, 4, 3, device=device), torch.zeros(0, 4, 3, device=device)
    kernels.gradient_dot(x, x, empty, empty, torch.zeros(2, 0, device=device))
    kernels.gradient_dot(empty, empty, x, x, torch.zeros(0, 2, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "size"), [(9, 200), (70, 20)], ids=["pairs", "formed"])
@pytest.mark.parametrize(("layer", "bias"), KINDS)
def test_bits_do_not_depend_on_order_padding_or_threads(
    layer: str,
    bias: bool,
    tokens: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    threads: None,
) -> None:
    first = make_batch(layer, 7, tokens, size, size, dtype).to(device)
    second = make_batch(layer, 5, tokens, size, size, dtype, seed=1).to(device)
    kwargs: dict[str, Any] = {"layer": layer, "bias": bias}
    whole = products(first, second, **kwargs)
    assert whole.isfinite().all()  # although the padding is NaN
    order = [4, 0, 2, 1, 6, 3, 5]
    assert torch.equal(products(first.rows(order), second, **kwargs), whole[order])
    shape = list(first.x.shape)
    shape[1] = tokens + 13
    x, g = (
        first.x.new_zeros(shape),
        torch.full((7, tokens + 13, first.g.shape[2]), torch.nan, dtype=dtype),
    )
    g = g.to(device)
    x[:, :tokens], g[:, :tokens] = first.x, first.g
    assert torch.equal(products(Batch(x, g, first.lengths), second, **kwargs), whole)
    torch.set_num_threads(1 if torch.get_num_threads() > 1 else 3)
    assert torch.equal(products(first, second, **kwargs), whole)


X, G = torch.zeros(2, 4, 3), torch.zeros(2, 4, 5)
INVALID: list[tuple[dict[str, Any], str]] = [
    ({"x2": torch.zeros(2, 4, 4)}, r"x2: expected .* x1, 3, got \(2, 4, 4\)"),
    ({"g2": torch.zeros(2, 4, 6)}, r"g2: expected .* g1, 5, got \(2, 4, 6\)"),
    ({"x2": X.bfloat16(), "g2": G.bfloat16()}, r"g2: expected float32, got bfloat16"),
    ({"out": torch.zeros(2, 3)}, r"out: expected shape \(B1, B2\) = \(2, 2\), got \(2, 3\)"),
    ({"out": torch.zeros(2, 2).double()}, r"out: expected float32, got float64"),
    ({"lengths2": torch.tensor([4, 9])}, r"lengths2: expected values from 0 to S = 4, got 9 at"),
    ({"g1": G.half()}, r"g1: expected float32 or bfloat16, got float16"),
    ({"x1": torch.zeros(2, 3, 4).transpose(1, 2)}, r"x1: expected a contiguous tensor"),
    ({"layer": "attention"}, r"layer: expected one of linear, elementwise, embedding"),
]


@pytest.mark.parametrize(("change", "message"), INVALID, ids=[message for _, message in INVALID])
def test_errors_name_the_invalid_argument(
    change: dict[str, Any], message: str, device: torch.device
) -> None:
    arguments = {"x1": X, "g1": G, "x2": X, "g2": G, "out": torch.zeros(2, 2), **change}
    on_device = {
        name: value.to(device) if isinstance(value, Tensor) and "lengths" not in name else value
        for name, value in arguments.items()
    }
    with pytest.raises(ValueError, match=f"gradient_dot: {message}"):
        kernels.gradient_dot(**on_device)
