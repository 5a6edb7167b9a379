"""The layout holds: imports run one way, and some are allowed in one place only."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# From the bottom up: a package may import those before it.
LAYERS = [
    "choices",
    "kernels files",
    "config",
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
    "tracmod._C": {"tracmod/kernels/__init__.py"},
    "faiss": {"tracmod/influence/index.py"},
    "ray": {"tracmod/engine/ray.py"},
    "bm25s": {"tracmod/validation/baselines.py"},
    "click": {"cli/"},
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


def test_no_file_imports_itself_by_way_of_others():
    """Not within functions, and not under TYPE_CHECKING either."""
    modules = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
        for path, name in sources()
        if name.startswith("tracmod/")
    }
    graph = {
        module: {other for other in imported(path) if other in modules and other != module}
        for module, path in modules.items()
        if module != "tracmod"  # the front exports everything, lazily
    }
    assert len(graph) > 100
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the files


def test_the_packages_and_the_tests_have_the_same_folders():
    packages = {path.parent.name for path in (ROOT / "tracmod").glob("*/__init__.py")}
    packages = {name for name in packages if not (ROOT / "tracmod" / name).is_symlink()}
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert packages | {"cli", "bench"} == folders
    modules = {path.name for path in (ROOT / "tracmod").glob("*.py")}
    assert modules == {"__init__.py", "choices.py"}


def test_attribution_of_any_model_knows_no_study():
    for name in ("attribute", "context", "fidelity", "options", "tasks"):
        modules = imported(ROOT / "tracmod" / "attribution" / f"{name}.py")
        assert not [module for module in modules if module.startswith("tracmod.study")]


def test_what_is_imported_in_one_place_is_imported_only_there():
    for path, name in sources():
        if name.startswith("bench"):
            continue
        modules = set(imported(path))
        for module, places in ONLY_IN.items():
            uses = any(one == module or one.startswith(f"{module}.") for one in modules)
            assert not uses or name.startswith(tuple(places)), f"{name} imports {module}"


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


def test_transformers_is_imported_when_a_model_is_loaded():
    """Only the callback needs it before: it is a class of transformers' Trainer."""
    done = without(
        ["transformers", "datasets", "faiss", "matplotlib", "plotly"],
        "import tracmod as tm, tracmod.cli, tracmod.attribution.attribute, tracmod.study.pipeline; "
        "import tracmod.validation.gradients, tracmod.influence.blocks; "
        "names = set(tm.__all__) - {'TracInCallback'}; assert len(names) > 15; "
        "[getattr(tm, name) for name in names]; "
        "from tracmod.study import stage_table, stages; "
        "[stages.stage_module(stage) for stage in stage_table.STAGES if stage.name != 'report']",
    )
    assert done.returncode == 0, done.stderr


def test_the_command_line_is_built_without_heavy_modules():
    modules = "['torch', 'transformers', 'datasets', 'faiss', 'matplotlib', 'plotly']"
    done = without(
        [],
        f"import sys, tracmod; assert not set({modules}) & set(sys.modules); "
        f"import tracmod.cli; assert not set({modules}) & set(sys.modules)",
    )
    assert done.returncode == 0, done.stderr


def test_help_loads_no_torch():
    done = without(
        ["torch", "transformers", "numpy", "pyarrow"],
        "from click.testing import CliRunner; import tracmod.cli as c; "
        "commands = [[], *([name] for name in c.main.commands)]; assert len(commands) > 20; "
        "results = [CliRunner().invoke(c.main, [*name, '--help']) for name in commands]; "
        "assert not any(r.exit_code for r in results), results",
    )
    assert done.returncode == 0, done.stderr
