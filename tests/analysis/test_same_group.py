"""Training examples of a test example's own parallel group: influence with and without them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from html_page import Page
from tiny_study import tiny_config

import tracmod as tm
from tracmod.analysis import analyze
from tracmod.analysis.influence_tables import InfluenceTables
from tracmod.analysis.same_group import remaining_sizes, same_group_rows
from tracmod.files.durable import write_parquet
from tracmod.influence.scores import without_examples
from tracmod.report import write_report
from tracmod.study.pipeline import run_stages
from tracmod.study.run_folder import RunFolder

LANGUAGES = ("en", "de")


def examples(prefix: str, groups: dict[str, list[str | None]]) -> pa.Table:
    rows = [
        {"id": f"{prefix}-{language}-{number}", "language": language, "label": number % 2}
        | {"text_a": f"text {number}", "text_b": None, "group": group}
        for language, of_language in groups.items()
        for number, group in enumerate(of_language)
    ]
    return pa.Table.from_pylist(rows)


TRAIN = examples("train", {"en": ["a", "b", "c", None, ""], "de": ["a", "b", "d", "a"]})
TEST = examples("test", {"en": ["a", "x", None], "de": ["c", "a", ""]})


def test_groups_are_matched_by_name_and_an_empty_name_is_no_group():
    assert same_group_rows(TRAIN, TEST) == [[0, 5, 8], [], [], [2], [0, 5, 8], []]
    sizes = remaining_sizes(TRAIN, same_group_rows(TRAIN, TEST))
    assert sizes.tolist() == [[2, 4], [4, 5], [4, 5], [4, 4], [2, 4], [4, 5]]  # de, en


def test_tables_without_the_group_are_those_of_the_remaining_examples(tmp_path):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(6, 16, generator=generator)
    trains = torch.randn(9, 16, generator=generator)
    languages = TRAIN["language"].to_pylist()
    left_out = same_group_rows(TRAIN, TEST)
    top = tm.top_influences(queries, trains, 4 + 3, languages)
    tables = InfluenceTables(TRAIN, TEST, [0] * 6, [4, 2])
    rest = without_examples(top, left_out, queries, trains, 4, languages)
    tables.add(list(range(6)), rest, left_out)
    tables.write(tmp_path, bootstrap=20, confidence=0.9, seed=0)
    scores = (queries @ trains.T).numpy()
    rows = pq.read_table(tmp_path / "examples.parquet").to_pylist()
    assert len(rows) == 6 * 2
    for row in rows:
        q = TEST["id"].to_pylist().index(row["test_id"])
        remaining = [n for n in range(9) if n not in left_out[q]]
        own = [n for n in remaining if languages[n] == row["train_language"]]
        assert row["mean_influence"] == pytest.approx(scores[q, own].mean(), abs=1e-5)
        best = sorted(remaining, key=lambda n: -scores[q, n])[:4]
        assert row["share_positive"] == np.mean([n in own for n in best])
    top = pq.read_table(tmp_path / "top.parquet")
    assert len(top) == 6 * 2 * 4
    null = {
        (row["test_language"], row["train_language"]): row["null_share"]
        for row in pq.read_table(tmp_path / "languages.parquet").to_pylist()
    }
    assert null["en", "en"] == pytest.approx((4 / 6 + 5 / 9 + 5 / 9) / 3)
    by_k = pq.read_table(tmp_path / "shares_by_k.parquet").to_pylist()
    assert [row["k"] for row in by_k] == [2] * 4 + [4] * 4


def share_groups(path):
    """Let the first training examples of every language be translations of its test examples."""
    train, test = (pq.read_table(path / "data" / f"{split}.parquet") for split in ("train", "test"))
    groups, tests = train["group"].to_pylist(), test["group"].to_pylist()
    for language in LANGUAGES:
        rows = [row for row, name in enumerate(train["language"].to_pylist()) if name == language]
        for row, group in zip(rows, dict.fromkeys(tests[:4]), strict=False):
            groups[row] = group
    position = train.schema.get_field_index("group")
    column = pa.array(groups, pa.string())
    write_parquet(path / "data" / "train.parquet", train.set_column(position, "group", column))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in which four of six test items are in the training data."""
    torch.set_num_threads(1)
    config = tiny_config(
        task={"languages": list(LANGUAGES)},
        finetune={"epochs": 1},
        views={"random": 0, "other": []},
        influence={"k": [5, 2, 1000]},
    )
    folder = RunFolder(tmp_path_factory.mktemp("same") / "run", config)
    run_stages(folder, ["data"])
    share_groups(folder.path)
    run_stages(folder)
    return folder.path


