"""project_gradients against its reference in float64, and bitwise reproducibility."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import DTYPES, LAYERS, SIZES, Batch, assert_close, make_batch
from torch import Tensor

from tracmod import kernels
from tracmod.kernels import reference

KEYS = {"seed": 5, "input_key": 2, "output_key": 3}


def arguments(
    layer: str, kind: str, batch: Batch, bias: bool, k: tuple[int, int]
) -> dict[str, Any]:
    k_out, k_in = k
    if kind == "identity":
        k_out = batch.g.shape[-1] if layer == "linear" else 1 + bias
        k_in = batch.x.shape[-1] + (bias if layer == "linear" else 0)
    rows = 0
    if kind == "reduced":
        kind, rows = ("sketch", 21) if layer == "linear" else ("sketch", 0)
    return {
        **KEYS, "layer": layer, "kind": kind, "k_out": k_out, "k_in": k_in, "rows": rows,
        "bias": bias,
    }  # fmt: skip


def project(batch: Batch, offset: int = 0, **kwargs: Any) -> Tensor:
    out = torch.zeros(len(batch.g), offset + kwargs["k_out"] * kwargs["k_in"] + 2)
    out = out.to(batch.g.device)
    kernels.project_gradients(batch.x, batch.g, out, lengths=batch.lengths, offset=offset, **kwargs)
    return out


def reference_of(batch: Batch, dtype: torch.dtype, offset: int = 0, **kwargs: Any) -> Tensor:
    size = offset + kwargs["k_out"] * kwargs["k_in"] + 2
    out = torch.zeros(len(batch.g), size, dtype=dtype)
    x, g, lengths = batch.cast(dtype)
    reference.project_gradients(x, g, out, lengths=lengths, offset=offset, **kwargs)
    return out


def check(batch: Batch, device: torch.device, **kwargs: Any) -> None:
    truth = reference_of(batch, torch.float64, offset=3, **kwargs)
    plain = reference_of(batch, torch.float32, offset=3, **kwargs)
    assert_close(project(batch.to(device), offset=3, **kwargs), truth, plain)


KINDS = [
    (layer, kind, bias)
    for layer in LAYERS
    for kind in ("rademacher", "sjlt", "identity", "sketch", "reduced")
    for bias in (False, True)
    if (layer != "embedding" or (kind != "identity" and not bias))
    and (layer == "linear" or kind != "reduced")
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES["project_gradients"], ids=str)
@pytest.mark.parametrize(("layer", "kind", "bias"), KINDS)
def test_matches_the_reference(
    layer: str,
    kind: str,
    bias: bool,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    batch = make_batch(layer, *sizes[:4], dtype)
    check(batch, device, **arguments(layer, kind, batch, bias, sizes[4:]))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["rademacher", "sjlt", "sketch", "reduced"])
def test_a_real_layer(kind: str, device: torch.device) -> None:
    batch = make_batch("linear", 16, 64, 768, 3072, ragged=False)
    check(batch, device, **arguments("linear", kind, batch, True, (64, 64)))


def outputs_of(batch: Batch, sizes: list[int]) -> list[Tensor]:
    """Make gradients of other layers that read the x of a batch, NaN in its padding."""
    generator = torch.Generator().manual_seed(1)
    padding = batch.g[..., :1] - batch.g[..., :1]
    return [
        torch.randn(*batch.g.shape[:-1], size, generator=generator).to(batch.g.dtype) + padding
        for size in sizes
    ]


def project_outputs(
    batch: Batch,
    outputs: list[Tensor],
    dtype: torch.dtype | None,
    device: torch.device,
    **kwargs: Any,
) -> Tensor:
    """Project with the native op (dtype None) or with the reference in `dtype`."""
    out = torch.zeros(len(batch.g), kwargs["k_out"] * kwargs["k_in"])
    if dtype is None:
        x, _, lengths = batch.to(device)
        out = out.to(device)
        kernels.project_gradients(
            x, [g.to(device) for g in outputs], out, lengths=lengths, **kwargs
        )
        return out.cpu()
    out = out.to(dtype)
    x, _, lengths = batch.cast(dtype)
    reference.project_gradients(x, [g.to(dtype) for g in outputs], out, lengths=lengths, **kwargs)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rademacher", "sjlt", "reduced"])
@pytest.mark.parametrize("sizes", [[1], [31, 1], [33, 33, 33], [127, 3, 64, 31]], ids=str)
@pytest.mark.parametrize("columns", [False, True])
def test_layers_that_read_the_same_x_in_one_call(
    kind: str, sizes: list[int], columns: bool, dtype: torch.dtype, device: torch.device
) -> None:
    batch = make_batch("linear", 4, 33, 65, 1, dtype)
    outputs = outputs_of(batch, sizes)
    kwargs = {**arguments("linear", kind, batch, True, (31, 33)), "input_key": 0}
    kwargs["output_key"] = [3, 5, 2**63, 1][: len(sizes)]
    if columns:
        kwargs["output_columns"] = [None] + [torch.arange(size) * 3 for size in sizes[1:]]
    plain, truth = (
        project_outputs(batch, outputs, dtype, device, **kwargs)
        for dtype in (torch.float32, torch.float64)
    )
    together = project_outputs(batch, outputs, None, device, **kwargs)
    assert_close(together, truth, plain)
    separately = torch.zeros_like(together).to(device)
    for j, g in enumerate(outputs):
        own_kwargs = {**kwargs, "output_key": kwargs["output_key"][j]}
        if columns:
            own_kwargs["output_columns"] = kwargs["output_columns"][j]
        kernels.project_gradients(
            batch.x.to(device), g.to(device), separately,
            lengths=None if batch.lengths is None else batch.lengths.to(device), **own_kwargs,
        )  # fmt: skip
    assert_close(together, separately.double().cpu(), plain)


def remaining_columns(size: int, kind: str) -> Tensor:
    """Return the columns that remain of `size`: those of some heads (runs), or any in any order."""
    if kind == "heads":
        return torch.cat([torch.arange(at, min(size, at + 32)) for at in range(0, size, 64)])
    return torch.randperm(size, generator=torch.Generator().manual_seed(2))[: max(1, size // 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("remaining", ["heads", "any"])
@pytest.mark.parametrize(("size_in", "size_out"), [(1, 3), (127, 31), (96, 260)])
@pytest.mark.parametrize("kind", ["rademacher", "sjlt", "sketch", "reduced"])
def test_left_out_columns_count_as_zeros(
    kind: str,
    size_in: int,
    size_out: int,
    remaining: str,
    bias: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    batch = make_batch("linear", 3, 31, size_in, size_out, dtype)
    x_columns, g_columns = (
        remaining_columns(size_in, remaining),
        remaining_columns(size_out, remaining),
    )
    full = Batch(torch.zeros_like(batch.x), torch.zeros_like(batch.g), batch.lengths)
    full.x[..., x_columns], full.g[..., g_columns] = (
        batch.x[..., x_columns],
        batch.g[..., g_columns],
    )
    cut = Batch(
        batch.x[..., x_columns].contiguous(), batch.g[..., g_columns].contiguous(), batch.lengths
    )
    kwargs = arguments("linear", kind, full, bias, (33, 31))
    columns = {
        "input_columns": torch.cat([x_columns, torch.tensor([size_in])]) if bias else x_columns,
        "output_columns": g_columns,
    }
    truth = reference_of(full, torch.float64, **kwargs)
    stated = reference_of(cut, torch.float64, **kwargs, **columns)
    torch.testing.assert_close(stated, truth, rtol=1e-12, atol=1e-12)
    plain = reference_of(full, torch.float32, **kwargs)
    assert_close(project(cut.to(device), **kwargs, **columns), truth, plain)
    on_device = {name: value.to(device) for name, value in columns.items()}
    assert torch.equal(
        project(cut.to(device), **kwargs, **columns), project(cut.to(device), **kwargs, **on_device)
    )


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("kind", ["rademacher", "sjlt", "sketch"])
def test_nan_and_infinity_are_propagated(kind: str, value: float, device: torch.device) -> None:
    batch = make_batch("linear", 6, 5, 39, 21, ragged=False)
    for b, column in enumerate((0, 3, 17, 31, 38)):
        batch.x[b, 2, column] = value
    kwargs = arguments("linear", kind, batch, True, (18, 34))
    features = project(batch.to(device), **kwargs).cpu()
    assert features[5].isfinite().all()
    touched = features[:5, : 18 * 34].isfinite().logical_not()
    if kind == "rademacher":
        assert touched.all()
    elif kind == "sjlt":  # a column of x reaches one column of the projection only
        assert (touched.view(5, 18, 34).any(1).sum(1) == 1).all()
    else:  # every row of the gradient has the value in one number
        assert ((touched.sum(1) > 21 // 2) & (touched.sum(1) <= 21)).all()


@pytest.mark.parametrize("layer", LAYERS)
def test_inputs_without_a_token_dimension_have_one_token(layer: str, device: torch.device) -> None:
    batch = make_batch(layer, 5, 1, 33, 31, ragged=False)
    kwargs = arguments(layer, "rademacher", batch, False, (3, 4))
    flat = Batch(batch.x.squeeze(1), batch.g.squeeze(1), None)
    assert torch.equal(
        project(batch.to(device), **kwargs).cpu(), project(flat.to(device), **kwargs).cpu()
    )


def test_adds_to_its_slot_and_writes_nowhere_else(device: torch.device) -> None:
    batch = make_batch("linear", 3, 5, 7, 6).to(device)
    kwargs = arguments("linear", "rademacher", batch, True, (2, 3))
    once = project(batch, **kwargs)
    out = torch.full((3, 20), 2.0, device=device)
    kernels.project_gradients(batch.x, batch.g, out, lengths=batch.lengths, offset=9, **kwargs)
    torch.testing.assert_close(out[:, 9:15], once[:, :6] + 2, rtol=2e-7, atol=2e-7)
    assert (out[:, :9] == 2).all()
    assert (out[:, 15:] == 2).all()


def test_an_empty_batch(device: torch.device) -> None:
    out = torch.zeros(0, 8, device=device)
    x = torch.zeros(0, 4, 3, device=device)
    kernels.project_gradients(x, x, out, k_out=2, k_in=2, **KEYS)


def test_no_tokens(device: torch.device) -> None:
    out = torch.zeros(2, 4, device=device)
    x = torch.zeros(2, 0, 3, device=device)
    kernels.project_gradients(x, x, out, k_out=2, k_in=2, bias=True, **KEYS)
    assert not out.any()


@pytest.mark.parametrize(("layer", "kind", "bias"), KINDS)
def test_bits_do_not_depend_on_batch_order_padding_or_threads(
    layer: str, kind: str, bias: bool, device: torch.device, threads: None
) -> None:
    batch = make_batch(layer, 9, 50, 300, 90).to(device)
    kwargs = arguments(layer, kind, batch, bias, (70, 20))
    whole = project(batch, **kwargs)
    assert whole.isfinite().all()  # although the padding is NaN
    order = [4, 0, 8, 2, 1, 7, 3, 5, 6]
    assert torch.equal(project(batch.rows(order), **kwargs), whole[order])
    for row in (1, 8):
        assert torch.equal(project(batch.rows([row]), **kwargs), whole[[row]])
    assert batch.lengths is not None
    short = int(batch.lengths[:5].max())
    cut = Batch(
        batch.x[:5, :short].contiguous(), batch.g[:5, :short].contiguous(), batch.lengths[:5]
    )
    assert torch.equal(project(cut, **kwargs), whole[:5])
    torch.set_num_threads(1 if torch.get_num_threads() > 1 else 3)
    assert torch.equal(project(batch, **kwargs), whole)


@pytest.mark.parametrize(
    ("layer", "kind"), [kind[:2] for kind in KINDS if kind[1] != "identity" and not kind[2]]
)
def test_inner_products_are_right_on_average(layer: str, kind: str, device: torch.device) -> None:
    batch = make_batch(layer, 2, 4, 6, 5, ragged=False)
    exact = torch.zeros(2, 2, dtype=torch.float64)
    x, g, _ = batch.cast(torch.float64)
    reference.gradient_dot(x, g, x, g, exact, layer=layer)
    x, g, _ = batch.to(device)
    seeds = 600
    out = torch.zeros(seeds, 2, 16, device=device)
    kwargs = arguments(layer, kind, batch, False, (4, 4))
    for seed in range(seeds):
        kernels.project_gradients(x, g, out[seed], **{**kwargs, "seed": seed})
    products = (out[:, :, None] * out[:, None]).sum(-1).double().cpu()
    z = (products.mean(0) - exact) / (products.std(0) / seeds**0.5).clamp_min(1e-9)
    assert z.abs().max() < 4.5, z


@pytest.mark.parametrize("k", [4, 16, 50])
def test_a_sketch_varies_no_more_than_one_that_hashes_every_element(
    k: int, device: torch.device
) -> None:
    """For nearly collinear products of one token, as in a classifier, and for random ones."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(2, 33, generator=generator)
    x, g = (part + 0.1 * torch.randn(2, 33, generator=generator) for part in common[:, None])
    x[1], g[1] = torch.randn(2, 33, generator=generator) if k == 50 else (x[1], g[1])
    formed = g[:, :, None] * x[:, None, :]
    dot, squares = (formed[0] * formed[1]).sum(), formed.square().sum((1, 2))
    seeds = 800
    out = torch.zeros(seeds, 2, k, device=device)
    for seed in range(seeds):
        kernels.project_gradients(
            x.to(device), g.to(device), out[seed], kind="sketch", k_out=1, k_in=k,
            **{**KEYS, "seed": seed},
        )  # fmt: skip
    products = (out[:, 0] * out[:, 1]).sum(-1).cpu()
    bound = ((squares[0] * squares[1] + dot**2) / k).sqrt()
    assert (products.mean() - dot).abs() < 4.5 * bound / seeds**0.5
    # The sample's own standard error is about 6% here, since such products have heavy tails.
    assert products.std() < 1.2 * bound


