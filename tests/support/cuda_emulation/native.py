"""A replacement for `tracmod._C` that runs the CUDA kernels emulated on the CPU.

`build` compiles csrc/cuda with the headers of this folder; the ops have the signatures of
`tracmod._C`, but check no argument. `backwards` reverses the order in which warps and threads run.
A build with `check` watches every access to memory (checker.cpp): `start_check` and `reports`.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, Structure, byref, c_bool, c_double, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
LAUNCH = re.compile(r"([\w:]+(?:<[^<>;=]*>)?)\s*<<<(.*?)>>>\((.*?)\);", re.DOTALL)
BOUND = re.compile(r"__launch_bounds__\(([^(),]*)(?:,[^()]*)?\)\s*(\w+)\(")
BARRIER = re.compile(r"__syncthreads\(\);|__syncwarp\(\);")
CONTENTS = {"tensor": 1, "input": 2}  # numbers of checker.cpp
LAYERS = ["linear", "elementwise", "embedding"]
KINDS = ["rademacher", "sjlt", "identity", "sketch"]
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
    "project_gradients": {
        "kBlocksWanted = 264": "kBlocksWanted = 7",
        "kReducedNumbers = int64_t{1} << 24": "kReducedNumbers = 1 << 12",
    },
    "quantize_rows": {"kMaxBlocks = int64_t{1} << 20": "kMaxBlocks = 5"},
}

backwards = False
_library: ctypes.CDLL | None = None
_checks = False
_memory: list[tuple[Tensor, str]] = []  # tensors of the next call, and their content


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
        *[(name, c_int64) for name in ("k_out", "k_in", "rows")],
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


class Fault(NamedTuple):
    """A change of a source that makes it wrong, present in a build but switched off.

    Attributes:
        file: name of a file of csrc/cuda.
        start, end: offsets of the text that is replaced.
        replacement: C++ in its place, in which FAULT is true while the fault is switched on.
    """

    file: str
    start: int
    end: int
    replacement: str


def find_fault(file: str, text: str, replacement: str) -> Fault:
    """Return the fault that replaces a text, which must occur once in the file."""
    source = (CSRC / "cuda" / file).read_text()
    assert source.count(text) == 1, (
        f"csrc/cuda/{file}: expected once, got {source.count(text)}: {text}"
    )
    start = source.index(text)
    return Fault(file, start, start + len(text), replacement)


def removed_barriers() -> dict[str, Fault]:
    """Return a fault for every barrier of the sources, by file and line: the barrier is removed."""
    faults = {}
    for path in sorted((CSRC / "cuda").iterdir()):
        source = path.read_text()
        for match in BARRIER.finditer(source):
            line = source.count("\n", 0, match.start()) + 1
            faults[f"{path.name}:{line}"] = Fault(
                path.name, match.start(), match.end(), f"if (!FAULT) {match[0]}"
            )
    return faults


def _emulated_source(path: Path, faults: Sequence[Fault], bounds: dict[str, str]) -> str:
    """Return a source with its launches as calls of the emulation; lines keep their numbers."""
    text = path.read_text()
    numbered = [
        (fault, number) for number, fault in enumerate(faults, 1) if fault.file == path.name
    ]
    for fault, number in sorted(numbered, reverse=True):
        switched = fault.replacement.replace("FAULT", f"(emu::position.fault == {number})")
        text = text[: fault.start] + switched + text[fault.end :]
    for line, changed in CHANGES.get(path.stem, {}).items() if path.suffix == ".cu" else ():
        assert line in text, f"{path.name}: expected the text {line}"
        text = text.replace(line, changed)

    def call(match: re.Match[str]) -> str:
        kernel, configuration, arguments = match.groups()
        name = kernel.split("<")[0].split("::")[-1]
        launch = (
            f'emu::launch("{name}", static_cast<int>({bounds.get(name, "1024")}), {kernel}, '
            f"[=] {{ {kernel}({arguments}); }}, {configuration});"
        )
        return launch + "\n" * (match[0].count("\n") - launch.count("\n"))

    text = LAUNCH.sub(call, text)
    assert "<<<" not in text, f"{path.name}: a launch that the pattern does not match"
    return f'#line 1 "cuda/{path.name}"\n{text}'


def build(
    folder: Path, compiler: str, *, check: bool = False, faults: Sequence[Fault] = ()
) -> None:
    """Compile all csrc/cuda/*.cu with launches replaced by calls, and load the result.

    Args:
        folder: empty folder for the sources, objects and the library.
        compiler: g++.
        check: watch every access to memory.
        faults: faults that `start_check` can switch on, by their number, which begins at 1.
    """
    global _library, _checks
    (folder / "cuda").mkdir()
    paths = sorted((CSRC / "cuda").iterdir())
    bounds = {name: bound for path in paths for bound, name in BOUND.findall(path.read_text())}
    for path in paths:
        name = path.name.removesuffix(".cu") + (".cpp" if path.suffix == ".cu" else "")
        (folder / "cuda" / name).write_text(_emulated_source(path, faults, bounds))
    flags = ["-std=c++17", "-w", "-fPIC", "-ffp-contract=fast", "-DTRACMOD_EMULATE"]
    flags += [f"-I{HERE}", f"-I{folder}", f"-I{CSRC}", *(["-DTRACMOD_CHECK"] if check else [])]
    watched = ["-O1", "-g1", "-fsanitize=thread"] if check else ["-O2"]

    def compile_source(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        mode = watched if source.parent.name == "cuda" else ["-O2"]
        command = [compiler, *flags, *mode, "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        return str(target)

    sources = [
        *sorted((folder / "cuda").glob("*.cpp")),
        HERE / "bindings.cpp",
        HERE / "emulator.cpp",
    ]
    sources += [HERE / "checker.cpp"] if check else []
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_source, sources))
    library = folder / "libemulated.so"
    subprocess.run([compiler, "-shared", *objects, "-o", str(library), "-ldl"], check=True)
    _library, _checks = ctypes.CDLL(str(library)), check
    if check:
        _library.check_reports.restype = ctypes.c_char_p


def start_check(fault: int = 0) -> None:
    """Forget the reports so far, and switch a fault on (0: none)."""
    assert _library is not None
    _library.check_begin(fault)


def reports() -> list[str]:
    """Return what the checker reported since `start_check`, one sentence each."""
    assert _library is not None
    text = _library.check_reports().decode()
    places = sorted(set(re.findall(r"@(0x[0-9a-f]+)@", text)))
    if places:
        command = ["addr2line", "-e", _library._name, *places]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split(
            "\n"
        )
        for place, line in zip(places, lines, strict=False):
            text = text.replace(f"@{place}@", re.sub(r".*/(?=cuda/)| \(.*", "", line))
    return text.splitlines()


def _call(name: str, *arguments: object) -> None:
    """Run an op; a build that checks gets to know its tensors."""
    assert _library is not None
    for tensor, content in _memory if _checks else ():
        _library.check_add_memory(
            content.encode(), c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes),
            CONTENTS[content],
        )  # fmt: skip
    code = getattr(_library, f"emulated_{name}")(*arguments, int(backwards))
    if _checks:
        _library.check_remove_memory()
    _memory.clear()
    assert code == 0, f"{name}: " + ("threw" if code == 1 else "wrote behind its scratch memory")


