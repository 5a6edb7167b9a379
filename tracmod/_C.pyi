import collections.abc
import typing

import typing_extensions

def build_info() -> dict: ...
def check_columns(columns: typing_extensions.CapsuleType, op: str, argument: str) -> None: ...
def check_lengths(
    lengths: typing_extensions.CapsuleType,
    batch: typing.SupportsInt | typing.SupportsIndex,
    tokens: typing.SupportsInt | typing.SupportsIndex,
    op: str,
    argument: str,
) -> None: ...
def gradient_dot(
    x1: typing_extensions.CapsuleType,
    g1: typing_extensions.CapsuleType,
    x2: typing_extensions.CapsuleType,
    g2: typing_extensions.CapsuleType,
    out: typing_extensions.CapsuleType,
    lengths1: typing_extensions.CapsuleType | None,
    lengths2: typing_extensions.CapsuleType | None,
    layer: str,
    bias: bool,
    allocate: collections.abc.Callable,
    threads: typing.SupportsInt | typing.SupportsIndex,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def linear(
    x: typing_extensions.CapsuleType,
    weight: typing_extensions.CapsuleType,
    out: typing_extensions.CapsuleType,
    bias: typing_extensions.CapsuleType | None,
    transposed: bool,
    allocate: collections.abc.Callable,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def project_gradients(
    x: typing_extensions.CapsuleType,
    g: collections.abc.Sequence[typing_extensions.CapsuleType],
    out: typing_extensions.CapsuleType,
    lengths: typing_extensions.CapsuleType | None,
    offset: typing.SupportsInt | typing.SupportsIndex,
    layer: str,
    kind: str,
    k_out: typing.SupportsInt | typing.SupportsIndex,
    k_in: typing.SupportsInt | typing.SupportsIndex,
    rows: typing.SupportsInt | typing.SupportsIndex,
    seed: typing.SupportsInt | typing.SupportsIndex,
    input_key: typing.SupportsInt | typing.SupportsIndex,
    output_keys: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    bias: bool,
    input_columns: typing_extensions.CapsuleType | None,
    output_columns: collections.abc.Sequence[typing_extensions.CapsuleType | None],
    allocate: collections.abc.Callable,
    threads: typing.SupportsInt | typing.SupportsIndex,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def projection_matrix(
    out: typing_extensions.CapsuleType,
    kind: str,
    seed: typing.SupportsInt | typing.SupportsIndex,
    key: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def quantize_rows(
    rows: typing_extensions.CapsuleType,
    codes: typing_extensions.CapsuleType,
    scales: typing_extensions.CapsuleType,
    threads: typing.SupportsInt | typing.SupportsIndex,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def top_k_dot(
    queries: collections.abc.Sequence[typing_extensions.CapsuleType],
    trains: collections.abc.Sequence[typing_extensions.CapsuleType],
    weights: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
    cosine: bool,
    index_offset: typing.SupportsInt | typing.SupportsIndex,
    groups: typing_extensions.CapsuleType | None,
    scores: typing_extensions.CapsuleType,
    indices: typing_extensions.CapsuleType,
    opponent_scores: typing_extensions.CapsuleType,
    opponent_indices: typing_extensions.CapsuleType,
    group_sums: typing_extensions.CapsuleType | None,
    allocate: collections.abc.Callable,
    threads: typing.SupportsInt | typing.SupportsIndex,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
