"""The documentation: code runs or is validated, links and names resolve, and the site builds.

The language of a block of code says how it is tested. `python` and `sh` blocks run in order, page
by page, in a folder with the files that the page says the reader has. A `yaml` block is validated
as a configuration. A `text` block must not contain code. `<!-- not run: REASON -->` before a block
exempts it from running, but its commands are still parsed. Other languages fail.
"""

from __future__ import annotations

import doctest
import inspect
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from markdown_it import MarkdownIt
from own_model import own_model, own_tokenizer, write_examples
from tiny_study import tiny_config

import tracmod as tm
from tracmod import kernels
from tracmod.cli import main
from tracmod.config import load_config
from tracmod.configs import __file__ as configs
from tracmod.study.sweep import load_sweep

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EMBEDDED = {path.stem for path in Path(configs).parent.glob("*.yaml")}
LABELS = ("negative", "neutral", "positive")
EXCUSE = re.compile(r"<!-- not run: (\S.*) -->\s*")
# Commands that write runs/demo. Pages without them have it from the start; it is a small run.
MAKES_THE_DEMO = ("make demo", "tracmod run demo --out runs/demo")


@dataclass(frozen=True)
class Block:
    """A block of code of a page.

    Attributes:
        where: The page and the line.
        language: The language after the opening fence.
        text: The code.
        excuse: The reason why it is not run; None if it is run.
    """

    where: str
    language: str
    text: str
    excuse: str | None

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of an `sh` block, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of code of a page."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    blocks = []
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type not in ("fence", "code_block"):
            continue
        excuse = (
            EXCUSE.fullmatch(before.content) if before and before.type == "html_block" else None
        )
        where = f"{page.relative_to(ROOT)}:{token.map[0] + 1}"
        blocks.append(Block(where, token.info, token.content, excuse and excuse[1]))
    return blocks


def code_spans(page: Path) -> Iterator[str]:
    """Yield the inline code of a page."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    for token in tokens:
        yield from (child.content for child in token.children or () if child.type == "code_inline")


ALL = [block for page in PAGES for block in blocks_of(page)]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def parse(words: list[str]) -> None:
    """Parse a `tracmod` command without looking for its files; check its configuration.

    Raises:
        click.UsageError, ValueError: The command would be refused.
    """
    command = main.commands[words[1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(click.Path, "convert", lambda self, value, param, ctx: Path(value))
        values = command.make_context(words[1], words[2:]).params
    if words[1] == "sweep":
        load_sweep(values["config"], values["overrides"])
    elif words[1] == "run":  # for a file of the reader, check that the overrides are settings
        config = values["config"] if values["config"] in EMBEDDED else "demo"
        load_config(config, values["overrides"])


def check_command(words: list[str]) -> None:
    """Check a command without running it.

    The arguments of `tracmod` are parsed; targets of `make` and extras of `pip install` exist.
    """
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[0] == "tracmod":
        parse(words)
    elif words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[:2] == ["pip", "install"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extra in re.findall(r"(?:tracmod|\.)\[(\w+)\]", " ".join(words)):
            assert extra in project["optional-dependencies"]


@pytest.mark.parametrize("block", ALL, ids=lambda block: block.where)
def test_every_block_has_valid_code(block, tmp_path):
    assert block.language in ("python", "sh", "yaml", "text")
    if block.language == "text":
        code = re.search(r"^\s*(tracmod|make|pip|import|from|\$) ", block.text, re.MULTILINE)
        assert not code, f"code in a text block: {code}"
    elif block.language == "yaml" and block.excuse is None:
        path = tmp_path / "config.yaml"
        path.write_text(block.text, encoding="utf-8")
        is_sweep = "base" in yaml.safe_load(block.text)
        assert load_sweep(str(path), ()) if is_sweep else load_config(str(path), ())
    elif block.language == "yaml":
        assert list(yaml.safe_load_all(block.text))
    elif block.language == "python":
        compile(block.text, block.where, "exec")
    else:
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
        assert block.commands
        for words in block.commands:
            assert block.excuse or words[0] == "tracmod", (
                f"{words[0]} needs a reason why it is not run"
            )
            check_command(words)


@by_page
def test_commands_in_inline_code_exist_and_have_the_options(page):
    for span in code_spans(page):
        words = span.split()
        if words[:1] == ["make"] and len(words) > 1:
            check_command(words)
        if words[:1] != ["tracmod"] or len(words) == 1 or words[1] in ("COMMAND", "--help"):
            continue
        assert words[1] in main.commands, span
        options = {name for param in main.commands[words[1]].params for name in param.opts}
        used = {
            word.partition("=")[0].strip("[]") for word in words if re.match(r"\[?--?[a-z]", word)
        }
        assert used <= options | {"--help"}, span


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A folder with the files of a reader: my-model, train.tsv, test.tsv, a run in runs/demo."""
    from tracmod.study.pipeline import run_stages
    from tracmod.study.run_folder import RunFolder

    folder = tmp_path_factory.mktemp("reader")
    model = own_model()
    model.config.id2label = dict(enumerate(LABELS))
    model.config.label2id = {name: label for label, name in enumerate(LABELS)}
    for part in (model, own_tokenizer()):
        part.save_pretrained(folder / "my-model")
    write_examples(folder / "train.tsv", 120, LABELS)
    write_examples(folder / "test.tsv", 12, LABELS)
    run_stages(RunFolder(folder / "runs/demo", tiny_config()))
    return folder


