"""The documentation holds: every block of code runs, or parses and says why it does not run; links lead somewhere; the site builds.

A block is told by its language. `python` and `sh` run, page by page, in order, where what the page says the reader has is there;
`yaml` is a configuration and is validated; `text` is no code. `<!-- not run: WHY -->` before a block excuses it from running: its
commands are parsed all the same. Whatever else there is fails.
"""  # noqa: E501

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
# A small run stands for what these would leave in runs/demo; elsewhere it is there from the start.
MAKES_THE_DEMO = ("make demo", "tracmod run demo --out runs/demo")


@dataclass(frozen=True)
class Block:
    """A block of code: where it is, its language, its text, and why it is not run, if so."""

    where: str
    language: str
    text: str
    excuse: str | None

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of an `sh` block; continued lines are one, comments none."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks_of(page: Path) -> list[Block]:
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    found = []
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type not in ("fence", "code_block"):
            continue
        excuse = (
            EXCUSE.fullmatch(before.content) if before and before.type == "html_block" else None
        )
        where = f"{page.relative_to(ROOT)}:{token.map[0] + 1}"
        found.append(Block(where, token.info, token.content, excuse and excuse[1]))
    return found


def code_spans(page: Path) -> Iterator[str]:
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    for token in tokens:
        yield from (child.content for child in token.children or () if child.type == "code_inline")


ALL = [block for page in PAGES for block in blocks_of(page)]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def parse(words: list[str]) -> None:
    """Parse a `tracmod` command as click does, files not looked at; check what it says of configs.

    Raises:
        click.UsageError, ValueError: it would be refused.
    """
    command = main.commands[words[1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(click.Path, "convert", lambda self, value, param, ctx: Path(value))
        given = command.make_context(words[1], words[2:]).params
    if words[1] == "sweep":
        load_sweep(given["config"], given["overrides"])
    elif words[1] == "run":  # a file of the reader's: what is set must at least be a setting
        load_config(given["config"] if given["config"] in EMBEDDED else "demo", given["overrides"])


def check_command(words: list[str]) -> None:
    """A command that is not run: `tracmod` is parsed, `make` has the target, `pip` the extras."""
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
def test_every_block_is_run_or_validated_or_excused_with_its_commands_parsed(block, tmp_path):
    assert block.language in ("python", "sh", "yaml", "text"), "what is it?"
    if block.language == "text":
        code = re.search(r"^\s*(tracmod|make|pip|import|from|\$) ", block.text, re.MULTILINE)
        assert not code, f"code in a block that is called text: {code}"
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
            assert block.excuse or words[0] == "tracmod", f"{words[0]}: run it, or say why not"
            check_command(words)


@by_page
def test_commands_in_the_text_are_commands_with_these_options(page):
    for span in code_spans(page):
        words = span.split()
        if words[:1] == ["make"] and len(words) > 1:
            check_command(words)
        if words[:1] != ["tracmod"] or len(words) == 1 or words[1] in ("COMMAND", "--help"):
            continue
        assert words[1] in main.commands, span
        options = {one for param in main.commands[words[1]].params for one in param.opts}
        given = {
            word.partition("=")[0].strip("[]") for word in words if re.match(r"\[?--?[a-z]", word)
        }
        assert given <= options | {"--help"}, span


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A folder with what a reader has: my-model, train.tsv, test.tsv, runs/demo (a small run)."""
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
    """What pages say that the reader's Python has: a model, its tokenizer, data sets, ..."""
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
    return any(one.language in ("python", "sh") and not one.excuse for one in blocks_of(page))


RUN = [page for page in PAGES if has_blocks_that_run(page)]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_every_block_of_the_page_runs(page, reader, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(reader, tmp_path / "reader", dirs_exist_ok=True))
    blocks = blocks_of(page)
    makes_the_demo = [one for one in blocks if one.excuse and one.text.startswith(MAKES_THE_DEMO)]
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
                done = CliRunner().invoke(main, words[1:])
                assert done.exit_code == 0, (block.where, words, done.output, done.exception)


def public_objects() -> Iterator[tuple[str, Any]]:
    """Everything public that has a docstring, methods included."""
    for name in (*tm.__all__, *(f"kernels.{op}" for op in kernels.__all__)):
        found = kernels if "." in name else tm
        public = getattr(found, name.rpartition(".")[2])
        if not callable(public) or not hasattr(public, "__module__"):
            continue
        yield name, public
        if isinstance(public, type):
            methods = inspect.getmembers(public, lambda member: callable(member))
            yield from ((f"{name}.{own}", it) for own, it in methods if own[0] != "_")


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
    own = {name for name in OBJECTS if name.count(".") == name.startswith("kernels.")}
    without = own - set(WITH_EXAMPLES) - {"kernels.Kind", "kernels.Layer"}
    assert not without


@by_page
def test_links_lead_to_files_of_the_repository(page):
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_every_page_begins_with_a_title_and_one_line_that_says_what_it_is_about():
    for page in (page for page in PAGES if page.parent == ROOT / "docs"):
        assert re.match(r"# .+\n\n.+\.\n\n", page.read_text(encoding="utf-8")), page


def test_the_python_reference_names_everything_public():
    named = set(re.findall(r"^::: tracmod\.(\S+)", (ROOT / "docs/python.md").read_text(), re.M))
    public = {name for name in tm.__all__ if name not in ("__version__", "kernels")}
    ops = {f"kernels.{name}" for name in kernels.__all__ if name not in ("Kind", "Layer")}
    assert named == public | ops


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    site = tmp_path / "site"
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    assert {f"{page.stem}.html" for page in PAGES if page.parent == ROOT / "docs"} <= set(pages)
    for name in main.commands:
        assert f'id="{name}"' in pages["cli.html"], name
    assert "Sentinel" not in pages["cli.html"]
    assert "tracmod.kernels.quantize_rows" in pages["python.html"]
    for name, text in pages.items():
        fetched = re.findall(
            r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//[^"]*"', text
        )
        assert not fetched, name
