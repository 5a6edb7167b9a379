"""Random example files and options: a sentence or the rows that were meant, and nothing else."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from made_files import Case, make_case
from own_model import save_model

from tracmod.attribution import attribute as attribution
from tracmod.attribution import context as contexts
from tracmod.attribution.context import AttributionContext
from tracmod.cli import main

COLUMNS = ("id", "language", "text_a", "text_b", "label")


@pytest.fixture
def read_tables(monkeypatch, tmp_path) -> Callable[[Case], tuple[Any, dict[str, Any]]]:
    """Run `tracmod attribute` on a case until its examples are encoded; return what was read."""
    shape = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
    model = save_model(tmp_path / "model", **shape, intermediate_size=8)
    tables: dict[str, Any] = {}

    def stop(context: AttributionContext, *_: object) -> None:
        tables.update(context.tables)
        raise click.exceptions.Exit(0)

    monkeypatch.setattr(attribution, "_projected", stop)
    monkeypatch.setattr(contexts, "load_model", functools.cache(contexts.load_model))

    def run(case: Case) -> tuple[Any, dict[str, Any]]:
        tables.clear()
        files = {"--model": model, "--train": case.train.path, "--query": case.query.path}
        files["--out"] = tmp_path / "out"
        arguments = [str(part) for pair in files.items() for part in pair]
        return CliRunner().invoke(main, ["attribute", *arguments, *case.options]), dict(tables)

    return run


def _check(case: Case, result: Any, tables: dict[str, Any]) -> str:
    """Compare the outcome of a case with its expectation; return it."""
    story = f"{case.story}, {case.options}: exit {result.exit_code}, {result.output}"
    assert result.exit_code in (0, 2), story
    assert result.exception is None or isinstance(result.exception, SystemExit), story
    assert "Traceback" not in result.output, story
    if result.exit_code:
        assert case.outcome != "accept", story
        (line,) = [
            line for line in result.output.splitlines() if line.startswith(("tracmod: ", "Error: "))
        ]
        assert len(line) < 2000, story
        if case.outcome == "refuse":
            assert all(name in line for name in case.names), (case.names, story)
        return "refused"
    assert case.outcome != "refuse", story
    if case.outcome == "any":  # mutated
        return "accepted"
    for split, file in (("train", case.train), ("query", case.query)):
        rows = tables[split].select(COLUMNS).to_pylist()
        assert rows == file.meant, (file.path.read_bytes()[:2000], story)
    return "accepted"


def _fuzz(seeds: range, folder: Path, read_tables: Any) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    failures = []
    for seed in seeds:
        own = folder / f"case-{seed}"
        own.mkdir()
        case = make_case(seed, own)
        try:
            outcomes[_check(case, *read_tables(case))] += 1
        except AssertionError as error:
            failures.append(f"seed {seed}: {error}")
    assert not failures, f"{len(failures)} of {len(seeds)}:\n" + "\n\n".join(failures[:20])
    return outcomes


def test_random_files_are_read_as_meant_or_refused(tmp_path, read_tables):
    outcomes = _fuzz(range(60), tmp_path, read_tables)
    assert min(outcomes["accepted"], outcomes["refused"]) >= 15, outcomes


@pytest.mark.slow
def test_two_thousand_random_files_are_read_as_meant_or_refused(tmp_path, read_tables):
    outcomes = _fuzz(range(1000, 3000), tmp_path, read_tables)
    assert min(outcomes["accepted"], outcomes["refused"]) >= 500, outcomes
