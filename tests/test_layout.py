"""The layout holds: imports run one way, and some are allowed in one place only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# From the bottom up: a module may import modules of its own layer and of those before it.
LAYERS = [
    {"kernels", "config", "durable", "storage", "__init__"},
    {"tasks", "model", "tokenizer"},
    {
        "heads",
        "lean",
        "optimizer",
        "training_folder",
        "train",
        "trainer_callback",
        "capture",
        "store",
        "engine",
    },
    {
        "features",
        "rows",
        "ekfac",
        "kept_tensors",
        "preconditioner",
        "streaming",
        "influence",
        "index",
        "pruning",
        "blocks",
        "pruned",
    },
    {"analysis", "report", "validation"},
    {
        "run_folder",
        "views",
        "tables",
        "attribute",
        "query",
        "pipeline",
        "retrain",
        "plan",
        "export",
        "sweep",
        "status",
        "explore",
    },
    {"cli"},
]  # fmt: skip
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ONLY_IN = {
    "tracmod._C": {"tracmod/kernels/native.py"},
    "faiss": {"tracmod/index.py"},
    "ray": {"tracmod/engine/ray.py"},
    "bm25s": {"tracmod/validation/baselines.py"},
    "click": {"cli/__init__.py"},
    "matplotlib": {"tracmod/report/drawing.py"},
    "gradio": {"tracmod/explore.py"},
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


def layer(name):
    if name == "cli" or name.startswith("tracmod.cli"):
        return RANK["cli"]
    part = name.split(".")[1] if "." in name else "__init__"
    return RANK.get(part)


def test_imports_run_one_way():
    wrong = []
    for path, name in sources():
        parts = Path(name).with_suffix("").parts
        if parts[0] == "bench" or parts == ("tracmod", "__init__"):
            continue  # benchmarks use everything; the package's front exports everything, lazily
        own = RANK["cli"] if parts[0] == "cli" else RANK.get(parts[1])
        assert own is not None, f"{name}: give it a layer in this test"
        for module in imported(path):
            if module.startswith("tracmod."):
                other = layer(module)
                if other is not None and other > own:
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