def test_a_run_has_the_results_with_and_without_the_group(run):
    train, test = (pq.read_table(run / "data" / f"{split}.parquet") for split in ("train", "test"))
    left_out = same_group_rows(train, test)
    stores = {
        split: tm.FeatureStore.open(run / "features/full/full/checkpoint-1" / split).read()
        for split in ("train", "test")
    }
    scores = tm.influence_scores(stores["test"], stores["train"], normalize="cosine")
    state = json.loads((run / "models/full/checkpoint-1/tracmod.json").read_text())
    scores = state["learning_rate"] * scores.numpy()
    ids = train["id"].to_pylist()
    for sub, skipped in (("", [[]] * 12), ("without-group", left_out)):
        folder = run / "influence/full/full" / sub
        top = pq.read_table(folder / "top.parquet").to_pylist()
        assert {row["rank"] for row in top} == set(range(1, 25 - max(map(len, skipped))))
        for q, test_id in enumerate(test["id"].to_pylist()):
            left = [scores[q, n] for n in range(24) if n not in skipped[q]]
            found = [row for row in top if (row["test_id"], row["sign"]) == (test_id, 1)]
            best = sorted(left, reverse=True)[: len(found)]
            assert [row["score"] for row in found] == pytest.approx(best, rel=1e-4)
            assert not {row["train_id"] for row in found} & {ids[n] for n in skipped[q]}
        shares = pq.read_table(folder / "shares_by_k.parquet").to_pylist()
        assert sorted({row["k"] for row in shares}) == [2, 5, 24]
        languages = pq.read_table(folder / "languages.parquet").to_pylist()
        five = [row["share_positive"] for row in shares if row["k"] == 5]
        assert five == [row["share_positive"] for row in languages]


def test_the_summary_and_the_report_describe_the_own_group(run):
    same = json.loads((run / "analysis/summary.json").read_text())["same_group"]
    train, test = (pq.read_table(run / "data" / f"{split}.parquet") for split in ("train", "test"))
    groups = dict(zip(train["id"].to_pylist(), train["group"].to_pylist(), strict=True))
    own = {row["id"]: row["group"] for row in test.to_pylist() if row["group"] in groups.values()}
    assert (same["num_test"], same["num_with_same_group"]) == (12, len(own))
    assert same["strongest_null"] == pytest.approx(2 / 24)
    top = pq.read_table(run / "influence/full/full/top.parquet").to_pylist()
    hits = [
        (row["test_id"], row["rank"])
        for row in top
        if row["sign"] == 1
        and row["test_id"] in own
        and groups[row["train_id"]] == own[row["test_id"]]
    ]
    view = same["views"][0]
    assert (view["model"], view["view"]) == ("full", "full")
    assert view["strongest"] == pytest.approx(len({i for i, rank in hits if rank == 1}) / len(own))
    assert view["within_k"] == pytest.approx(len({i for i, rank in hits if rank <= 5}) / len(own))
    for name, sub in (("with", ""), ("without", "without-group")):
        table = pq.read_table(run / "influence/full/full" / sub / "examples.parquet").to_pylist()
        shares = [
            row["share_positive"] for row in table if row["test_language"] == row["train_language"]
        ]
        assert view[name]["share_positive"]["value"] == pytest.approx(np.mean(shares))
    change = view["change"]["share_positive"]
    assert change["value"] == pytest.approx(
        view["without"]["share_positive"]["value"] - view["with"]["share_positive"]["value"]
    )
    assert change["p_adjusted"] >= change["p_value"] > 0
    text = (run / "report/index.html").read_text(encoding="utf-8")
    Page(text)
    assert "test examples have training examples of their own parallel item" in text
    assert 'id="translations"' in text


def test_without_shared_groups_there_is_no_such_summary(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("features", "models"))
    train = pq.read_table(copy / "data" / "train.parquet")
    groups = pa.array([f"only-train-{row}" for row in range(len(train))])
    position = train.schema.get_field_index("group")
    write_parquet(copy / "data" / "train.parquet", train.set_column(position, "group", groups))
    assert analyze(copy, bootstrap=20)["same_group"] is None
    assert 'id="translations"' not in write_report(copy).read_text(encoding="utf-8")
