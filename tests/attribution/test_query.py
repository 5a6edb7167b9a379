"""`tracmod query` and `tracmod index`: answers are brute force's, whatever found the candidates."""

from __future__ import annotations

import json
import shutil

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
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.output


def ask(folder, *options, text=TEXT):
    return json.loads(invoke("query", folder, text, *options, "--json"))


def attribute(folder, *options):
    given = [f"--checkpoint={folder / name}" for name in ("checkpoint-1", "checkpoint-2")]
    invoke("attribute", "--model", folder / "model", *given, "--train", folder / "train.tsv",
           "--query", folder / "query.tsv", "--out", folder / "out", *options)  # fmt: skip


def test_preconditioned_features_answer_as_exact_scores_do(tmp_path):
    """And are refused with another metric; training examples added later leave it as it is."""
    save_checkpoints(tmp_path)
    for split, count in (("train", 8), ("query", 2)):
        write_examples(tmp_path / f"{split}.tsv", count)
    attribute(tmp_path, "--preconditioner", "ekfac", "--projection-dim", 16384, "-k", 24)
    file = tmp_path / "out" / "preconditioners" / "checkpoint-1.safetensors"
    fitted = file.read_bytes()
    certificate = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert certificate["spearman"]["value"] > 0.95
    found = ask(tmp_path / "out", "-k", 24)
    scores = {one["id"]: one["score"] for one in found["proponents"]}
    with open(tmp_path / "train.tsv", "a", encoding="utf-8") as lines:
        lines.write("more\ten\tthe old dog sings\tyes\tg99\n")
    attribute(tmp_path, "--preconditioner", "ekfac", "--projection-dim", 16384, "-k", 25)
    assert file.read_bytes() == fitted
    again = {one["id"]: one["score"] for one in ask(tmp_path / "out", "-k", 25)["proponents"]}
    assert again == pytest.approx({**scores, "more": again["more"]}, abs=1e-6)
    shutil.rmtree(tmp_path / "out" / "features")
    (tmp_path / "train.tsv").write_text((tmp_path / "train.tsv").read_text().replace("old", "new"))
    given = ["attribute", "--model", tmp_path / "model", "--train", tmp_path / "train.tsv",
             "--query", tmp_path / "query.tsv", "--out", tmp_path / "out"]  # fmt: skip
    output = invoke(*given, "--preconditioner", "ekfac", code=2)
    assert "fitted on other training examples" in output
    (tmp_path / "train.tsv").write_text((tmp_path / "train.tsv").read_text().replace("new", "old"))
    other = tmp_path / "plain"
    other.mkdir()
    for name in ("model", "checkpoint-1", "checkpoint-2", "train.tsv", "query.tsv"):
        (other / name).symlink_to(tmp_path / name)
    attribute(other, "--projection-dim", 16384, "-k", 24)
    plain = {one["id"]: one["score"] for one in ask(other / "out", "-k", 24)["proponents"]}
    assert any(abs(plain[name] - scores[name]) > 0.01 for name in plain.keys() & scores.keys())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An attribution of 300 training examples, with all that it was made from."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("query")
    save_checkpoints(folder)
    write_examples(folder / "train.tsv", PER_LANGUAGE)
    write_examples(folder / "query.tsv", 10)
    attribute(folder, "--projection-dim", 96)
    return folder


@pytest.fixture
def own(made, tmp_path):
    """A copy to change: everything in it names the copy's own files."""
    shutil.copytree(made, tmp_path / "own")
    record = tmp_path / "own/out/run.json"
    record.write_text(record.read_text().replace(str(made), str(tmp_path / "own")))
    return tmp_path / "own"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three languages with collected features."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("query-run") / "run"
    stages = ["data", "finetune", "prune", "sparse-finetune", "collect"]
    run_stages(RunFolder(folder, tiny_config(finetune={"epochs": 1})), stages)
    return folder


