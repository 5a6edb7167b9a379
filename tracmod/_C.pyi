"""Types of the native module; tensors are DLPack capsules. Sizes and meaning: csrc/module.cpp."""

from collections.abc import Callable
from typing import Any

_Allocate = Callable[[int], Any]

def build_info() -> dict[str, Any]: ...
def check_lengths(lengths: Any, batch: int, tokens: int, op: str, argument: str, /) -> None: ...
def check_columns(columns: Any, op: str, argument: str, /) -> None: ...
def project_gradients(
    x: Any,
    g: list[Any],
    out: Any,
    lengths: Any | None,
    offset: int,
    layer: str,
    kind: str,
    k_out: int,
    k_in: int,
    seed: int,
    input_key: int,
    output_keys: list[int],
    bias: bool,
    input_columns: Any | None,
    output_columns: list[Any | None],
    allocate: _Allocate,
    threads: int,
    stream: int,
    /,
) -> None: ...
def linear(
    x: Any,
    weight: Any,
    out: Any,
    bias: Any | None,
    transposed: bool,
    allocate: _Allocate,
    threads: int,
    /,
) -> None: ...
def gradient_dot(
    x1: Any,
    g1: Any,
    x2: Any,
    g2: Any,
    out: Any,
    lengths1: Any | None,
    lengths2: Any | None,
    layer: str,
    bias: bool,
    allocate: _Allocate,
    threads: int,
    stream: int,
    /,
) -> None: ...
def top_k_dot(
    queries: list[Any],
    trains: list[Any],
    weights: list[float],
    cosine: bool,
    k: int,
    index_offset: int,
    groups: Any | None,
    scores: Any,
    indices: Any,
    opponent_scores: Any,
    opponent_indices: Any,
    group_sums: Any | None,
    allocate: _Allocate,
    threads: int,
    stream: int,
    /,
) -> None: ...
def quantize_rows(rows: Any, codes: Any, scales: Any, threads: int, stream: int, /) -> None: ...
def projection_matrix(out: Any, kind: str, seed: int, key: int, /) -> None: ...
