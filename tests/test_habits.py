"""Files for contributors and citations: pre-commit hooks, constraints.txt and CITATION.cff."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import yaml

import tracmod as tm

ROOT = Path(__file__).parent.parent
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())


def test_the_pre_commit_hooks_are_valid_and_call_tools_of_the_extra_dev():
    clientlib = pytest.importorskip("pre_commit.clientlib")
    assert clientlib.load_config(str(ROOT / ".pre-commit-config.yaml"))  # raises if it is invalid
    [local] = HOOKS["repos"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tools = {name.partition(">")[0] for name in project["optional-dependencies"]["dev"]}
    assert {hook["id"] for hook in local["hooks"]} == {"ruff", "ruff-format", "clang-format"}
    for hook in local["hooks"]:
        assert hook["language"] == "system"  # fetches nothing
        assert hook["entry"].split()[0].removeprefix(".venv/bin/") in tools


def test_the_hooks_run_the_commands_of_make_lint():
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    for hook in HOOKS["repos"][0]["hooks"]:
        command = hook["entry"].removeprefix(".venv/bin/").replace(" --force-exclude", "")
        assert f"$(BIN)/{command}" in lint


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what CFF 1.2 requires
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == tm.__version__
    assert citation["authors"] == [{"name": "The tracmod developers"}]
    [paper] = citation["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert paper["url"].endswith("2311.08273")


def test_constraints_pin_every_dependency_that_make_install_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    dependencies = {
        name.partition(">")[0].partition("[")[0].lower().replace("_", "-")
        for names in (project["dependencies"], extras["test"], extras["dev"], extras["docs"])
        for name in names
    }
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in pins}
    assert dependencies <= pinned
