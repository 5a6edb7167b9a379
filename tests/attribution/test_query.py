"""`tracmod query` and `tracmod index`: with or without an index, answers are exact."""

from __future__ import annotations

import json
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from made_checkpoints import RATES, WORDS, save_checkpoints, write_examples
from safetensors.torch import load_file, save_file
from tiny_study import tiny_config

import tracmod as tm
from tracmod import kernels
from tracmod.cli import main
from tracmod.influence.index import KINDS, InfluenceIndex
from tracmod.study.pipeline import run_stages
from tracmod.study.run_folder import RunFolder

PER_LANGUAGE = 100
TEXT = "the old cat sleeps home"


def invoke(*arguments, code=0):
    """Run a command in this process and return its output."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.output


def ask(folder, *options, text=TEXT):
    """Return the answer of `tracmod query`."""
    return json.loads(invoke("query", folder, text, *options, "--json"))


def scores_of(answer):
    """Return the scores of the proponents, by id."""
    return {row["id"]: row["score"] for row in answer["proponents"]}


def attribute(folder, *options):
    """Run `tracmod attribute` on the files in a folder."""
    checkpoints = [f"--checkpoint={folder / name}" for name in ("checkpoint-1", "checkpoint-2")]
    invoke("attribute", "--model", folder / "model", *checkpoints, "--train", folder / "train.tsv",
           "--query", folder / "query.tsv", "--out", folder / "out", *options)  # fmt: skip


def test_scores_of_preconditioned_features_are_close_to_exact_and_of_one_fit(tmp_path):
    """Training examples added later do not change the fit; changed ones are refused."""
    save_checkpoints(tmp_path)
    for split, count in (("train", 8), ("query", 2)):
        write_examples(tmp_path / f"{split}.tsv", count)
    attribute(tmp_path, "--preconditioner", "ekfac", "--projection-dim", 16384, "-k", 24)
    file = tmp_path / "out" / "preconditioners" / "checkpoint-1.safetensors"
    fitted = file.read_bytes()
    certificate = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert certificate["spearman"]["value"] > 0.95
    scores = scores_of(ask(tmp_path / "out", "-k", 24))
    with open(tmp_path / "train.tsv", "a", encoding="utf-8") as lines:
        lines.write("more\ten\tthe old dog sings\tyes\tg99\n")
    attribute(tmp_path, "--preconditioner", "ekfac", "--projection-dim", 16384, "-k", 25)
    assert file.read_bytes() == fitted
    again = scores_of(ask(tmp_path / "out", "-k", 25))
    assert again == pytest.approx({**scores, "more": again["more"]}, abs=1e-6)
    shutil.rmtree(tmp_path / "out" / "features")
    (tmp_path / "train.tsv").write_text((tmp_path / "train.tsv").read_text().replace("old", "new"))
    command = ["attribute", "--model", tmp_path / "model", "--train", tmp_path / "train.tsv",
               "--query", tmp_path / "query.tsv", "--out", tmp_path / "out"]  # fmt: skip
    output = invoke(*command, "--preconditioner", "ekfac", code=2)
    assert re.search(r"/out/preconditioners\b.*/train\.tsv\b", output)
    (tmp_path / "train.tsv").write_text((tmp_path / "train.tsv").read_text().replace("new", "old"))
    other = tmp_path / "plain"
    other.mkdir()
    for name in ("model", "checkpoint-1", "checkpoint-2", "train.tsv", "query.tsv"):
        (other / name).symlink_to(tmp_path / name)
    attribute(other, "--projection-dim", 16384, "-k", 24)
    plain = scores_of(ask(other / "out", "-k", 24))
    assert any(abs(plain[name] - scores[name]) > 0.01 for name in plain.keys() & scores.keys())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An attribution of 300 training examples, with its models and files of examples."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("query")
    save_checkpoints(folder)
    write_examples(folder / "train.tsv", PER_LANGUAGE)
    write_examples(folder / "query.tsv", 10)
    attribute(folder, "--projection-dim", 96)
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the attribution, for tests that change it; its record names its own files."""
    shutil.copytree(made, tmp_path / "copy")
    record = tmp_path / "copy/out/run.json"
    record.write_text(record.read_text().replace(str(made), str(tmp_path / "copy")))
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with three languages and collected features."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("query-run") / "run"
    stages = ["data", "finetune", "prune", "sparse-finetune", "collect"]
    run_stages(RunFolder(folder, tiny_config(finetune={"epochs": 1})), stages)
    return folder


