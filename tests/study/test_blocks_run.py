"""Influence by head and layer in a run (`influence.blocks`): exact, resumable, analysed, drawn."""

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
    """Do a run, or some of its stages, with some settings; return its folder."""
    # Mean influences are small sums of large cosines of both signs, which need many numbers.
    options = {"views": {"random": 0, "other": []}, "collect": {"projection_dim": 8192}}
    run = RunFolder(folder, tiny_config(**options, **sections))
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
    """A copy of the run, with blocks computed afterwards."""
    folder = tmp_path_factory.mktemp("blocks") / "run"
    shutil.copytree(plain, folder)
    return run_with(folder, influence=BLOCKS)


def blocks_of(folder, model, view):
    """Return the table of influence by head and layer."""
    return pq.read_table(folder / "influence" / model / view / "blocks.parquet").to_pandas()


def test_blocks_computed_afterwards_change_no_earlier_file(plain, done):
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
    blocks = blocks_of(done, model, view).groupby(["test_language", "train_language"])["influence"]
    largest = sum(checkpoint.learning_rate for checkpoint in checkpoints)  # if all cosines are 1
    for pair, total in blocks.sum().items():
        assert total == pytest.approx(expected[pair], abs=1e-6 * largest)
    # 3 heads and the rest of each of 2 layers, and the parameters outside the layers
    assert (blocks.size() == 2 * (3 + 1) + 1).all()
    assert len(blocks) == len(expected)


def test_mean_influence_from_features_estimates_the_sum_of_the_blocks(done):
    pair = ["test_language", "train_language"]
    for view in ("full", "subnetwork"):
        exact = blocks_of(done, "full", view).groupby(pair)["influence"].sum()
        languages = pq.read_table(done / "influence/full" / view / "languages.parquet").to_pandas()
        estimate = languages.set_index(pair)["mean_influence"].sort_index()
        assert np.abs(estimate - exact).max() < 0.1 * np.abs(exact).max()


def test_masked_heads_have_no_influence_in_the_view_subnetwork(done):
    for language in LANGUAGES:
        mask = tm.HeadMask.load(done / "subnetworks" / f"{language}.json").array
        rows = blocks_of(done, "full", "subnetwork").query("test_language == @language")
        for row in rows.dropna().itertuples():
            assert (row.influence == 0) == (mask[int(row.layer), int(row.head)] == 0)


def test_an_interrupted_run_resumes_without_computing_a_part_twice(done, tmp_path, monkeypatch):
    shutil.copytree(done, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "influence" / "blocks")
    calls = []
    block_influence = influence_blocks.block_influence

    def interrupt_fourth(*arguments, **named):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return count(*arguments, **named)

    def count(*arguments, **named):
        calls.append(arguments)
        return block_influence(*arguments, **named)

    monkeypatch.setattr(influence_blocks, "block_influence", interrupt_fourth)
    run = RunFolder(tmp_path / "copy")
    with pytest.raises(KeyboardInterrupt), run.locked():
        run_stages(run, ["influence"], again="influence")
    assert len(list((tmp_path / "copy" / "influence" / "blocks").glob("*.parquet"))) == 3
    monkeypatch.setattr(influence_blocks, "block_influence", count)
    run_with(tmp_path / "copy", influence=BLOCKS)
    assert len(calls) == 2 * 2 * (1 + len(LANGUAGES))  # models, checkpoints, masks
    results = ("influence/**/*.parquet", "analysis/*")
    assert files_of(tmp_path / "copy", *results) == files_of(done, *results)


def test_parts_of_other_scores_are_replaced(done, tmp_path):
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


def test_the_report_has_a_section_of_blocks_only_if_they_were_computed(plain, done):
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


# Analysis and figures of made blocks


def run_with_blocks(path, blocks):
    """Make a run with blocks (layer, head, in-language, cross-language) of its full model."""
    make_run(path, num_test=3, models=("full",), views=("full",))
    rows = [
        {"test_language": a, "train_language": b, "layer": layer, "head": head,
         "influence": own if a == b else cross}
        for a in MADE_LANGUAGES for b in MADE_LANGUAGES for layer, head, own, cross in blocks
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows)
    for name in ("layer", "head"):
        column = table.column_names.index(name)
        table = table.set_column(column, name, table[name].cast(pa.int32()))
    pq.write_table(table, path / "influence" / "full" / "full" / "blocks.parquet")
    return path


