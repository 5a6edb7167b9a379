"""The layout holds: imports run one way, and some are allowed in one place only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# From the bottom up: a package may import those before it.
LAYERS = [
    "kernels config files",
    "tasks models engine",
    "subnetworks",
    "training gradients",
    "features",
    "influence",
    "analysis",
    "validation",
    "report",
    "study",
    "attribution",
    "cli",
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
ONLY_IN = {
    "tracmod._C": {"tracmod/kernels/native.py"},
    "faiss": {"tracmod/influence/index.py"},
    "ray": {"tracmod/engine/ray.py"},
    "bm25s": {"tracmod/validation/baselines.py"},
    "click": {"cli/__init__.py"},
    "matplotlib": {"tracmod/report/paper/matplotlib_plots.py"},
    "plotly": {"tracmod/report/html/plotly_plots.py"},
    "gradio": {"tracmod/attribution/explore.py"},
}
FORBIDDEN = re.compile(r"^\s*(import|from) pickle|torch\.load\(|trust_remote_code=True", re.M)


def sources():
    for folder in ("tracmod", "cli", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, str(path.relative_to(ROOT))


def imported(path):
    """Every module that the file imports, within functions too, TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package(module):
    """The package of `tracmod.package.file`, or None for the front."""
    return module.split(".")[1] if module.count(".") else None


def test_imports_run_one_way():
    wrong = []
    for path, name in sources():
        own = (
            "cli" if name.startswith("cli") else package(name.removesuffix(".py").replace("/", "."))
        )
        if name.startswith("bench") or own == "__init__":
            continue  # benchmarks use everything; the package's front exports everything, lazily
        assert own in RANK, f"{name}: give its package a layer in this test"
        for module in imported(path):
            other = package(module) if module.startswith("tracmod.") else None
            if other != own and other in RANK and RANK[other] >= RANK[own]:
                wrong.append(f"{name} imports {module}")
    assert not wrong


def test_what_is_imported_in_one_place_is_imported_only_there():
    for path, name in sources():
        if name.startswith("bench"):
            continue
        modules = set(imported(path))
        for module, places in ONLY_IN.items():
            uses = any(one == module or one.startswith(f"{module}.") for one in modules)
            assert not uses or name in places, f"{name} imports {module}"


def test_nothing_unpickles_and_no_remote_code_runs():
    for path, name in sources():
        assert not FORBIDDEN.search(path.read_text(encoding="utf-8")), name


def test_every_module_says_what_it_is_for():
    for path, name in sources():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring, name
        assert len(docstring.splitlines()[0]) <= 100, name


def test_the_native_engine_knows_no_framework():
    for path in (ROOT / "csrc").rglob("*.*"):
        assert not re.search(r"#include\s*<(torch|ATen|c10)", path.read_text()), path
        if path.name != "module.cpp":
            assert "pybind11" not in path.read_text(), path


def without(modules, statement):
    """Run a statement in a new interpreter in which these modules cannot be imported."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({modules!r}));"
    return subprocess.run(
        [sys.executable, "-c", blocked + statement], capture_output=True, text=True, check=False
    )


def test_the_engine_imports_without_what_a_gpu_machine_may_lack():
    done = without(
        ["datasets", "faiss", "pydantic", "ray", "plotly", "click"],
        "import tracmod.validation.gradients, tracmod as tm; "
        "tm.collect_features, tm.exact_influence, tm.HeadMask, tm.top_influences, "
        "tm.FeatureStore, tm.kernels",
    )
    assert done.returncode == 0, done.stderr


def test_help_loads_no_torch():
    done = without(
        ["torch", "transformers", "numpy", "pyarrow"],
        "from click.testing import CliRunner; import tracmod.cli as c; "
        "r = CliRunner().invoke(c.main, ['--help']); assert r.exit_code == 0, r.output",
    )
    assert done.returncode == 0, done.stderr