def brute_force(attributor, label, text=TEXT, text_b=None):
    """Return the score of every training example, by id, computed from all stored rows."""
    names = attributor.source.label_names
    number = int(label) if len(names) == 1 else names.index(label)
    table = pa.table({"id": ["q"], "text_a": [text], "text_b": pa.array([text_b], pa.string()),
                      "language": pa.array([None], pa.string()), "label": [number]})  # fmt: skip
    scores = tm.influence_scores(
        attributor._features(table),
        [store.read() for store in attributor.train_stores],
        attributor.source.weights,
        attributor.source.normalize,
    )[0]
    return dict(zip(attributor.train_stores[0].ids, scores.tolist(), strict=True))


def check_answer(answer, scores, languages, k, rows_of_id):
    """Proponents and opponents are the k strongest by `scores` among the languages, in order."""
    allowed = [name for name in scores if rows_of_id[name]["language"] in languages]
    for side, sign in (("proponents", -1), ("opponents", 1)):
        expected = sorted(scores[name] * sign for name in allowed)[:k]
        rows = answer[side]
        assert [row["rank"] for row in rows] == list(range(1, len(expected) + 1))
        assert [row["score"] * sign for row in rows] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        for row in rows:
            assert row["score"] == pytest.approx(scores[row["id"]], rel=1e-4, abs=1e-6)
            assert {key: row[key] for key in rows_of_id[row["id"]]} == rows_of_id[row["id"]]


def rows_by_id(attributor):
    """Return the training examples, with names of labels."""
    rows = attributor.source.train.to_pylist()
    names = attributor.source.label_names
    return {row["id"]: row | {"label": names[row["label"]]} for row in rows}


# Without an index


@pytest.mark.parametrize("languages", [None, ["de"], ["es", "en"]], ids=str)
def test_a_language_filter_equals_brute_force_on_an_attribution(made, languages):
    attributor = tm.Attributor(made / "out")
    answer = attributor.query(TEXT, label="yes", k=7, languages=languages)
    assert (answer["languages"], answer["index"]) == (languages, None)
    scores = brute_force(attributor, "yes")
    check_answer(answer, scores, languages or WORDS, 7, rows_by_id(attributor))


@pytest.mark.parametrize("languages", [None, ["de"], ["es", "en"]], ids=str)
def test_a_language_filter_equals_brute_force_on_a_run(run, languages):
    attributor = tm.Attributor(run, "sparse", "subnetwork", "de")
    answer = attributor.query("Der Hund schläft.", "Ein Tier schläft.", k=50, languages=languages)
    scores = brute_force(attributor, answer["label"], "Der Hund schläft.", "Ein Tier schläft.")
    check_answer(answer, scores, languages or ["en", "de", "es"], 50, rows_by_id(attributor))
    assert len(answer["opponents"]) == 12 * len(languages or WORDS)


def test_a_training_example_is_its_own_strongest_proponent(made):
    line = (made / "train.tsv").read_text(encoding="utf-8").splitlines()[8].split("\t")
    answer = ask(made / "out", "--label", line[3], text=line[2])
    first = answer["proponents"][0]
    assert first["text_a"] == line[2]
    assert first["label"] == line[3]
    assert first["score"] == pytest.approx(sum(RATES), rel=1e-5)  # both cosines are 1


def test_only_rows_of_the_languages_are_read_in_blocks(made, monkeypatch):
    attributor = tm.Attributor(made / "out")
    languages = attributor.source.train.column("language").to_pylist()
    blocks, take = [], tm.FeatureStore.take

    def record(store, rows, *rest):
        blocks.append(rows)
        return take(store, rows, *rest)

    monkeypatch.setattr(tm.FeatureStore, "take", record)
    attributor.query(TEXT, k=20, languages=["de"])
    assert {languages[row] for rows in blocks for row in rows} == {"de"}
    shard_rows = {store.shard_rows for store in attributor.train_stores}
    assert max(map(len, blocks)) <= max(shard_rows)


def test_rows_are_scored_on_the_device_of_the_folder(made, monkeypatch):
    """The device "meta", whose tensors have no data, stands for a GPU."""
    devices, top_k_dot = set(), kernels.top_k_dot

    def record(queries, trains, **named):
        devices.update(features.device.type for features in [*queries, *trains])
        on_cpu = [[torch.ones(features.shape) for features in side] for side in (queries, trains)]
        return top_k_dot(*on_cpu, **named)

    monkeypatch.setattr(kernels, "top_k_dot", record)
    monkeypatch.setattr("tracmod.influence.scores.checked_device", torch.device)  # takes meta, too
    attributor = tm.Attributor(made / "out")
    attributor.train_stores  # noqa: B018 (opened while models are on the CPU)
    attributor.source.device = "meta"
    attributor._rank([torch.ones(1, 96)] * 2, 3, torch.arange(300), opponents=True)
    assert devices == {"meta"}