def test_cuda_gives_the_entries_of_the_cpu(device: torch.device) -> None:
    """With one-hot x and g, a feature is a product of two entries, so compare exactly."""
    eye = torch.eye(40)
    kwargs = {**KEYS, "k_out": 70, "k_in": 66}
    for kind in ("rademacher", "sjlt"):
        r_in = kernels.projection_matrix(kind, 66, 40, 5, 2).sign()
        r_out = kernels.projection_matrix(kind, 70, 40, 5, 3).sign()
        out = torch.zeros(40, 70 * 66, device=device)
        kernels.project_gradients(eye.to(device), eye.to(device), out, kind=kind, **kwargs)
        signs = out.cpu().view(40, 70, 66).sign()
        assert torch.equal(signs, r_out.T[:, :, None] * r_in.T[:, None, :])


def test_invalid_lengths_on_a_gpu_give_nan(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("on the CPU they raise")
    for layer in LAYERS:
        x, g, _ = make_batch(layer, 3, 4, 5, 5, ragged=False).to(device)
        out = torch.zeros(3, 4, device=device)
        lengths = torch.tensor([4, 5, -1], device=device)
        kernels.project_gradients(x, g, out, lengths=lengths, layer=layer, k_out=2, k_in=2, **KEYS)
        assert out[0].isfinite().all()
        assert out[1:].isnan().any(dim=1).all()


X, G = torch.zeros(2, 4, 3), torch.zeros(2, 4, 5)
TWO: dict[str, Any] = {"g": [G, G], "output_key": [3, 4]}
INVALID: list[tuple[dict[str, Any], str]] = [
    ({"x": X.double()}, r"x: expected float32, got float64"),
    ({"g": G.half()}, r"g: expected float32 or bfloat16, got float16"),
    ({"g": G.bfloat16()}, r"x: expected bfloat16, got float32"),
    ({"x": torch.zeros(4, 3)}, r"g: expected shape \(B, O\).*, got \(2, 4, 5\)"),
    ({"x": torch.zeros(3)}, r"x: expected shape \(B, S, I\) or \(B, I\), got \(3,\)"),
    ({"g": torch.zeros(2, 3, 5)}, r"g: expected shape .* = \(2, 4, 5\), got \(2, 3, 5\)"),
    ({"x": torch.zeros(2, 3, 4).transpose(1, 2)}, r"x: expected a contiguous tensor, got strides"),
    ({"out": torch.zeros(2, 8).double()}, r"out: expected float32, got float64"),
    ({"out": torch.zeros(3, 8)}, r"out: expected shape \(B, K\) = \(2, 8\), got \(3, 8\)"),
    ({"out": torch.zeros(8, 2).T}, r"out: expected a contiguous tensor"),
    ({"lengths": torch.tensor([1, 5])}, r"lengths: expected values from 0 to S = 4, got 5 at ex"),
    ({"lengths": torch.tensor([-1, 2])}, r"lengths: expected .* got -1 at example 0"),
    ({"lengths": torch.tensor([1, 2, 3])}, r"lengths: expected shape \(B,\) = \(2,\), got \(3,\)"),
    ({"lengths": torch.tensor([1, 2], dtype=torch.int32)}, r"lengths: expected int64, got int32"),
    ({"k_out": 3}, r"k_out, k_in and offset: expected offset \+ k_out \* k_in of at most K = 8"),
    ({"k_in": 0}, r"k_in: expected 1 or more, got 0"),
    ({"offset": 1}, r"k_out, k_in and offset: expected .* got 1 \+ 2 \* 4"),
    ({"offset": -1}, r"offset: expected 0 or more, got -1"),
    ({"kind": "identity"}, r"k_out and k_in: expected 5 and 3 for kind identity, got 2 and 4"),
    ({"kind": "gauss"}, r"kind: expected one of rademacher, sjlt, identity, sketch, got 'gauss'"),
    ({"layer": "conv"}, r"layer: expected one of linear, elementwise, embedding, got 'conv'"),
    ({"layer": "elementwise"}, r"g: expected shape of x = \(2, 4, 3\), got \(2, 4, 5\)"),
    ({"layer": "embedding"}, r"x: expected int64, got float32"),
    ({"output_key": 2}, r"output_key: expected .*input_key.*, got 2"),
    (
        {"layer": "embedding", "x": torch.zeros(2, 4, dtype=torch.int64), "bias": True},
        r"bias: expected False for layer embedding, got True",
    ),
    ({"g": []}, r"g: expected 1 to 4 tensors, got 0"),
    ({"g": [G] * 5, "output_key": [3, 4, 5, 6, 7]}, r"g: expected 1 to 4 tensors, got 5"),
    ({"g": [G, G]}, r"output_key: expected .* g, 2, got 1"),
    ({"g": [G, G], "output_key": [3, 2]}, r"output_key: expected .*input_key.*, got 2"),
    ({"g": [G, G], "output_key": [3, 3]}, r"output_key: expected distinct keys .* got 3 twice"),
    ({**TWO, "g": [G, G.bfloat16()]}, r"g\[1\]: expected float32, got bfloat16"),
    ({**TWO, "g": [G, torch.zeros(2, 3, 5)]}, r"g\[1\]: expected shape .* got \(2, 3, 5\)"),
    (
        {**TWO, "layer": "elementwise", "g": [X, X]},
        r"g: expected .*linear, got 2",
    ),
    ({**TWO, "kind": "identity"}, r"g: expected one tensor for kind identity, got 2"),
    ({**TWO, "kind": "sketch"}, r"g: expected one tensor for kind sketch with rows 0, got 2"),
    ({"kind": "sketch", "rows": -1}, r"rows: expected 0 or more.*, got -1"),
    ({"rows": 3}, r"rows: expected 0 unless .*sketch, got 3"),
    (
        {**TWO, "output_columns": torch.arange(5)},
        r"output_columns: expected .* g, 2, got 1",
    ),
    (
        {**TWO, "output_columns": [None, torch.arange(4)]},
        r"output_columns\[1\]: expected shape \(O,\) = \(5,\), got \(4,\)",
    ),
    ({"output_columns": torch.arange(5.0)}, r"output_columns: expected int64, got float32"),
    ({"output_columns": torch.arange(10)[::2]}, r"output_columns: expected a contiguous tensor"),
    (
        {"input_columns": torch.arange(3), "bias": True},
        r"input_columns: expected shape \(I \+ bias,\) = \(4,\), got \(3,\)",
    ),
    (
        {"input_columns": torch.tensor([1, -2, 0])},
        r"input_columns: expected values of 0 or more, got -2 at column 1",
    ),
    (
        {"layer": "elementwise", "g": X, "input_columns": torch.arange(3)},
        r"input_columns: expected None .*linear, got a tensor",
    ),
    (
        {"kind": "identity", "k_out": 5, "k_in": 3, "out": torch.zeros(2, 15)}
        | {"output_columns": torch.arange(5)},
        r"output_columns: expected None for kind identity, got a tensor",
    ),
]


ARGUMENTS_ON_CPU = ("lengths", "input_columns", "output_columns")


def to(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [to(part, device) for part in value]
    return value.to(device) if isinstance(value, Tensor) else value


@pytest.mark.parametrize(("change", "message"), INVALID, ids=[message for _, message in INVALID])
def test_errors_name_the_invalid_argument(
    change: dict[str, Any], message: str, device: torch.device
) -> None:
    values = {"x": X, "g": G, "out": torch.zeros(2, 8), "k_out": 2, "k_in": 4, **KEYS, **change}
    on_device = {
        name: value if name in ARGUMENTS_ON_CPU else to(value, device)
        for name, value in values.items()
    }
    with pytest.raises(ValueError, match=f"project_gradients: {message}"):
        kernels.project_gradients(**on_device)


def test_errors_name_a_tensor_on_another_device(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs two devices")
    with pytest.raises(ValueError, match=r"g: expected the device of x, cuda:0, got cpu"):
        kernels.project_gradients(
            X.to(device), G, torch.zeros(2, 8, device=device), k_out=2, k_in=4, **KEYS
        )
