"""The libraries that are compared, and the environments that they run in."""

from __future__ import annotations

import ast
import importlib
import io
import subprocess
import sys
import sysconfig
import tokenize
import venv
from pathlib import Path
from typing import Any, Literal, NamedTuple

FOLDER = Path(__file__).resolve().parent
# Libraries in environments of their own, with what they need beside torch, transformers and
# datasets, which they share with tracmod. They are installed without their other dependencies:
# bergson asks for torchvision and torchaudio, which are not imported here, and LogIX for an older
# Python.
INSTALLED: dict[str, list[str]] = {
    "bergson": [
        "bergson==2.5.1", "jaxtyping", "ml_dtypes", "natsort", "peft", "petname", "simple-parsing",
        "docstring-parser", "torchopt", "optree", "wadler-lindig",
    ],
    "dattri": ["dattri==0.3.0", "pretty_midi", "mido"],
    "logix": ["logix-ai==0.1.1"],
}  # fmt: skip


class Method(NamedTuple):
    """A way to compute scores.

    Attributes:
        label: name for readers.
        package: distribution whose version is recorded.
        module: script in this folder.
        function: function of the script. `features` return (N, K), `exact` scores (Q, N).
        kind: what the function returns; a floor returns nothing.
        options: arguments of the function.
        parameters: parameters that are attributed: all linear layers, or LayerNorm too (encoder).
    """

    label: str
    package: str
    module: str
    function: str
    kind: Literal["floor", "features", "exact"]
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    parameters: Literal["linear", "encoder"] = "linear"

    @property
    def script(self) -> Path:
        return FOLDER / f"{self.module}.py"


def _tracmod(numbers: int, dtype: str) -> Method:
    return Method(
        f"tracmod, K {numbers:,}, {dtype}", "tracmod", "use_tracmod", "features", "features",
        {"numbers": numbers, "dtype": dtype}, "encoder",
    )  # fmt: skip


METHODS: dict[str, Method] = {
    "floor": Method("plain floor", "torch", "use_floor", "plain", "floor"),
    "lean": Method("lean floor", "torch", "use_floor", "lean", "floor"),
    **{
        f"tracmod-{numbers}{'' if dtype == 'float32' else '-bfloat16'}": _tracmod(numbers, dtype)
        for dtype in ("float32", "bfloat16")
        for numbers in (1024, 4096, 8192)
    },
    "bergson": Method("bergson", "bergson", "use_bergson", "features", "features"),
    "dattri-logra": Method("dattri, LoGra", "dattri", "use_dattri", "features", "features"),
    "dattri-factgrass": Method(
        "dattri, FactGraSS", "dattri", "use_dattri", "features", "features",
        {"method": "factgrass"},
    ),
    "logix": Method("LogIX", "logix-ai", "use_logix", "features", "features"),
    "torch-logra": Method("plain torch, LoGra", "torch", "use_torch", "logra", "features"),
    "torch-countsketch": Method(
        "plain torch, CountSketch", "torch", "use_torch", "countsketch", "features"
    ),
    "tracmod-exact": Method(
        "tracmod, exact", "tracmod", "use_tracmod", "exact", "exact", parameters="encoder"
    ),
    "captum": Method("captum, exact", "captum", "use_captum", "scores", "exact"),
    "kronfluence": Method(
        "kronfluence, exact", "kronfluence", "use_kronfluence", "scores", "exact"
    ),
    "naive": Method("naive, one example at a time", "torch", "use_torch", "naive", "exact"),
}  # fmt: skip


def script_lines(path: Path) -> int:
    """Return the number of lines of code in a file, without comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    ignored = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
               tokenize.ENDMARKER, tokenize.ENCODING}  # fmt: skip
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in ignored:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and body:
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                lines.difference_update(range(first.lineno, (first.end_lineno or 0) + 1))
    return len(lines)


# --- environments ---------------------------------------------------------------------------


def interpreter(package: str, cache: Path) -> Path:
    """Return the Python interpreter that runs a library."""
    name = package.removesuffix("-ai")
    return cache / name / "bin" / "python" if name in INSTALLED else Path(sys.executable)


def is_installed(package: str, cache: Path) -> bool:
    """Return whether the library can be imported in its environment."""
    python = interpreter(package, cache)
    if not python.exists():
        return False
    command = f"import importlib.metadata as m; m.version({package!r})"
    done = subprocess.run([python, "-c", command], capture_output=True, check=False)
    return done.returncode == 0


def make_environments(cache: Path) -> None:
    """Make the environments of `INSTALLED`; each sees the packages of this one behind its own."""
    for name, requirements in INSTALLED.items():
        folder = cache / name
        if not (folder / "bin" / "python").exists():
            venv.create(folder, with_pip=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        shared = folder / "lib" / version / "site-packages" / "shared.pth"
        shared.write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps",
               "--ignore-requires-python", *requirements]  # fmt: skip
        done = subprocess.run(pip, check=False)
        print(f"{name}: {'installed' if done.returncode == 0 else 'not installable here'}")


def load_function(method: Method) -> Any:
    """Import the script of a method, in the environment that runs it; return its function."""
    module = importlib.import_module(f"tracmod.bench.peers.{method.module}")
    return getattr(module, method.function)
