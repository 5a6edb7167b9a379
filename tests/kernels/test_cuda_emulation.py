"""The CUDA kernels, emulated on the CPU, in the tests that they have to pass on a GPU.

g++ compiles them with replacements of CUDA's header and of the tensor cores' instructions, and
every thread runs as a fiber. This finds wrong indices, races between barriers, missing waits and
writes behind the scratch memory. It does not show speed or the rounding of the real instructions.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import test_kernels_dot as dots
import test_kernels_project as projections
import test_kernels_quantize as quantized
import test_kernels_top_k as top_k
import torch
from cuda_emulation import native
from kernel_cases import DTYPES, LAYERS, SIZES, make_batch

from tracmod import kernels

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("emulation")
    native.build(folder, compiler)
    return folder


@pytest.fixture(autouse=True)
def emulated(request: pytest.FixtureRequest, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the native module; tests in bfloat16 run the threads in reverse order."""
    monkeypatch.setattr(kernels, "_C", native)
    monkeypatch.setattr(native, "backwards", "bfloat16" in request.node.name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [None, "cosine"])
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1, 1),
        (2, 3, 31, 33, 3),
        (3, 33, 129, 40, 127),
        (1, 131, 300, 127, 5),
        (2, 9, 260, 264, 5),
    ],
)
def test_top_k_dot(sizes: tuple[int, ...], normalize: Any, dtype: torch.dtype) -> None:
    top_k.test_matches_the_reference(*sizes, normalize, dtype, CPU)


def test_a_short_ranking_of_opponents() -> None:
    top_k.test_the_ranking_of_opponents_has_a_length_of_its_own(1, CPU)


@pytest.mark.parametrize("block", [37, 1100])
def test_top_k_dot_streamed(block: int) -> None:
    q, n = top_k.make_rows(2, 7, 9, 0), top_k.make_rows(2, 1500, 9, 1)
    groups = torch.arange(1500) * 7 % 3
    kwargs: dict[str, Any] = {"k": 20, "weights": [1.0, 0.5], "num_groups": 3}
    whole, state = kernels.top_k_dot(q, n, groups=groups, **kwargs), None
    for start in range(0, 1500, block):
        rows = slice(start, start + block)
        state = kernels.top_k_dot(
            q, [part[rows].clone() for part in n], groups=groups[rows].clone(), state=state,
            index_offset=start, **kwargs,
        )  # fmt: skip
    assert state is not None
    top_k.assert_same(state, whole)


def test_top_k_dot_rankings() -> None:
    top_k.test_ties_go_to_the_lower_index(CPU)
    for k in (20, 900):
        top_k.test_many_ties(k, CPU)
    top_k.test_fewer_rows_than_k(CPU)
    top_k.test_no_rows_or_no_queries(CPU)
    top_k.test_cosine_of_a_zero_row_is_zero(CPU)
    for dtype in DTYPES:
        top_k.test_nan_comes_first_in_both_rankings(9, dtype, CPU)


def test_top_k_dot_of_wide_rows() -> None:
    q, n = top_k.make_rows(1, 2, 4100, 0), top_k.make_rows(1, 40, 4100, 1)
    top = kernels.top_k_dot(q, n, k=40)
    truth, plain = (
        top_k.reference.scores([q[0].to(dtype)], [n[0].to(dtype)])
        for dtype in (torch.float64, torch.float32)
    )
    best = top_k.reference.top_k
    top_k.assert_close(top.scores, best(truth, 40)[0], best(plain, 40)[0])


def test_an_invalid_group_gives_nan() -> None:
    top = kernels.top_k_dot(
        [torch.ones(2, 3)], [torch.ones(4, 3)], k=1, groups=torch.tensor([0, 1, 2, 0]), num_groups=2
    )
    assert top.group_sums is not None
    assert top.group_sums.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES["gradient_dot"], ids=str)