def _tensors(capsules: Any) -> list[Tensor | None]:
    """Return the tensors behind DLPack capsules; None stays None."""
    return [None if capsule is None else from_dlpack(capsule) for capsule in capsules]


def _address(tensor: Tensor | None, content: str = "input") -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    _memory.append((tensor, content))
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
    k_in: int, rows: int, seed: int, input_key: int, output_keys: Any, bias: bool,
    input_columns: Any, output_columns: Any, allocate: Any, threads: int, stream: int,
) -> None:  # fmt: skip
    x, out, lengths, input_columns = _tensors([x, out, lengths, input_columns])
    g, output_columns = _tensors(g), _tensors(output_columns)
    outputs = (Output * 4)(*(
        Output(_address(part), part.shape[-1], key, _address(columns))
        for part, key, columns in zip(g, output_keys, output_columns, strict=True)
    ))  # fmt: skip
    projection = Projection(
        LAYERS.index(layer), KINDS.index(kind), bias, k_out, k_in, rows, seed, input_key,
        _address(input_columns), len(g), outputs,
    )  # fmt: skip
    _address(out, "tensor")
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
            c_void_p(_address(out, "tensor")),
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
        Ranking(_address(scores, "tensor"), _address(indices, "tensor"), scores.shape[1]),
        Ranking(
            _address(opponent_scores, "tensor"),
            _address(opponent_indices, "tensor"),
            opponent_scores.shape[1],
        ),
    ]
    pointers = [(c_void_p * count)(*map(_address, rows)) for rows in (queries, trains)]
    job = TopK(
        len(queries[0]), len(trains[0]), queries[0].shape[1], count, *pointers,
        (c_double * count)(*weights), _dtype(queries[0]), cosine, index_offset, _address(groups),
        0 if group_sums is None else group_sums.shape[1], *rankings,
        _address(group_sums, "tensor"),
    )  # fmt: skip
    if job.queries and job.trains:
        _call("top_k_dot", byref(job))


def quantize_rows(rows: Any, codes: Any, scales: Any, threads: int, stream: int) -> None:
    rows, codes, scales = _tensors([rows, codes, scales])
    job = Quantization(
        _address(rows), *rows.shape, _dtype(rows), _address(codes, "tensor"),
        _address(scales, "tensor"),
    )  # fmt: skip
    if job.count:
        _call("quantize_rows", byref(job))