def brute_force(attributor, label, text=TEXT, text_b=None):
    """Every training example's score, by id: the dense call over all rows."""
    import pyarrow as pa

    names = attributor.source.label_names
    number = int(label) if len(names) == 1 else names.index(label)
    table = pa.table({"id": ["q"], "text_a": [text], "text_b": pa.array([text_b], pa.string()),
                      "label": [number]})  # fmt: skip
    scores = tm.influence_scores(
        attributor._features(table),
        [store.read() for store in attributor.train_stores],
        attributor.source.weights,
        attributor.source.normalize,
    )[0]
    return dict(zip(attributor.train_stores[0].ids, scores.tolist(), strict=True))


def check_answer(answer, scores, languages, k, rows_of_id):
    """Both sides are the brute force's best among the languages, in its order, with its scores."""
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
    rows = attributor.source.train.to_pylist()
    names = attributor.source.label_names
    return {row["id"]: row | {"label": names[row["label"]]} for row in rows}


# --- without an index -----------------------------------------------------------------------


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


def test_a_training_example_is_its_own_first_proponent(made):
    line = (made / "train.tsv").read_text(encoding="utf-8").splitlines()[8].split("\t")
    answer = ask(made / "out", "--label", line[3], text=line[2])
    first = answer["proponents"][0]
    assert first["text_a"] == line[2]
    assert first["label"] == line[3]
    assert first["score"] == pytest.approx(sum(RATES), rel=1e-5)  # cosines of 1


def test_rows_are_read_in_blocks_and_only_where_languages_are(made, monkeypatch):
    attributor = tm.Attributor(made / "out")
    languages = attributor.source.train.column("language").to_pylist()
    taken, real = [], tm.FeatureStore.take
    monkeypatch.setattr(
        tm.FeatureStore, "take", lambda *given: taken.append(given[1]) or real(*given)
    )
    attributor.query(TEXT, k=20, languages=["de"])
    assert {languages[row] for rows in taken for row in rows} == {"de"}
    shards = {store.shard_rows for store in attributor.train_stores}
    assert max(map(len, taken)) <= max(shards)


def test_rows_are_scored_on_the_folders_device(made, monkeypatch):
    """Told without a GPU by the device that has no data."""
    devices, real = set(), kernels.top_k_dot

    def record(queries, trains, **named):
        devices.update(one.device.type for one in [*queries, *trains])
        return real(*([torch.ones(one.shape) for one in side] for side in (queries, trains)),
                    **named)  # fmt: skip

    monkeypatch.setattr(kernels, "top_k_dot", record)
    attributor = tm.Attributor(made / "out")
    attributor.train_stores  # noqa: B018 (opened before: models stay where they are)
    attributor.source.device = "meta"
    attributor._rank([torch.ones(1, 96)] * 2, 3, torch.arange(300))
    assert devices == {"meta"}


# --- with an index --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("languages", [None, ["de"]], ids=str)
def test_scores_are_the_stores_own_whichever_index_answers(own, kind, languages):
    attributor = tm.Attributor(own / "out")
    attributor.build_index(kind, recall=1.0)
    answer = attributor.query(TEXT, label="yes", k=5, languages=languages)
    assert answer["index"] == kind
    scores, rows = brute_force(attributor, "yes"), rows_by_id(attributor)
    for side, sign in (("proponents", -1), ("opponents", 1)):
        found = [row["score"] for row in answer[side]]
        assert found == sorted(found, key=lambda score, sign=sign: sign * score)
        assert len(found) == 5
        for row in answer[side]:
            assert row["score"] == pytest.approx(scores[row["id"]], rel=1e-4, abs=1e-6)
            assert languages is None or row["language"] in languages
    check_answer(answer, scores, languages or WORDS, 5, rows)


def test_codes_that_rank_wrongly_are_put_right(own):
    """The index's own order is another one; the answer's is that of the exact scores."""
    attributor = tm.Attributor(own / "out")
    index = attributor.build_index("ivfpq")
    real = InfluenceIndex.search
    found = {}

    def remember(self, queries, k, **named):
        found[named["opponents"]] = real(self, queries, k, **named)
        return found[named["opponents"]]

    InfluenceIndex.search = remember
    try:
        answer = attributor.query(TEXT, label="yes", k=10)
    finally:
        InfluenceIndex.search = real
    assert found[False].indices.shape == (1, 100)
    candidates = {index.ids[row] for one in found.values() for row in one.indices[0].tolist()}
    scores = brute_force(attributor, "yes")
    best = sorted(candidates, key=lambda name: -scores[name])[:10]
    assert [row["id"] for row in answer["proponents"]] == best
    assert best != [index.ids[row] for row in found[False].indices[0, :10].tolist()]


