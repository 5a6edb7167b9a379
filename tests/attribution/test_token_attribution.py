"""`attribute`, `check`, `query`, `explore` and TracInCallback with a token classifier."""

from __future__ import annotations

import json
import warnings

import peft
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from encoders import LABELS, tiny_encoder
from families import small_tagger
from made_checkpoints import WORDS
from transformers import AutoModelForTokenClassification, Trainer, TrainingArguments

import tracmod as tm
from tracmod.attribution.explore import Explorer, rendered
from tracmod.cli import main
from tracmod.models.checkpoints import checkpoint_folders
from tracmod.models.inputs import encode
from tracmod.models.loading import load_model
from tracmod.models.tokenizer import train_tokenizer
from tracmod.tasks.token_files import read_token_files

TAGS = ["O", "B-PER", "B-LOC"]
assert len(TAGS) == LABELS


def invoke(*arguments, code=0):
    """Run a command in this process and return its output."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.output


def write_sentences(path, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        language = ["en", "de", "es"][number % 3]
        picks = torch.randint(8, (1 + number % 7,), generator=generator).tolist()
        tokens = [WORDS[language][pick] for pick in picks]
        tags = [TAGS[pick % 3] for pick in picks]
        rows.append({"language": language, "tokens": tokens, "tags": tags})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def trained(folder, model, tokenizer, **arguments):
    """Train with TracInCallback; return the warnings."""
    (table,) = read_token_files([folder / "train.jsonl"], TAGS)
    rows = encode(tokenizer, table, 40)

    def collate(batch):
        tokens = tokenizer.pad(
            [{k: v for k, v in row.items() if k != "labels"} for row in batch], return_tensors="pt"
        )
        width = tokens["input_ids"].shape[1]
        labels = [row["labels"] + [-100] * (width - len(row["labels"])) for row in batch]
        return {**tokens, "labels": torch.tensor(labels)}

    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 6, "learning_rate": 3e-3}
    settings |= {"save_strategy": "epoch", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(
        model,
        TrainingArguments(str(folder / "training"), **settings | arguments),
        train_dataset=rows,
        data_collator=collate,
        callbacks=[tm.TracInCallback(tokenizer)],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return [str(warning.message) for warning in caught]


def last_record(folder):
    checkpoint = checkpoint_folders(folder / "training")[-1]
    return json.loads((checkpoint / "tracmod.json").read_text())


def new_model(tokenizer):
    return small_tagger(
        "xlm-roberta", dtype=torch.float32, vocab_size=len(tokenizer),
        id2label=dict(enumerate(TAGS)), label2id={tag: n for n, tag in enumerate(TAGS)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(words) for words in WORDS.values()] * 9, 120, 40)


@pytest.fixture(scope="module")
def training(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("tagger")
    write_sentences(folder / "train.jsonl", 24)
    write_sentences(folder / "query.jsonl", 5, seed=1)
    said = trained(folder, new_model(tokenizer), tokenizer)
    assert not [sentence for sentence in said if "loss" in sentence]
    return folder


def attribute(folder, out, *options):
    return invoke(
        "attribute", "--checkpoints", folder / "training", "--train", folder / "train.jsonl",
        "--query", folder / "query.jsonl", "--out", folder / out, *options,
    )  # fmt: skip


def test_the_callback_records_the_loss_of_tokens(training):
    for checkpoint in checkpoint_folders(training / "training"):
        record = json.loads((checkpoint / "tracmod.json").read_text())
        assert record["loss"] == {"kind": "token_cross_entropy"}
        assert record["loss_verified"]


def test_label_smoothing_and_another_loss_are_noticed(tmp_path, training, tokenizer):
    (tmp_path / "train.jsonl").write_bytes((training / "train.jsonl").read_bytes())
    said = trained(tmp_path, new_model(tokenizer), tokenizer, label_smoothing_factor=0.1)
    assert not [sentence for sentence in said if "loss" in sentence]
    record = json.loads(
        (checkpoint_folders(tmp_path / "training")[-1] / "tracmod.json").read_text()
    )
    assert record["loss"] == {"kind": "token_cross_entropy", "label_smoothing": 0.1}
    assert record["loss_verified"]


def test_another_loss_of_tokens_is_noticed(tmp_path, training, tokenizer, monkeypatch):
    (tmp_path / "train.jsonl").write_bytes((training / "train.jsonl").read_bytes())

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        labels = inputs["labels"]
        outputs = model(**inputs)
        weight = torch.tensor([0.1, 1.0, 1.0])
        return torch.nn.functional.cross_entropy(
            outputs.logits.flatten(0, 1), labels.flatten(), weight=weight
        )

    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)
    said = trained(tmp_path, new_model(tokenizer), tokenizer)
    assert [sentence for sentence in said if "the training's loss is not" in sentence]
    record = json.loads(
        (checkpoint_folders(tmp_path / "training")[-1] / "tracmod.json").read_text()
    )
    assert record["loss"] == {"kind": "unknown"}


def test_attribute_scores_are_exact(training):
    attribute(training, "exact", "--exact", "--normalize", "none")
    expected = 0
    for checkpoint in checkpoint_folders(training / "training"):
        model, tokenizer = load_model(checkpoint)
        files = [training / "train.jsonl", training / "query.jsonl"]
        train, query = (encode(tokenizer, table, 40) for table in read_token_files(files, TAGS))
        rate = json.loads((checkpoint / "tracmod.json").read_text())["learning_rate"]
        expected = expected + rate * tm.exact_influence(model, train, query)
    top = pq.read_table(training / "exact" / "top.parquet").to_pylist()
    assert len(top) == 2 * 5 * 24
    for row in top:
        score = expected[int(row["test_id"]), int(row["train_id"])]
        assert row["score"] == pytest.approx(float(score), rel=1e-3, abs=1e-5)


def test_examples_have_the_tags_of_words(training):
    attribute(training, "cut", "--max-length", "6")
    record = json.loads((training / "cut" / "run.json").read_text())
    assert record["cut_texts"]["train"] > 0
    assert record["loss"]["train"] == {"kind": "token_cross_entropy"}
    rows = pq.read_table(training / "cut" / "examples.parquet").to_pylist()
    queries = [json.loads(line) for line in (training / "query.jsonl").open()]
    for row in rows:
        query = queries[int(row["test_id"])]
        assert [TAGS[number] for number in row["test_label"]] == query["tags"]
        assert len(row["test_prediction"]) == len(query["tags"])
    by_id = {row["test_id"]: row["test_prediction"] for row in rows}
    assert sum(own.count(-100) for own in by_id.values()) == record["cut_texts"]["query"]
    invoke("verify", training / "cut")


def test_query_and_index(training):
    output = attribute(training, "out", "--projection-dim", "8192")
    assert "words" not in output
    text, tags = "die Katze rennt heim", "O B-PER B-PER B-LOC"
    answer = json.loads(invoke("query", training / "out", text, "--label", tags, "--json"))
    assert answer["label"] == tags
    assert len(answer["prediction"].split()) == 4
    scores = {row["id"]: row["score"] for row in answer["proponents"] + answer["opponents"]}
    shown = answer["proponents"][0]
    assert len(shown["tokens"]) == len(shown["label"].split())
    invoke("index", training / "out", "--kind", "flat")
    again = json.loads(invoke("query", training / "out", text, "--label", tags, "--json"))
    assert again["index"] == "flat"
    for row in again["proponents"]:
        assert row["score"] == pytest.approx(scores[row["id"]], abs=1e-6)
    plain = invoke("query", training / "out", text)
    assert "/B-" in plain
    refused = invoke("query", training / "out", text, "--label", "O O", code=2)
    assert "4 words, got 2" in refused
    assert "X" in invoke("query", training / "out", text, "--label", "O O O X", code=2)
    assert "text_b" in invoke("query", training / "out", text, "--text-b", "x", code=2)
    attributor = tm.Attributor(training / "out")
    exact = 0
    for model, checkpoint_tokenizer in attributor.source.models:
        examples = encode(checkpoint_tokenizer, attributor._table_of(text, None, [0, 1, 1, 2]), 40)
        train = encode(checkpoint_tokenizer, attributor.source.train, 40)
        exact = exact + tm.exact_influence(model, train, examples, normalize="cosine")
    actual = torch.tensor([again_scores(attributor, text, tags)[str(row)] for row in range(24)])
    weights = sum(attributor.source.weights)
    correlation = torch.corrcoef(torch.stack([actual, exact[0] * weights / 2]))[0, 1]
    assert correlation > 0.95


@pytest.mark.parametrize("normalize", ["none", "cosine"])
def test_the_scores_of_words_add_up_to_those_of_the_sentence(training, normalize):
    out = f"by-word-{normalize}"
    attribute(training, out, "--projection-dim", "64", "--normalize", normalize)
    attributor = tm.Attributor(training / out)
    text, tags = "die Katze rennt heim", "O B-PER _ B-LOC"
    answer = attributor.query(text, label=tags, k=24, by_word=True)
    rows = answer["proponents"] + answer["opponents"]
    assert len(rows) == 48
    for row in rows:
        assert row["word_scores"][2] is None
        parts = [part for part in row["word_scores"] if part is not None]
        assert len(parts) == 3
        assert sum(parts) == pytest.approx(row["score"], rel=1e-4, abs=1e-7)
    if normalize == "none":  # a word's part is the score of the word alone, in a mean of three
        for word, alone in ((0, "O _ _ _"), (1, "_ B-PER _ _"), (3, "_ _ _ B-LOC")):
            expected = again_scores(attributor, text, alone)
            for row in rows:
                score = row["word_scores"][word]
                assert score == pytest.approx(expected[row["id"]] / 3, rel=1e-4, abs=1e-7)
    assert "word_scores" not in attributor.query(text, label=tags)["proponents"][0]


def test_words_that_were_cut_off_have_no_score(training):
    attribute(training, "by-word-cut", "--projection-dim", "64", "--max-length", "6")
    text = " ".join(["die Katze rennt heim"] * 3)
    query = ("query", training / "by-word-cut", text, "--by-word", "-k", "2")
    answer = json.loads(invoke(*query, "--json").split("\n", 1)[1])
    assert answer["proponents"][0]["word_scores"][-1] is None
    (first, *_) = [line for line in invoke(*query).splitlines() if "by word:" in line]
    assert first.split("by word: ")[1].startswith("die ")
    assert first.count(",") < 4


def test_scores_by_word_of_a_classifier_of_texts_are_refused(tmp_path, tokenizer):
    model = tiny_encoder(vocab_size=len(tokenizer)).float()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data.tsv").write_text("text_a\tlabel\ndie Katze\t0\nder Hund\t1\n")
    data = ("--train", tmp_path / "data.tsv", "--query", tmp_path / "data.tsv")
    invoke("attribute", "--model", tmp_path / "model", *data, "--out", tmp_path / "out")
    refused = invoke("query", tmp_path / "out", "die Katze", "--by-word", code=2)
    assert "by_word" in refused
    assert "token classifier" in refused


def again_scores(attributor, text, tags):
    answer = attributor.query(text, label=tags, k=24)
    return {row["id"]: row["score"] for row in answer["proponents"]}


def test_the_explorer_shows_words_with_tags(training):
    if not (training / "out").exists():
        attribute(training, "out", "--projection-dim", "8192")
    explorer = Explorer(training / "out")
    text_a, text_b, language, label = explorer.examples[0]
    *_, html = rendered(explorer, text_a, text_b, language, label, "full", [])
    assert "/B-" in html


def test_check(training):
    checkpoint = checkpoint_folders(training / "training")[0]
    output = invoke("check", "--model", checkpoint, "--data", training / "train.jsonl")
    assert "WRONG" not in output
    assert "0 of 29 words were cut off" in output
    output = invoke("check", "--model", checkpoint, "--data", training / "train.jsonl",
                    "--max-length", "6")  # fmt: skip
    assert "WRONG" not in output
    assert "0 of 29 words" not in output
    (training / "texts.tsv").write_text("text_a\tlabel\na\tO\n")
    output = invoke("check", "--model", checkpoint, "--data", training / "texts.tsv", code=2)
    assert "expected a column tokens, tags" in output


def test_a_stated_loss_of_texts_is_refused(tmp_path, training, tokenizer):
    new_model(tokenizer).save_pretrained(tmp_path)  # without a record of the loss
    tokenizer.save_pretrained(tmp_path)
    check = ("check", "--model", tmp_path, "--data", training / "train.jsonl")
    for kind in ("cross_entropy", "squared_error"):
        assert "token_cross_entropy" in invoke(*check, "--loss", kind, code=2)
    assert "WRONG" not in invoke(*check, "--class-weights", "O=1,B-PER=2,B-LOC=3")


def test_adapters_of_token_classifiers(tmp_path, training, tokenizer):
    (tmp_path / "train.jsonl").write_bytes((training / "train.jsonl").read_bytes())
    new_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForTokenClassification.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="TOKEN_CLS", r=2, target_modules=["query", "value"])
    trained(tmp_path, peft.get_peft_model(base, config), tokenizer)
    output = invoke("check", "--model", checkpoint_folders(tmp_path / "training")[-1],
                    "--data", training / "train.jsonl")  # fmt: skip
    assert "WRONG" not in output
    adapted, _ = load_model(checkpoint_folders(tmp_path / "training")[-1])
    moved = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert "classifier.weight" in moved
    assert any(name.endswith("query.lora_A.weight") for name in moved)
