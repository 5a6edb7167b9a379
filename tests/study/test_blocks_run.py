"""Influence by head and layer in a run: exact, resumable, analysed, drawn; only where asked for."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from html_page import Page
from make_run import LANGUAGES as MADE_LANGUAGES
from make_run import make_run
from tiny_study import LANGUAGES, files_of, tiny_config

import tracmod as tm
from tracmod.analysis import RunResults, analyze
from tracmod.analysis.blocks import block_shares, block_table
from tracmod.models.checkpoints import load_checkpoints
from tracmod.models.inputs import encode
from tracmod.models.loading import load_model
from tracmod.report import write_report
from tracmod.report.paper.figures import draw_figures
from tracmod.study.pipeline import run_stages
from tracmod.study.run_folder import RunFolder
from tracmod.study.stages import influence_blocks
from tracmod.validation.integrity import verify

BLOCKS = {"blocks": True, "k": 5}


def run_with(folder, stages=None, **sections):
    run = RunFolder(folder, tiny_config(views={"random": 0, "other": []}, **sections))
    with run.locked():
        run_stages(run, **({} if stages is None else {"stages": stages}))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A finished run without blocks."""
    torch.set_num_threads(1)
    return run_with(tmp_path_factory.mktemp("blocks") / "plain")


@pytest.fixture(scope="module")
def done(plain, tmp_path_factory):
    """The same run, asked for blocks afterwards."""
    folder = tmp_path_factory.mktemp("blocks") / "run"
    shutil.copytree(plain, folder)
    return run_with(folder, influence=BLOCKS)


def blocks_of(folder, model, view):
    return pq.read_table(folder / "influence" / model / view / "blocks.parquet").to_pandas()


def test_asked_for_afterwards_only_influence_is_done_again(plain, done):
    earlier = ("data/*", "models/**/*", "subnetworks/*", "features/**/*")
    assert files_of(plain, *earlier) == files_of(done, *earlier)
    for name, content in files_of(plain, "influence/*/*/*").items():
        assert (done / name).read_bytes() == content
    assert not list(plain.glob("**/*blocks*"))
    assert verify(done) == []


@pytest.mark.parametrize("model", ["full", "sparse"])
@pytest.mark.parametrize("view", ["full", "subnetwork"])
def test_blocks_add_up_to_exact_influence_over_the_checkpoints(done, model, view):
    checkpoints = load_checkpoints(done / "models" / model / f"checkpoint-{e}" for e in (1, 2))
    tables = {
        split: pq.read_table(done / "data" / f"{split}.parquet") for split in ("train", "test")
    }
    expected = dict.fromkeys([(a, b) for a in LANGUAGES for b in LANGUAGES], 0.0)
    for checkpoint in checkpoints:
        network, tokenizer = load_model(checkpoint.path)
        examples = {
            (split, language): encode(
                tokenizer,
                table.filter(pa.compute.equal(table.column("language"), language)),
                48,
            )
            for split, table in tables.items()
            for language in LANGUAGES
        }
        for test, train in expected:
            mask = tm.HeadMask.load(done / "subnetworks" / f"{test}.json")
            scores_QN = tm.exact_influence(
                network,
                examples["train", train],
                examples["test", test],
                head_mask=None if view == "full" else mask,
                normalize="cosine",
            )
            mean = float(scores_QN.double().mean())
            expected[test, train] += checkpoint.learning_rate * mean
    found = blocks_of(done, model, view).groupby(["test_language", "train_language"])["influence"]
    unit = sum(checkpoint.learning_rate for checkpoint in checkpoints)  # of a cosine of 1
    for pair, total in found.sum().items():
        assert total == pytest.approx(expected[pair], abs=1e-6 * unit)
    # 2 layers of 3 heads and a rest, and what is outside
    assert (found.size() == 2 * (3 + 1) + 1).all()
    assert len(found) == len(expected)