def test_an_index_that_finds_too_few_of_a_language_is_not_used(own):
    attributor = tm.Attributor(own / "out")
    attributor.build_index("ivf")
    attributor._index.effort = 1  # of 7 lists: they hold about 14 rows of each language
    assert attributor.query(TEXT, label="yes", k=2)["index"] == "ivf"
    answer = attributor.query(TEXT, label="yes", k=60, languages=["es"])
    assert answer["index"] is None
    check_answer(answer, brute_force(attributor, "yes"), ["es"], 60, rows_by_id(attributor))


def test_an_index_of_features_made_anew_is_refused(own):
    invoke("index", own / "out")
    shutil.rmtree(own / "out/features")
    attribute(own, "--projection-dim", 96, "--seed", 1)
    output = invoke("query", own / "out", TEXT, code=2)
    assert "the index was built from something else: checkpoint 0.projection.seed" in output
    invoke("index", own / "out")
    invoke("query", own / "out", TEXT)


# --- the commands ---------------------------------------------------------------------------


def test_an_attribution_is_indexed_and_queried_by_commands(own):
    out = own / "out"
    exact = ask(out, "--language", "de", "--language", "es", "-k", 3)
    assert list(exact["proponents"][0]) == [
        "rank", "score", "id", "language", "text_a", "text_b", "label", "group",
    ]  # fmt: skip
    told = invoke("index", out, "--kind", "ivf", "--recall", 0.9, "--memory", "200MB")
    lines = told.splitlines()
    assert lines[0] == f"{out / 'index'}: ivf, 300 examples"
    assert "bytes per example: " in lines[1]
    assert lines[2].startswith("recall@100 against exact, 30 queries: ")
    assert lines[3].startswith("lists probed by a search: ")
    assert lines[3].endswith(" of 7")
    assert lines[4].startswith("seconds: ")
    indexed = ask(out, "--language", "de", "--language", "es", "-k", 3)
    assert (exact["index"], indexed["index"]) == (None, "ivf")
    assert exact["languages"] == indexed["languages"] == ["de", "es"]
    text = invoke("query", out, TEXT, "--language", "de")
    assert "candidates of the ivf index" in text
    assert "   de " in text
    assert "   en " not in text
    assert "sound" in invoke("verify", out)
    path = out / "index/index.faiss"
    path.write_bytes(path.read_bytes()[:-1])
    assert "index.faiss is damaged" in invoke("query", out, TEXT, code=2)


def test_a_model_without_checkpoints_answers_with_weight_1(own):
    """Also where a learning rate stands beside it: the results were made without."""
    shutil.copy(own / "checkpoint-1/trainer_state.json", own / "model")
    out = own / "alone"
    invoke("attribute", "--model", own / "model", "--train", own / "train.tsv", "--query",
           own / "query.tsv", "--out", out, "--projection-dim", 96)  # fmt: skip
    line = (own / "train.tsv").read_text(encoding="utf-8").splitlines()[8].split("\t")
    answer = ask(out, "--label", line[3], text=line[2])
    assert answer["proponents"][0]["score"] == pytest.approx(1, rel=1e-5)


def test_labels_of_a_model_with_one_output_are_whole_numbers(tmp_path):
    save_checkpoints(tmp_path, num_labels=1)
    write_examples(tmp_path / "train.tsv", 10, labels=["1", "5", "3"])
    write_examples(tmp_path / "query.tsv", 3, labels=["1", "5"])
    attribute(tmp_path, "--projection-dim", 64)
    answer = ask(tmp_path / "out", "--label", "4")
    assert answer["label"] == "4"
    assert {row["label"] for row in answer["proponents"]} <= {"1", "3", "5"}
    assert ask(tmp_path / "out")["label"] == ask(tmp_path / "out")["prediction"]
    assert "expected a whole number" in invoke(
        "query", tmp_path / "out", TEXT, "--label", "good", code=2
    )


