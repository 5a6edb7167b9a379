"""Options of a run's subnetworks: seeds, thresholds, monolingual models and views."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from html_page import Page
from tiny_study import LANGUAGES, RESULTS, files_of, run_killing, tiny_config

import tracmod as tm
from tracmod.attribution.query import Attributor
from tracmod.influence.scores import top_influences
from tracmod.models.checkpoints import load_checkpoints
from tracmod.models.inputs import encode
from tracmod.models.loading import load_model
from tracmod.study.context import RunContext
from tracmod.study.export import export_subnetwork
from tracmod.study.pipeline import run_stages
from tracmod.study.run_folder import RunFolder
from tracmod.study.views import views_of
from tracmod.subnetworks.head_mask import HeadMask
from tracmod.subnetworks.importance import masked_accuracy
from tracmod.subnetworks.pruning import combine_masks, prune
from tracmod.validation.integrity import verify

OPTIONS = {
    "influence": {"k": [5, 3], "blocks": True},
    "prune": {"seeds": 3, "combine": "majority", "step": 0.2, "other_thresholds": [0.5, 1.0]},
    "views": {
        "random": 1,
        "other": [],
        "subnetwork_own": True,
        "subnetwork_test": True,
        "union": [["en", "de"]],
        "intersection": [["de", "es"]],
    },
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run with every option that is not a default."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("options") / "run"
    run_stages(RunFolder(folder, tiny_config(**OPTIONS)))
    return folder


def dev_examples(folder, tokenizer, language):
    """Return the encoded dev examples of one language of a run."""
    table = pq.read_table(folder / "data/dev.parquet", filters=[("language", "==", language)])
    return encode(tokenizer, table, 48, num_labels=3)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_masks_of_all_seeds_are_written_and_combined(done, language):
    seeds = [HeadMask.load(done / f"subnetworks/seeds/{s}/{language}.json") for s in (0, 1, 2)]
    tree = json.loads((done / f"subnetworks/{language}.json").read_text())
    mask = HeadMask(tree["mask"])
    assert mask == combine_masks(seeds, "majority")
    assert tree["seeds"] == [0, 1, 2]
    assert (tree["model"], tree["combine"]) == ("multilingual", "majority")
    model, tokenizer = load_model(done / "models/full/checkpoint-2")
    assert tree["score"] == masked_accuracy(model, dev_examples(done, tokenizer, language), mask)


def test_each_seed_is_a_training_with_the_settings_of_the_full_model(done):
    states = {}
    for seed in (1, 2):
        folder = done / f"subnetworks/models/all/seed-{seed}"
        states[seed] = json.loads((folder / "training.json").read_text())
        assert not (folder / "resume").exists()
    assert not (done / "subnetworks/models/all/seed-0").exists()  # that is models/full
    full = json.loads((done / "models/full/training.json").read_text())
    for seed, state in states.items():
        assert state == full | {"seed": seed, "keep": "last"}
        checkpoints = (done / f"subnetworks/models/all/seed-{seed}").glob("checkpoint-*")
        assert [checkpoint.name for checkpoint in checkpoints] == ["checkpoint-2"]


def test_a_higher_threshold_keeps_at_least_as_many_heads(done):
    for language in LANGUAGES:
        sizes = [
            HeadMask.load(done / f"subnetworks/{folder}/{language}.json").size
            for folder in ("thresholds/1.0", ".", "thresholds/0.5")
        ]
        assert sizes == sorted(sizes, reverse=True)
    tree = json.loads((done / "subnetworks/thresholds/0.5/de.json").read_text())
    assert tree["threshold"] == 0.5


def test_monolingual_models_are_fine_tuned_on_their_language_alone(tmp_path):
    config = tiny_config(prune={"model": "monolingual", "other_thresholds": [0.5]})
    run = RunFolder(tmp_path / "run", config)
    run_stages(run, ["data", "finetune", "prune"])
    for language in LANGUAGES:
        folder = run.path / f"subnetworks/models/{language}/seed-0"
        last = load_checkpoints([folder / "checkpoint-2"])[0]
        assert last.step == 2 * 2  # 12 examples of the language, 8 a batch, 2 epochs
        model, tokenizer = load_model(last.path)
        result = prune(model, dev_examples(run.path, tokenizer, language), lowest=0.5)
        tree = json.loads((run.path / f"subnetworks/{language}.json").read_text())
        assert tree["mask"] == result.mask.array.tolist()
        assert tree["course"] == result.course
        assert tree["model"] == "monolingual"
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*.json")}
    run_stages(run, ["prune"], again="prune")
    unchanged = [path for path in before if "subnetworks" in path.parts]
    assert all(path.stat().st_mtime_ns == before[path] for path in unchanged)


def read(done, model, view, language, split):
    """Return the features of both checkpoints."""
    folder = done / "features" / model / view / (language or "")
    return [tm.FeatureStore.open(folder / f"checkpoint-{epoch}" / split).read() for epoch in (1, 2)]


@pytest.mark.parametrize("model", ["full", "sparse"])
@pytest.mark.parametrize("view", ["subnetwork-own", "random-own-0", "subnetwork-test"])
def test_views_without_features_combine_the_features_of_other_views(done, model, view):
    train = pq.read_table(done / "data/train.parquet")
    test = pq.read_table(done / "data/test.parquet")
    weights = [
        checkpoint.learning_rate
        for checkpoint in load_checkpoints(
            done / "models" / model / f"checkpoint-{epoch}" for epoch in (1, 2)
        )
    ]
    written = pq.read_table(done / "influence" / model / view / "top.parquet").to_pandas()
    ids, languages = train["id"].to_pylist(), np.array(train["language"].to_pylist())
    source = "random-0" if view == "random-own-0" else "subnetwork"
    for language in LANGUAGES:
        trains = read(done, model, "full", None, "train")
        if view != "subnetwork-test":
            for other in LANGUAGES:
                own = torch.from_numpy(languages == other)
                masked = read(done, model, source, other, "train")
                for features, masked_features in zip(trains, masked, strict=True):
                    features[own] = masked_features[own]
        queries = read(done, model, source, language, "test")
        top = top_influences(queries, trains, 5, weights=weights, normalize="cosine")
        rows = [row for row in test.to_pylist() if row["language"] == language]
        for row, indices, scores in zip(rows, top.indices.tolist(), top.scores, strict=True):
            proponents = written[(written.test_id == row["id"]) & (written.sign == 1)]
            assert proponents.train_id.tolist() == [ids[index] for index in indices]
            np.testing.assert_allclose(proponents.score, scores, rtol=1e-6)
    assert not (done / "features" / model / view).exists()


def test_views_of_two_languages_have_a_single_mask(done):
    en, de, es = (HeadMask.load(done / f"subnetworks/{name}.json").array for name in LANGUAGES)
    views = {view.name: dict(view.masks) for view in RunContext(RunFolder(done)).views}
    assert views["union-en+de"] == {None: HeadMask(en | de)}
    assert views["intersection-de+es"] == {None: HeadMask(de & es)}
    store = tm.FeatureStore.open(done / "features/full/union-en+de/checkpoint-1/test")
    assert len(store.ids) == 18


@pytest.mark.slow
def test_a_run_killed_at_many_moments_and_resumed_writes_the_same_files(done, tmp_path):
    out = tmp_path / "run"
    assert run_killing(tiny_config(**OPTIONS), out) >= 1
    assert files_of(out, *RESULTS) == files_of(done, *RESULTS)


def test_dynamic_masks_are_applied_at_their_checkpoints(tmp_path):
    config = tiny_config(
        prune={"step": 0.5},
        finetune={"learning_rate": 5e-3},  # large enough to change every mask
        sparse_finetune={"masks": "dynamic"},
        views={"other": ["de"], "random": 1},
    )
    run = RunFolder(tmp_path / "run", config)
    run_stages(run)
    context = RunContext(run)
    train = pq.read_table(run.data("train"))
    for epoch in (1, 2):
        model, tokenizer = load_model(run.model("sparse") / f"checkpoint-{epoch}")
        examples = encode(tokenizer, train, 48)
        for language in LANGUAGES:
            mask = HeadMask.load(run.model("sparse") / f"masks/epoch-{epoch}/{language}.json")
            features = tm.FeatureStore.open(
                run.path / f"features/sparse/subnetwork/{language}/checkpoint-{epoch}/train"
            ).read()
            expected = tm.collect_features(model, examples, tm.Projection(256), head_mask=mask)
            torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
            assert (mask == context.subnetworks[language]) == (epoch == 1)
            views = {view.name: dict(view.masks) for view in context.views_at("sparse", epoch)}
            assert views["subnetwork"][language] == mask
        german = HeadMask.load(run.model("sparse") / f"masks/epoch-{epoch}/de.json")
        assert views["other-de"] == {None: german}
    assert context.views_at("full", 2) == context.views
    exported = export_subnetwork(run.path, tmp_path / "de", language="de", model="sparse")
    assert exported.mask == german  # that of epoch 2
    exported = export_subnetwork(run.path, tmp_path / "full-de", language="de")
    assert exported.mask == context.subnetworks["de"]
    assert Attributor(run.path, "sparse", "subnetwork", "de").query("Der Hund schläft.", "x", k=1)
    assert verify(run.path) == []


def test_the_run_is_valid_and_its_report_shows_the_thresholds(done):
    assert verify(done) == []
    page = Page((done / "report/index.html").read_text(encoding="utf-8"))
    assert ("section", {"id": "subnetworks"}) in page.tags
    assert "threshold of 95%" in page.text  # beside the figure of pruning
    headings = " ".join(text for tag, text in page.texts if tag == "th")
    assert all(threshold in headings for threshold in ("95%", "50%", "100%"))
    with pytest.raises(ValueError, match=r"\bfull\b.*\bsubnetwork-own\b"):
        Attributor(done, "full", "subnetwork-own", "de")


def test_views_that_cannot_be_are_refused():
    for views, what in (
        ({"subnetwork": False, "subnetwork_own": True}, "subnetwork: .*subnetwork_own.* got false"),
        ({"union": [["en", "en"]]}, "union: .*got en twice"),
        ({"intersection": [["en", "fr"]]}, "views: .*got fr"),
        ({"other": ["ja"]}, "views: .*got ja"),
    ):
        with pytest.raises(ValueError, match=what):
            tiny_config(views=views)
    for prune_, what in (
        ({"seeds": 0}, "prune.seeds"),
        ({"combine": "all"}, "prune.combine"),
        ({"other_thresholds": [0.9, 1.5]}, r"prune\.other_thresholds\.1"),
    ):
        with pytest.raises(ValueError, match=what):
            tiny_config(prune=prune_)


def test_random_masks_have_the_sizes_of_the_subnetworks_whatever_the_other_views():
    masks = {"en": HeadMask([[1, 0, 1, 1]]), "de": HeadMask([[0, 0, 1, 0]])}
    config = tiny_config(task={"languages": ["en", "de"]}, views={"random": 2, "other": []})
    views = {view.name: view for view in views_of(config.views, masks, seed=0)}
    for draw in ("random-0", "random-1"):
        assert [mask.size for _, mask in views[draw].masks] == [3, 1]
    more = config.views.model_copy(update={"other": ["en"], "union": [("en", "de")]})
    assert views_of(more, masks, seed=0)[3] == views["random-1"]