BLOCK_VALUES = [(0, 0, 4.0, 1.0), (0, 1, -1.0, 1.0), (0, None, 2.0, 3.0), (1, 0, 1.0, 1.0),
                (1, 1, 1.0, 1.0), (1, None, 2.0, 1.0), (None, None, 1.0, 2.0)]  # fmt: skip


def test_means_and_shares_are_those_of_the_made_blocks(tmp_path):
    run = RunResults(run_with_blocks(tmp_path / "run", BLOCK_VALUES))
    table = block_table(run)
    rows = [tuple(row.values()) for row in table.to_pylist()]
    assert rows == [("full", "full", *row) for row in BLOCK_VALUES]
    own, cross = block_shares(table)
    assert own["total"] == pytest.approx(10)
    assert [own[part] for part in ("heads", "layers", "outside")] == pytest.approx([0.5, 0.4, 0.1])
    assert cross["total"] == pytest.approx(10)
    assert cross["heads"] == pytest.approx(0.4)


def test_figures_show_the_made_blocks(tmp_path):
    path = run_with_blocks(tmp_path / "run", BLOCK_VALUES)
    analyze(path, bootstrap=10, permutations=10)
    figures = Page(write_report(path).read_text()).json("figure-data")
    maps = [f["data"][0] for f in figures if f["layout"]["yaxis"]["title"]["text"] == "layer"]
    assert [trace["z"] for trace in maps] == [[[3, -2], [0, 0]], [[4, -1], [1, 1]]]
    bars = next(f for f in figures if f["layout"].get("barmode") == "relative")
    assert {trace["name"]: trace["y"] for trace in bars["data"]} == {
        "heads": [30, 20, 0], "rest of the layer": [20, 20, 0], "outside the layers": [0, 0, 10],
    }  # fmt: skip


def test_shares_by_layer_have_the_sign_of_their_influence_if_the_total_is_negative(tmp_path):
    blocks = [(0, 0, 3.0, 0.0), (0, 1, -1.0, 0.0), (0, None, -5.0, 0.0), (1, 0, -2.0, 0.0),
              (None, None, 1.0, 0.0)]  # fmt: skip
    path = run_with_blocks(tmp_path / "run", blocks)
    analyze(path, bootstrap=10, permutations=10)
    expected = {"heads": [20, -20, 0], "rest of the layer": [-50, 0, 0],
                "outside the layers": [0, 0, 10]}  # fmt: skip
    figures = Page(write_report(path).read_text()).json("figure-data")
    bars = next(f for f in figures if f["layout"].get("barmode") == "relative")
    assert {trace["name"]: trace["y"] for trace in bars["data"]} == expected
    [panel] = dict(draw_figures(path))["blocks-layers-full"].axes
    names = [label.get_text() for label in panel.get_xticklabels()]
    heights = {bars.get_label(): [bar.get_height() for bar in bars]
               for bars in panel.containers if bars.get_label() in expected}  # fmt: skip
    assert (names, heights) == (["0", "1", "outside"], expected)


@pytest.mark.parametrize(
    "blocks",
    [[(None, None, 1.0, 2.0)], [(0, 0, 0.0, 0.0), (0, None, 0.0, 0.0)], [(0, 0, 1.0, 0.5)],
     [(0, 0, 1.0, 0.5), (0, 1, -1.0, 0.5)]],
    ids=["classifier alone", "all zero", "attention alone", "heads that cancel"],
)  # fmt: skip
def test_reports_of_few_or_zero_blocks_can_be_drawn(tmp_path, blocks):
    path = run_with_blocks(tmp_path / "run", blocks)
    analyze(path, bootstrap=10, permutations=10)
    assert "</html>" in write_report(path).read_text()
    has_total = sum(in_language for *_, in_language, _ in blocks) != 0
    assert ("blocks-layers-full" in dict(draw_figures(path))) == has_total