# With an index


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("languages", [None, ["de"]], ids=str)
def test_scores_are_those_of_the_stored_features_with_every_kind_of_index(copy, kind, languages):
    attributor = tm.Attributor(copy / "out")
    attributor.build_index(kind, recall=1.0)
    answer = attributor.query(TEXT, label="yes", k=5, languages=languages)
    assert answer["index"] == kind
    scores, rows = brute_force(attributor, "yes"), rows_by_id(attributor)
    for side, sign in (("proponents", -1), ("opponents", 1)):
        side_scores = [row["score"] for row in answer[side]]
        assert side_scores == sorted(side_scores, key=lambda score, sign=sign: sign * score)
        assert len(side_scores) == 5
        for row in answer[side]:
            assert row["score"] == pytest.approx(scores[row["id"]], rel=1e-4, abs=1e-6)
            assert languages is None or row["language"] in languages
    check_answer(answer, scores, languages or WORDS, 5, rows)


def test_candidates_of_an_inexact_index_are_ranked_by_exact_scores(copy, monkeypatch):
    """The codes of the index rank them in another order."""
    attributor = tm.Attributor(copy / "out")
    index = attributor.build_index("ivfpq")
    search, results = InfluenceIndex.search, {}

    def record(self, queries, k, **named):
        results[named["opponents"]] = search(self, queries, k, **named)
        return results[named["opponents"]]

    monkeypatch.setattr(InfluenceIndex, "search", record)
    answer = attributor.query(TEXT, label="yes", k=10)
    assert results[False].indices.shape == (1, 100)
    rows = {row for result in results.values() for row in result.indices[0].tolist()}
    scores = brute_force(attributor, "yes")
    best = sorted((index.ids[row] for row in rows), key=lambda name: -scores[name])[:10]
    assert [row["id"] for row in answer["proponents"]] == best
    assert best != [index.ids[row] for row in results[False].indices[0, :10].tolist()]


def test_an_index_that_returns_too_few_rows_of_a_language_is_not_used(copy):
    attributor = tm.Attributor(copy / "out")
    attributor.build_index("ivf")
    attributor._index.effort = 1  # searches 1 of 7 lists, with about 14 rows of each language
    assert attributor.query(TEXT, label="yes", k=2)["index"] == "ivf"
    answer = attributor.query(TEXT, label="yes", k=60, languages=["es"])
    assert answer["index"] is None
    check_answer(answer, brute_force(attributor, "yes"), ["es"], 60, rows_by_id(attributor))


def test_an_index_of_features_that_were_replaced_is_refused(copy):
    invoke("index", copy / "out")
    shutil.rmtree(copy / "out/features")
    attribute(copy, "--projection-dim", 96, "--seed", 1)
    output = invoke("query", copy / "out", TEXT, code=2)
    assert "index" in output
    assert "checkpoint 0.projection.seed" in output
    invoke("index", copy / "out")
    invoke("query", copy / "out", TEXT)


# The commands


def test_an_attribution_is_indexed_and_queried_by_commands(copy):
    out = copy / "out"
    exact = ask(out, "--language", "de", "--language", "es", "-k", 3)
    assert list(exact["proponents"][0]) == [
        "rank", "score", "id", "language", "text_a", "text_b", "label", "group",
    ]  # fmt: skip
    some = ask(out, "--language", "de", "--language", "es", "-k", 3, "--no-opponents")
    assert some == {**exact, "opponents": []}
    output = invoke("index", out, "--kind", "ivf", "--recall", 0.9, "--memory", "200MB")
    lines = output.splitlines()
    assert re.search(re.escape(str(out / "index")) + r"\b.*\bivf\b.*\b300\b", lines[0])
    assert re.search(r"bytes.*: \d", lines[1])
    assert re.search(r"recall@100\b.*\b30\b.*: [01]\.\d", lines[2])
    assert re.search(r": \d of 7$", lines[3])
    assert re.search(r"seconds.*: .*\d", lines[4])
    indexed = ask(out, "--language", "de", "--language", "es", "-k", 3)
    assert (exact["index"], indexed["index"]) == (None, "ivf")
    assert exact["languages"] == indexed["languages"] == ["de", "es"]
    some = ask(out, "--language", "de", "--language", "es", "-k", 3, "--no-opponents")
    assert some == {**indexed, "opponents": []}
    assert "opponents" not in invoke("query", out, TEXT, "--no-opponents")
    text = invoke("query", out, TEXT, "--language", "de")
    assert re.search(r"\bivf\b", text)
    assert "   de " in text
    assert "   en " not in text
    invoke("verify", out)
    path = out / "index/index.faiss"
    path.write_bytes(path.read_bytes()[:-1])
    assert "index.faiss" in invoke("query", out, TEXT, code=2)