def names_of_the_page(folder: Path) -> dict[str, Any]:
    """Return the Python variables that pages say the reader has: model, tokenizer, datasets, ..."""
    from transformers import AutoModelForSequenceClassification, TrainingArguments

    def examples(name: str) -> list[dict[str, Any]]:
        rows = [line.split("\t") for line in (folder / name).read_text().splitlines()[1:]]
        return [
            {**tokenizer(text, padding="max_length", max_length=16, truncation=True),
             "labels": LABELS.index(label)}
            for _, _, text, label in rows
        ]  # fmt: skip

    tokenizer = own_tokenizer()
    train = examples("train.tsv")
    rows = (folder / "train.tsv").read_text().splitlines()[1:]
    return {
        "__name__": "page",
        "model": AutoModelForSequenceClassification.from_pretrained(folder / "my-model"),
        "tokenizer": tokenizer,
        "arguments": TrainingArguments(
            "my-training", num_train_epochs=2, use_cpu=True, report_to=[], disable_tqdm=True
        ),
        "train": train,
        "train_dataset": train,
        "query_dataset": examples("test.tsv"),
        "languages": [row.split("\t")[1] for row in rows],
        "rates": [2e-5, 1e-5],
    }


def has_blocks_that_run(page: Path) -> bool:
    return any(block.language in ("python", "sh") and not block.excuse for block in blocks_of(page))


RUN = [page for page in PAGES if has_blocks_that_run(page)]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_every_block_of_the_page_runs(page, reader, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(reader, tmp_path / "reader", dirs_exist_ok=True))
    blocks = blocks_of(page)
    makes_the_demo = [
        block for block in blocks if block.excuse and block.text.startswith(MAKES_THE_DEMO)
    ]
    if makes_the_demo:
        shutil.move("runs", "later")
    names = names_of_the_page(reader)
    for block in blocks:
        if block in makes_the_demo:
            shutil.move("later", "runs")
        elif block.language == "python" and not block.excuse:
            exec(compile(block.text, block.where, "exec"), names)
        elif block.language == "sh" and not block.excuse:
            for words in block.commands:
                result = CliRunner().invoke(main, words[1:])
                assert result.exit_code == 0, (block.where, words, result.output, result.exception)


def public_objects() -> Iterator[tuple[str, Any]]:
    """Yield every public function, class and method with a docstring, by name."""
    for name in (*tm.__all__, *(f"kernels.{op}" for op in kernels.__all__)):
        module = kernels if "." in name else tm
        public = getattr(module, name.rpartition(".")[2])
        if not callable(public) or not hasattr(public, "__module__"):
            continue
        yield name, public
        if isinstance(public, type):
            methods = inspect.getmembers(public, lambda member: callable(member))
            for method_name, method in methods:
                if not method_name.startswith("_"):
                    yield f"{name}.{method_name}", method


OBJECTS = dict(public_objects())
WITH_EXAMPLES = [name for name, public in OBJECTS.items() if ">>>" in (public.__doc__ or "")]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_example_in_the_docstring_runs(name, reader, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(reader, tmp_path / "reader", dirs_exist_ok=True))
    names = names_of_the_page(reader) | {"tm": tm, "torch": torch}
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    output = io.StringIO()
    for example in finder.find(OBJECTS[name], name, globs=names):
        runner.run(example, out=output.write)
    assert runner.tries > 0
    assert runner.failures == 0, output.getvalue()


def test_every_public_function_and_class_has_an_example():
    names = {name for name in OBJECTS if name.count(".") == name.startswith("kernels.")}
    without = names - set(WITH_EXAMPLES) - {"kernels.Kind", "kernels.LayerKind"}
    assert not without


@by_page
def test_links_point_to_files_of_the_repository(page):
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_every_page_begins_with_a_title_and_a_line_about_its_content():
    for page in (page for page in PAGES if page.parent == ROOT / "docs"):
        assert re.match(r"# .+\n\n.+\.\n\n", page.read_text(encoding="utf-8")), page


def test_the_python_reference_names_everything_public():
    documented = set(
        re.findall(r"^::: tracmod\.(\S+)", (ROOT / "docs/python.md").read_text(), re.M)
    )
    public = {name for name in tm.__all__ if name not in ("__version__", "kernels")}
    ops = {f"kernels.{name}" for name in kernels.__all__ if name not in ("Kind", "LayerKind")}
    assert documented == public | ops


def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path):
    site = tmp_path / "site"
    process = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    assert {f"{page.stem}.html" for page in PAGES if page.parent == ROOT / "docs"} <= set(pages)
    for name in main.commands:
        assert f'id="{name}"' in pages["cli.html"], name
    assert "Sentinel" not in pages["cli.html"]
    assert "tracmod.kernels.quantize_rows" in pages["python.html"]
    for name, text in pages.items():
        loaded = re.findall(
            r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//[^"]*"', text
        )
        assert not loaded, name