@pytest.mark.parametrize(("layer", "bias"), dots.KINDS)
def test_gradient_dot(layer: str, bias: bool, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    dots.test_matches_the_reference(layer, bias, sizes, dtype, CPU)


# More than one tile: long and short examples, as pairs of tokens and as formed gradients.
MANY_TILES = [
    ((2, 130, 2, 200, 320, 320), torch.float32),
    ((2, 130, 2, 200, 320, 320), torch.bfloat16),
    ((3, 60, 2, 260, 270, 270), torch.bfloat16),
    ((130, 1, 131, 1, 7, 9), torch.float32),
    ((2, 300, 3, 260, 140, 150), torch.float32),
    ((2, 300, 3, 260, 140, 150), torch.bfloat16),
    ((130, 9, 3, 9, 5, 5), torch.float32),
]


@pytest.mark.parametrize(("sizes", "dtype"), MANY_TILES, ids=str)
def test_gradient_dot_of_many_tiles(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    dots.test_matches_the_reference("linear", True, sizes, dtype, CPU)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradient_dot_adds_and_takes_inputs_without_a_token_dimension(layer: str) -> None:
    dots.test_inputs_without_a_token_dimension_have_one_token(layer, CPU)
    dots.test_adds_to_out(CPU)
    dots.test_empty_batches(CPU)


@pytest.mark.parametrize(("tokens", "size"), [(9, 200), (70, 20)], ids=["pairs", "formed"])
def test_gradient_dot_repeats_its_bits(tokens: int, size: int) -> None:
    threads = torch.get_num_threads()
    for layer, bias in dots.KINDS:
        dots.test_bits_do_not_depend_on_order_padding_or_threads(
            layer, bias, tokens, size, torch.float32, CPU, None
        )
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("tokens", "size"), [(9, 50), (40, 9)], ids=["pairs", "formed"])
@pytest.mark.parametrize("layer", LAYERS)
def test_invalid_lengths_give_nan_for_their_pairs_only(layer: str, tokens: int, size: int) -> None:
    batch = make_batch(layer, 3, tokens, size, size, ragged=False)
    out = torch.zeros(3, 3)
    kernels.gradient_dot(
        batch.x, batch.g, batch.x, batch.g, out, lengths1=torch.tensor([tokens, tokens + 1, -1]),
        lengths2=torch.tensor([tokens, 0, 10**9]), layer=layer,  # type: ignore[arg-type]
    )  # fmt: skip
    assert out.isnan().tolist() == [[False, False, True], [True] * 3, [True] * 3]
    assert not out[0, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rademacher", "sjlt", "identity"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("sizes", SIZES["project_gradients"][2:4], ids=str)
def test_project_gradients(
    layer: str, kind: str, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    if (layer, kind) != ("embedding", "identity"):
        projections.test_matches_the_reference(layer, kind, False, sizes, dtype, CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", quantized.WIDTHS)
def test_quantize_rows(width: int, dtype: torch.dtype) -> None:
    quantized.test_matches_the_reference(width, dtype, CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_rows_that_are_special_or_unaligned(dtype: torch.dtype) -> None:
    quantized.test_zero_and_tiny_rows_have_scale_and_codes_zero(dtype, CPU)
    quantized.test_the_largest_numbers(dtype, CPU)
    quantized.test_empty_rows(dtype, CPU)
    for column in (0, 20, 130):
        quantized.test_nan_and_infinity_appear_in_the_scale_of_their_row_only(column, dtype, CPU)
    for width in (1, 15, 16, 64, 130):
        quantized.test_unaligned_outputs_are_written_and_nothing_beside_them(width, dtype, CPU)


def test_quantize_rows_rounds_each_step() -> None:
    quantized.test_a_product_is_rounded_to_float32_before_it_is_rounded_to_a_code(CPU)
    quantized.test_ties_go_to_even(CPU)
    quantized.test_a_number_is_off_by_half_a_scale_at_most(CPU)