def test_a_model_without_checkpoints_has_weight_1(copy):
    """A learning rate in its folder is not used, because the results do not use it either."""
    shutil.copy(copy / "checkpoint-1/trainer_state.json", copy / "model")
    out = copy / "alone"
    invoke("attribute", "--model", copy / "model", "--train", copy / "train.tsv", "--query",
           copy / "query.tsv", "--out", out, "--projection-dim", 96)  # fmt: skip
    line = (copy / "train.tsv").read_text(encoding="utf-8").splitlines()[8].split("\t")
    answer = ask(out, "--label", line[3], text=line[2])
    assert answer["proponents"][0]["score"] == pytest.approx(1, rel=1e-5)


def test_labels_of_a_model_with_one_output_are_numbers(tmp_path):
    save_checkpoints(tmp_path, num_labels=1)
    write_examples(tmp_path / "train.tsv", 10, labels=["1", "5", "3"])
    write_examples(tmp_path / "query.tsv", 3, labels=["1", "5"])
    attribute(tmp_path, "--projection-dim", 64)
    answer = ask(tmp_path / "out", "--label", "4")
    assert answer["label"] == "4"
    assert {row["label"] for row in answer["proponents"]} <= {"1", "3", "5"}
    assert ask(tmp_path / "out")["label"] == ask(tmp_path / "out")["prediction"]
    error = invoke("query", tmp_path / "out", TEXT, "--label", "good", code=2)
    assert re.search("label: .*got good", error)


def test_targets_of_a_model_with_one_output_are_real_numbers(tmp_path):
    """The sign of the residual, and with it that of every cosine, depends on the very target."""
    save_checkpoints(tmp_path, num_labels=1)
    labels = ["0.25", "-2.75", "1e-3"]
    write_examples(tmp_path / "train.tsv", 10, labels=labels)
    write_examples(tmp_path / "query.tsv", 3, labels=labels)
    attribute(tmp_path, "--projection-dim", 64)
    examples = pq.read_table(tmp_path / "out/examples.parquet").to_pylist()
    assert {row["test_label"] for row in examples} == {0.25, -2.75, 0.001}
    assert "sound" in invoke("verify", tmp_path / "out")
    attributor = tm.Attributor(tmp_path / "out")
    for row in attributor.source.train.to_pylist()[:4]:
        answer = ask(tmp_path / "out", "--label", str(row["label"]), text=row["text_a"])
        assert answer["label"] == str(row["label"])
        assert answer["proponents"][0]["score"] == pytest.approx(sum(RATES), rel=1e-4)
        assert {row["label"] for row in answer["proponents"]} <= {"0.25", "-2.75", "0.001"}
    below, above = (
        ask(tmp_path / "out", f"--label={label}")["proponents"] for label in ("-1e3", "1e3")
    )
    assert below[0]["id"] != above[0]["id"]
    for label in ("nan", "inf", "1e39", "1_0", "", "True"):
        error = invoke("query", tmp_path / "out", TEXT, f"--label={label}", code=2)
        assert re.search("label: expected a finite number", error), label


def test_an_empty_text_is_refused_and_an_empty_second_text_is_none(made):
    for text in ("", " \n"):
        with pytest.raises(ValueError, match=r"^text: .*empty"):
            tm.Attributor(made / "out").query(text)
    attributor = tm.Attributor(made / "out")
    assert attributor.query(TEXT, " ") == attributor.query(TEXT)


@pytest.mark.parametrize("name", ["text", "text_b", "label"])
def test_half_a_surrogate_pair_in_a_query_is_refused(made, name):
    texts = {"text": TEXT, "text_b": None, "label": None} | {name: "a \ud83d"}
    with pytest.raises(ValueError, match=rf"^{name} .*U\+D83D"):
        tm.Attributor(made / "out").query(*texts.values())


