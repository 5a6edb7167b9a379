"""A replacement for `tracmod._C` that runs the CUDA kernels emulated on the CPU.

`build` compiles csrc/cuda with the headers of this folder; the ops have the signatures of
`tracmod._C`, but check no argument. `backwards` reverses the order in which warps and threads run.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, Structure, byref, c_bool, c_double, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
LAUNCH = re.compile(r"([\w:]+(?:<[^<>;=]*>)?)\s*<<<(.*?)>>>\((.*?)\);", re.DOTALL)
LAYERS = ["linear", "elementwise", "embedding"]
KINDS = ["rademacher", "sjlt", "identity"]
# Changes to the sources. Smaller limits make small tests run through many waves and parts. And only
# a score that is not finite may be computed again without tensor cores (top_k_dot.cu): that path
# would otherwise repair the NaN of a copy that was not waited for.
PLAIN = "score = plain_score(wave, q + row, n + column) + 0.0f;"
CHANGES = {
    "top_k_dot": {
        "kWaveBytes = int64_t{1} << 28": "kWaveBytes = 1 << 16",
        PLAIN: PLAIN + 'if (score - score == 0.0f) emu::fail("a finite score came out as NaN");',
    },
    "gradient_dot": {
        "kFormedBytes = int64_t{1} << 25": "kFormedBytes = 1 << 19",
        "kBlocks = 264": "kBlocks = 5",
    },
    "project_gradients": {"kBlocksWanted = 264": "kBlocksWanted = 7"},
    "quantize_rows": {"kMaxBlocks = int64_t{1} << 20": "kMaxBlocks = 5"},
}

backwards = False
_library: ctypes.CDLL | None = None


class Gradients(Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("x", "g", "lengths")],
        *[(name, c_int64) for name in ("batch", "tokens", "in_", "out")],
        ("dtype", c_int),
    ]


class Output(Structure):
    _fields_ = [("g", c_void_p), ("size", c_int64), ("key", c_uint64), ("columns", c_void_p)]


class Projection(Structure):
    _fields_ = [
        ("layer", c_int),
        ("kind", c_int),
        ("bias", c_bool),
        *[(name, c_int64) for name in ("k_out", "k_in")],
        *[(name, c_uint64) for name in ("seed", "input_key")],
        ("input_columns", c_void_p),
        ("outputs", c_int),
        ("output", Output * 4),
    ]


class Ranking(Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("scores", "indices")],
        ("k", c_int64),
    ]


class TopK(Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("queries", "trains", "width", "checkpoints")],
        *[(name, POINTER(c_void_p)) for name in ("query_rows", "train_rows")],
        ("weights", POINTER(c_double)),
        ("dtype", c_int),
        ("cosine", c_bool),
        ("index_offset", c_int64),
        ("groups", c_void_p),
        ("num_groups", c_int64),
        ("proponents", Ranking),
        ("opponents", Ranking),
        ("group_sums", c_void_p),
    ]


class Quantization(Structure):
    _fields_ = [
        ("rows", c_void_p),
        *[(name, c_int64) for name in ("count", "width")],
        ("dtype", c_int),
        *[(name, c_void_p) for name in ("codes", "scales")],
    ]


def build(folder: Path, compiler: str) -> None:
    """Compile all csrc/cuda/*.cu with launches replaced by calls, and load the result."""
    global _library
    flags = ["-std=c++17", "-O2", "-w", "-fPIC", "-ffp-contract=fast", "-DTRACMOD_EMULATE"]
    flags += [f"-I{HERE}", f"-I{CSRC}"]

    def compile_source(source: Path) -> Path:
        text = LAUNCH.sub(r"emu::launch(\1, [&] { \1(\3); }, \2);", source.read_text())
        for line, changed in CHANGES.get(source.stem, {}).items():
            assert line in text
            text = text.replace(line, changed)
        assert "<<<" not in text, f"{source.name}: a launch that the pattern does not match"
        copy, target = folder / f"{source.stem}.cpp", folder / f"{source.stem}.o"
        copy.write_text(text)
        subprocess.run([compiler, *flags, "-c", str(copy), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        sources = [*sorted((CSRC / "cuda").glob("*.cu")), HERE / "bindings.cpp"]
        objects = [str(path) for path in pool.map(compile_source, sources)]
    library = folder / "libemulated.so"
    subprocess.run([compiler, "-shared", *objects, "-o", str(library)], check=True)
    _library = ctypes.CDLL(str(library))


def _call(name: str, *arguments: object) -> None:
    assert _library is not None
    code = getattr(_library, f"emulated_{name}")(*arguments, int(backwards))
    assert code == 0, f"{name}: " + ("threw" if code == 1 else "wrote behind its scratch memory")


def _tensors(capsules: Any) -> list[Tensor | None]:
    """Return the tensors behind DLPack capsules; None stays None."""
    return [None if capsule is None else from_dlpack(capsule) for capsule in capsules]


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _dtype(tensor: Tensor) -> int:
    return [torch.float32, torch.bfloat16].index(tensor.dtype)


def _gradients(x: Tensor, g: Tensor, lengths: Tensor | None, layer: str) -> Gradients:
    tokens, size_in = g.shape[1] if g.dim() == 3 else 1, 1 if layer == "embedding" else x.shape[-1]
    return Gradients(
        _address(x), _address(g), _address(lengths), len(g), tokens, size_in, g.shape[-1], _dtype(g)
    )  # fmt: skip


def project_gradients(
    x: Any, g: Any, out: Any, lengths: Any, offset: int, layer: str, kind: str, k_out: int,
    k_in: int, seed: int, input_key: int, output_keys: Any, bias: bool, input_columns: Any,
    output_columns: Any, allocate: Any, threads: int, stream: int,
) -> None:  # fmt: skip
    x, out, lengths, input_columns = _tensors([x, out, lengths, input_columns])
    g, output_columns = _tensors(g), _tensors(output_columns)
    outputs = (Output * 4)(*(
        Output(_address(part), part.shape[-1], key, _address(columns))
        for part, key, columns in zip(g, output_keys, output_columns, strict=True)
    ))  # fmt: skip
    projection = Projection(
        LAYERS.index(layer), KINDS.index(kind), bias, k_out, k_in, seed, input_key,
        _address(input_columns), len(g), outputs,
    )  # fmt: skip
    if len(x):
        _call(
            "project_gradients", byref(_gradients(x, g[0], lengths, layer)), byref(projection),
            c_void_p(out.data_ptr() + 4 * offset), c_int64(out.shape[1]),
        )  # fmt: skip


def gradient_dot(
    x1: Any, g1: Any, x2: Any, g2: Any, out: Any, lengths1: Any, lengths2: Any, layer: str,
    bias: bool, allocate: Any, threads: int, stream: int,
) -> None:  # fmt: skip
    x1, g1, x2, g2, out = _tensors([x1, g1, x2, g2, out])
    lengths1, lengths2 = _tensors([lengths1, lengths2])
    first, second = _gradients(x1, g1, lengths1, layer), _gradients(x2, g2, lengths2, layer)
    if len(g1) and len(g2):
        _call(
            "gradient_dot", byref(first), byref(second), LAYERS.index(layer), int(bias),
            c_void_p(_address(out)),
        )  # fmt: skip


def top_k_dot(
    queries: Any, trains: Any, weights: list[float], cosine: bool, index_offset: int,
    groups: Any, scores: Any, indices: Any, opponent_scores: Any, opponent_indices: Any,
    group_sums: Any, allocate: Any, threads: int, stream: int,
) -> None:  # fmt: skip
    queries, trains, count = _tensors(queries), _tensors(trains), len(queries)
    groups, group_sums = _tensors([groups, group_sums])
    scores, indices = _tensors([scores, indices])
    opponent_scores, opponent_indices = _tensors([opponent_scores, opponent_indices])
    rankings = [
        Ranking(_address(scores), _address(indices), scores.shape[1]),
        Ranking(_address(opponent_scores), _address(opponent_indices), opponent_scores.shape[1]),
    ]
    pointers = [(c_void_p * count)(*map(_address, rows)) for rows in (queries, trains)]
    job = TopK(
        len(queries[0]), len(trains[0]), queries[0].shape[1], count, *pointers,
        (c_double * count)(*weights), _dtype(queries[0]), cosine, index_offset, _address(groups),
        0 if group_sums is None else group_sums.shape[1], *rankings, _address(group_sums),
    )  # fmt: skip
    if job.queries and job.trains:
        _call("top_k_dot", byref(job))


def quantize_rows(rows: Any, codes: Any, scales: Any, threads: int, stream: int) -> None:
    rows, codes, scales = _tensors([rows, codes, scales])
    job = Quantization(
        _address(rows), *rows.shape, _dtype(rows), _address(codes), _address(scales)
    )  # fmt: skip
    if job.count:
        _call("quantize_rows", byref(job))