def test_paths_given_from_one_folder_are_found_from_another(own, tmp_path, monkeypatch):
    tm.HeadMask.from_array([[1, 0, 1], [1, 1, 1]]).save(own / "mask.json")
    monkeypatch.chdir(own)
    invoke("attribute", "--model", "model", "--checkpoint", "checkpoint-1", "--train", "train.tsv",
           "--query", "query.tsv", "--out", "masked", "--head-mask", "mask.json",
           "--projection-dim", 96)  # fmt: skip
    monkeypatch.chdir(tmp_path)
    attributor = tm.Attributor(own / "masked")
    assert attributor.source.masks[0].size == 5
    scores = brute_force(attributor, "yes")
    check_answer(attributor.query(TEXT, label="yes", k=5), scores, WORDS, 5, rows_by_id(attributor))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("train.tsv", "train was built with something else: data: expected"),
        ("checkpoint-2", "checkpoint-2/train was built with something else: model: expected"),
        ("tokenizer", "train was built with something else: tokenizer: expected"),
    ],
)
def test_what_was_changed_since_is_named_and_refused(own, changed, message):
    if changed == "train.tsv":
        text = (own / changed).read_text(encoding="utf-8")
        (own / changed).write_text(text.replace("cat", "dog", 1), encoding="utf-8")
    elif changed == "tokenizer":
        tree = json.loads((own / "model/tokenizer.json").read_text())
        tree["normalizer"] = {"type": "Lowercase"}
        (own / "model/tokenizer.json").write_text(json.dumps(tree))
    else:
        weights = load_file(own / changed / "model.safetensors")
        name = next(name for name in weights if name.endswith("output.dense.weight"))
        weights[name] = -weights[name]
        save_file(weights, own / changed / "model.safetensors", {"format": "pt"})
    for command in (["query", own / "out", TEXT], ["index", own / "out"]):
        output = invoke(*command, code=2)
        assert message in output
        assert len(output.strip().splitlines()) == 1


def test_changed_queries_do_not_matter(own):
    before = ask(own / "out")
    write_examples(own / "query.tsv", 4)
    assert ask(own / "out") == before
    invoke("index", own / "out")


def test_what_cannot_answer_says_why(made, run, tmp_path):
    attribute_exactly = tmp_path / "exact"
    small = tmp_path / "small.tsv"
    write_examples(small, 2)
    invoke("attribute", "--model", made / "model", "--train", small, "--query", small,
           "--out", attribute_exactly, "--exact")  # fmt: skip
    for command in ("index", "query"):
        more = [TEXT] if command == "query" else []
        output = invoke(command, attribute_exactly, *more, code=2)
        assert "keeps scores and no features" in output
        assert "choices of a run folder" in invoke(
            command, made / "out", *more, "--view", "subnetwork", code=2
        )
        assert "no run.json there" in invoke(command, tmp_path, *more, code=2)
    for folder in (made / "out", run):
        assert "language: expected some of de, en, es, got fr" in invoke(
            "query", folder, TEXT, "--language", "fr", "--language", "de", code=2
        )
        assert "label: expected one of" in invoke("query", folder, TEXT, "--label", "x", code=2)
        assert "k: expected at least 1" in invoke("query", folder, TEXT, "-k", 0, code=2)


def test_options_of_the_index_that_cannot_be_met_are_one_sentence(own):
    out = own / "out"
    for options, message in [
        (["--device", "cuda:97", "--kind", "ivf"], "got cuda:97"),
        (["--device", "gpu"], "expected cpu, cuda, cuda:1, ..., got gpu"),
        (["--memory", "much"], "memory: expected a size such as 4GB or 512MiB, got 'much'"),
        (["--memory", "0"], "memory: expected a size such as 4GB"),
    ]:
        output = invoke("index", out, *options, code=2)
        assert message in output
        assert len(output.strip().splitlines()) == 1
    assert "--recall" in invoke("index", out, "--recall", 1.1, code=2)
    assert not (out / "index").exists()


def test_asking_changes_nothing(made):
    attributor = tm.Attributor(made / "out")
    first = attributor.query(TEXT, k=3)
    attributor.query("der Hund rennt heim", label="no")
    assert attributor.query(TEXT, k=3) == first
    assert not (made / "out/index").exists()