def test_relative_paths_are_resolved_from_any_working_directory(copy, tmp_path, monkeypatch):
    tm.HeadMask.from_array([[1, 0, 1], [1, 1, 1]]).save(copy / "mask.json")
    monkeypatch.chdir(copy)
    invoke("attribute", "--model", "model", "--checkpoint", "checkpoint-1", "--train", "train.tsv",
           "--query", "query.tsv", "--out", "masked", "--head-mask", "mask.json",
           "--projection-dim", 96)  # fmt: skip
    monkeypatch.chdir(tmp_path)
    attributor = tm.Attributor(copy / "masked")
    assert attributor.source.masks[0].size == 5
    scores = brute_force(attributor, "yes")
    check_answer(attributor.query(TEXT, label="yes", k=5), scores, WORDS, 5, rows_by_id(attributor))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("train.tsv", r"/train .*\bdata: expected"),
        ("checkpoint-2", r"checkpoint-2/train .*\bmodel: expected"),
        ("tokenizer", r"/train .*\btokenizer: expected"),
    ],
)
def test_a_changed_input_is_named_and_refused(copy, changed, message):
    if changed == "train.tsv":
        text = (copy / changed).read_text(encoding="utf-8")
        (copy / changed).write_text(text.replace("cat", "dog", 1), encoding="utf-8")
    elif changed == "tokenizer":
        tree = json.loads((copy / "model/tokenizer.json").read_text())
        tree["normalizer"] = {"type": "Lowercase"}
        (copy / "model/tokenizer.json").write_text(json.dumps(tree))
    else:
        weights = load_file(copy / changed / "model.safetensors")
        name = next(name for name in weights if name.endswith("output.dense.weight"))
        weights[name] = -weights[name]
        save_file(weights, copy / changed / "model.safetensors", {"format": "pt"})
    for command in (["query", copy / "out", TEXT], ["index", copy / "out"]):
        output = invoke(*command, code=2)
        assert re.search(message, output)
        assert len(output.strip().splitlines()) == 1


def test_changed_queries_do_not_change_answers(copy):
    before = ask(copy / "out")
    write_examples(copy / "query.tsv", 4)
    assert ask(copy / "out") == before
    invoke("index", copy / "out")


def test_folders_and_arguments_without_an_answer_are_refused(made, run, tmp_path):
    exact = tmp_path / "exact"
    small = tmp_path / "small.tsv"
    write_examples(small, 2)
    invoke("attribute", "--model", made / "model", "--train", small, "--query", small,
           "--out", exact, "--exact")  # fmt: skip
    for command, texts in (("index", []), ("query", [TEXT])):
        output = invoke(command, exact, *texts, code=2)
        assert re.search(re.escape(str(exact)) + ".*--exact", output)
        output = invoke(command, made / "out", *texts, "--view", "subnetwork", code=2)
        assert re.search(re.escape(str(made / "out")) + r".*\bview\b", output)
        output = invoke(command, tmp_path, *texts, code=2)
        assert re.search(re.escape(str(tmp_path)) + r".*run\.json", output)
    for folder in (made / "out", run):
        options = ("--language", "fr", "--language", "de")
        output = invoke("query", folder, TEXT, *options, code=2)
        assert re.search("language: .*de, en, es, got fr", output)
        output = invoke("query", folder, TEXT, "--label", "x", code=2)
        assert re.search("label: .*got x", output)
        output = invoke("query", folder, TEXT, "-k", 0, code=2)
        assert re.search(r"\bk: .*got 0", output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda:97", "--kind", "ivf"], "got cuda:97"),
        (["--device", "gpu"], "got gpu"),
        (["--memory", "much"], "memory: .*got 'much'"),
        (["--memory", "0"], "memory: .*got '0'"),
    ],
)
def test_invalid_options_of_the_index_are_errors_of_one_line(copy, options, message):
    output = invoke("index", copy / "out", *options, code=2)
    *usage, error = output.strip().splitlines()
    assert re.search(message, error)
    assert not usage or usage[0].startswith("Usage: ")  # click's, before an option out of range
    assert not (copy / "out/index").exists()


def test_a_recall_above_1_is_refused(copy):
    assert "--recall" in invoke("index", copy / "out", "--recall", 1.1, code=2)
    assert not (copy / "out/index").exists()


def test_a_query_changes_no_later_answer(made):
    attributor = tm.Attributor(made / "out")
    first = attributor.query(TEXT, k=3)
    attributor.query("der Hund rennt heim", label="no")
    assert attributor.query(TEXT, k=3) == first
    assert not (made / "out/index").exists()