def test_the_runs_mean_influence_estimates_the_sum_of_the_blocks(done):
    pair = ["test_language", "train_language"]
    for view in ("full", "subnetwork"):
        exact = blocks_of(done, "full", view).groupby(pair)["influence"].sum()
        languages = pq.read_table(done / "influence/full" / view / "languages.parquet").to_pandas()
        estimate = languages.set_index(pair)["mean_influence"].sort_index()
        assert np.abs(estimate - exact).max() < 0.1 * np.abs(exact).max()


def test_masked_heads_have_no_influence_in_their_subnetworks_view(done):
    for language in LANGUAGES:
        mask = tm.HeadMask.load(done / "subnetworks" / f"{language}.json").array
        rows = blocks_of(done, "full", "subnetwork").query("test_language == @language")
        for row in rows.dropna().itertuples():
            assert (row.influence == 0) == (mask[int(row.layer), int(row.head)] == 0)


def test_stopped_it_goes_on_without_doing_a_part_twice(done, tmp_path, monkeypatch):
    shutil.copytree(done, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "influence" / "blocks")
    calls = []
    compute = influence_blocks.block_influence

    def stops(*arguments, **named):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(arguments)
        return compute(*arguments, **named)

    monkeypatch.setattr(influence_blocks, "block_influence", stops)
    run = RunFolder(tmp_path / "copy")
    with pytest.raises(KeyboardInterrupt), run.locked():
        run_stages(run, ["influence"], again="influence")
    assert len(list((tmp_path / "copy" / "influence" / "blocks").glob("*.parquet"))) == 3

    def counts(*arguments, **named):
        calls.append(arguments)
        return compute(*arguments, **named)

    monkeypatch.setattr(influence_blocks, "block_influence", counts)
    run_with(tmp_path / "copy", influence=BLOCKS)
    assert len(calls) == 2 * 2 * (1 + len(LANGUAGES))  # models, checkpoints, masks
    names = ("influence/**/*.parquet", "analysis/*")
    assert files_of(tmp_path / "copy", *names) == files_of(done, *names)


def test_parts_of_other_scores_are_made_anew_and_the_old_are_gone(done, tmp_path):
    shutil.copytree(done, tmp_path / "copy")
    before = set((tmp_path / "copy" / "influence" / "blocks").iterdir())
    run_with(tmp_path / "copy", ["influence"], influence=BLOCKS | {"normalize": "none"})
    after = set((tmp_path / "copy" / "influence" / "blocks").iterdir())
    assert len(after) == len(before)
    assert not after & before
    cosine, dot = (blocks_of(folder, "full", "full") for folder in (done, tmp_path / "copy"))
    assert not np.allclose(cosine["influence"], dot["influence"])
    run_with(tmp_path / "copy", ["influence"])
    assert not list((tmp_path / "copy" / "influence").glob("**/*blocks*"))


def test_the_page_shows_heads_and_layers_only_where_they_were_asked_for(plain, done):
    pages = [(folder / "report" / "index.html").read_text() for folder in (plain, done)]
    assert ['<section id="blocks">' in page for page in pages] == [False, True]
    summaries = [json.loads((f / "analysis" / "summary.json").read_text()) for f in (plain, done)]
    assert summaries[0]["blocks"] == []
    assert {(row["model"], row["view"], row["kind"]) for row in summaries[1]["blocks"]} == {
        (model, view, kind)
        for model in ("full", "sparse")
        for view in ("full", "subnetwork")
        for kind in ("in_language", "cross_language")
    }


# --- analysis and figures of planted blocks -------------------------------------------------


def planted(path, blocks):
    """A made run whose full model's blocks are (layer, head, in-language, cross-language)."""
    make_run(path, num_test=3, models=("full",), views=("full",))
    rows = [
        {"test_language": a, "train_language": b, "layer": layer, "head": head,
         "influence": own if a == b else cross}
        for a in MADE_LANGUAGES for b in MADE_LANGUAGES for layer, head, own, cross in blocks
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows)
    for name in ("layer", "head"):
        place = table.column_names.index(name)
        table = table.set_column(place, name, table[name].cast(pa.int32()))
    pq.write_table(table, path / "influence" / "full" / "full" / "blocks.parquet")
    return path


BLOCK_VALUES = [(0, 0, 4.0, 1.0), (0, 1, -1.0, 1.0), (0, None, 2.0, 3.0), (1, 0, 1.0, 1.0),
                (1, 1, 1.0, 1.0), (1, None, 2.0, 1.0), (None, None, 1.0, 2.0)]  # fmt: skip


def test_means_and_shares_are_those_planted(tmp_path):
    run = RunResults(planted(tmp_path / "run", BLOCK_VALUES))
    table = block_table(run)
    found = [tuple(row.values()) for row in table.to_pylist()]
    assert found == [("full", "full", *row) for row in BLOCK_VALUES]
    own, cross = block_shares(table)
    assert own["total"] == pytest.approx(10)
    assert [own[part] for part in ("heads", "layers", "outside")] == pytest.approx([0.5, 0.4, 0.1])
    assert cross["total"] == pytest.approx(10)
    assert cross["heads"] == pytest.approx(0.4)


def test_figures_are_the_planted_blocks(tmp_path):
    path = planted(tmp_path / "run", BLOCK_VALUES)
    analyze(path, bootstrap=10, permutations=10)
    figures = Page(write_report(path).read_text()).json("figure-data")
    maps = [f["data"][0] for f in figures if f["layout"]["yaxis"]["title"]["text"] == "layer"]
    assert [trace["z"] for trace in maps] == [[[3, -2], [0, 0]], [[4, -1], [1, 1]]]
    bars = next(f for f in figures if f["layout"].get("barmode") == "relative")
    assert {trace["name"]: trace["y"] for trace in bars["data"]} == {
        "heads": [30, 20, 0], "rest of the layer": [20, 20, 0], "outside the layers": [0, 0, 10],
    }  # fmt: skip


def test_shares_by_layer_keep_their_signs_where_the_total_is_negative(tmp_path):
    blocks = [(0, 0, 3.0, 0.0), (0, 1, -1.0, 0.0), (0, None, -5.0, 0.0), (1, 0, -2.0, 0.0),
              (None, None, 1.0, 0.0)]  # fmt: skip
    path = planted(tmp_path / "run", blocks)
    analyze(path, bootstrap=10, permutations=10)
    expected = {"heads": [20, -20, 0], "rest of the layer": [-50, 0, 0],
                "outside the layers": [0, 0, 10]}  # fmt: skip
    figures = Page(write_report(path).read_text()).json("figure-data")
    bars = next(f for f in figures if f["layout"].get("barmode") == "relative")
    assert {trace["name"]: trace["y"] for trace in bars["data"]} == expected
    [panel] = dict(draw_figures(path))["blocks-layers-full"].axes
    names = [label.get_text() for label in panel.get_xticklabels()]
    drawn = {one.get_label(): [bar.get_height() for bar in one]
             for one in panel.containers if one.get_label() in expected}  # fmt: skip
    assert (names, drawn) == (["0", "1", "outside"], expected)


@pytest.mark.parametrize(
    "blocks",
    [[(None, None, 1.0, 2.0)], [(0, 0, 0.0, 0.0), (0, None, 0.0, 0.0)], [(0, 0, 1.0, 0.5)],
     [(0, 0, 1.0, 0.5), (0, 1, -1.0, 0.5)]],
    ids=["classifier alone", "all zero", "attention alone", "heads that cancel"],
)  # fmt: skip
def test_pages_of_few_or_empty_blocks_can_be_drawn(tmp_path, blocks):
    path = planted(tmp_path / "run", blocks)
    analyze(path, bootstrap=10, permutations=10)
    assert "</html>" in write_report(path).read_text()
    drawn = sum(own for *_, own, _ in blocks) != 0
    assert ("blocks-layers-full" in dict(draw_figures(path))) == drawn
