"""`attribute`, `check`, `query`, `explore` and TracInCallback with question answering."""

from __future__ import annotations

import gzip
import json
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from families import small_model
from made_checkpoints import WORDS
from transformers import AutoModelForQuestionAnswering, Trainer, TrainingArguments

import tracmod as tm
from tracmod.attribution.explore import Explorer, rendered
from tracmod.cli import main
from tracmod.models.checkpoints import checkpoint_folders
from tracmod.models.inputs import as_examples, encode, num_cut
from tracmod.models.loading import load_model
from tracmod.models.plain_pass import predict_tokens
from tracmod.models.questions import best_answers, question_windows
from tracmod.models.tokenizer import train_tokenizer
from tracmod.tasks.question_files import read_question_files

LANGUAGES = ["en", "de", "es"]


def invoke(*arguments, code=0):
    """Run a command in this process and return its output."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.output


def questions(count, seed=0):
    """Make questions whose answer is the word after the one that is asked for."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        language = LANGUAGES[number % 3]
        picks = torch.randint(8, (5 + number % 4,), generator=generator).tolist()
        words = [WORDS[language][pick] for pick in picks]
        place = int(torch.randint(len(words) - 1, (1,), generator=generator))
        context = " ".join(words)
        start = len(" ".join(words[: place + 1])) + 1
        answers = {"text": [words[place + 1]], "answer_start": [start]}
        row = {"id": f"q{number}", "language": language, "question": words[place]}
        rows.append(row | {"context": context, "answers": answers})
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(words) for words in WORDS.values()] * 9, 120, 40)


@pytest.fixture(scope="module")
def training(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("reader")
    write(folder / "train.jsonl", questions(24))
    write(folder / "query.jsonl", questions(5, seed=1))
    said = trained(folder, new_model(tokenizer), tokenizer)
    assert not [sentence for sentence in said if "loss" in sentence]
    return folder


def new_model(tokenizer):
    return small_model(
        "xlm-roberta", dtype=torch.float32, vocab_size=len(tokenizer), num_labels=2,
        auto_class=AutoModelForQuestionAnswering,
    )  # fmt: skip


def trained(folder, model, tokenizer, compute_loss=None):
    """Train with TracInCallback; return the warnings."""
    (table,) = read_question_files([folder / "train.jsonl"])
    rows = [
        {name: value for name, value in row.items() if name != "labels"}
        | {"start_positions": row["labels"][0], "end_positions": row["labels"][1]}
        for row in encode(tokenizer, table, 40)
    ]
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 6, "learning_rate": 3e-3}
    settings |= {"save_strategy": "epoch", "report_to": [], "use_cpu": True, "disable_tqdm": True}

    def collate(batch):
        tokens = [{k: row[k] for k in ("input_ids", "attention_mask")} for row in batch]
        places = {
            name: torch.tensor([row[name] for row in batch])
            for name in ("start_positions", "end_positions")
        }
        return {**tokenizer.pad(tokens, return_tensors="pt"), **places}

    trainer = Trainer(
        model,
        TrainingArguments(str(folder / "training"), **settings),
        train_dataset=rows,
        data_collator=collate,
        callbacks=[tm.TracInCallback(tokenizer)],
    )
    if compute_loss is not None:
        trainer.compute_loss = compute_loss
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return [str(warning.message) for warning in caught]


def attribute(folder, out, *options, code=0):
    return invoke(
        "attribute", "--checkpoints", folder / "training", "--train", folder / "train.jsonl",
        "--query", folder / "query.jsonl", "--out", folder / out, *options, code=code,
    )  # fmt: skip


# --- the loss of a training -----------------------------------------------------------------


def test_the_callback_records_the_loss_of_spans(training):
    for checkpoint in checkpoint_folders(training / "training"):
        record = json.loads((checkpoint / "tracmod.json").read_text())
        assert record["loss"] == {"kind": "span_cross_entropy"}
        assert record["loss_verified"]


def test_another_loss_is_noticed(tmp_path, training, tokenizer):
    write(tmp_path / "train.jsonl", questions(24))

    def only_the_first(model, inputs, return_outputs=False, **_):
        output = model(**inputs)
        loss = torch.nn.functional.cross_entropy(
            output.start_logits, inputs["start_positions"], label_smoothing=0.3
        )
        return loss + output.end_logits.square().mean()

    said = trained(tmp_path, new_model(tokenizer), tokenizer, only_the_first)
    assert [sentence for sentence in said if "loss is not span cross entropy" in sentence]
    record = checkpoint_folders(tmp_path / "training")[-1] / "tracmod.json"
    assert json.loads(record.read_text())["loss"] == {"kind": "unknown"}


# --- commands -------------------------------------------------------------------------------


def test_exact_scores_are_those_of_python(training):
    attribute(training, "exact", "--exact", "--normalize", "none", "--weights", "1,1", "--quiet")
    top = pq.read_table(training / "exact/top.parquet").to_pandas()
    tables = read_question_files([training / "train.jsonl", training / "query.jsonl"])
    scores = 0
    for checkpoint in checkpoint_folders(training / "training"):
        model, tokenizer = load_model(checkpoint)
        train, query = (encode(tokenizer, table, 40) for table in tables)
        scores = scores + tm.exact_influence(model, train, query)
    best = top[(top["rank"] == 1) & (top["sign"] == 1)].set_index("test_id")
    for row, name in enumerate(tables[1]["id"].to_pylist()):
        assert best.loc[name, "train_id"] == tables[0]["id"][int(scores[row].argmax())].as_py()
        assert best.loc[name, "score"] == pytest.approx(float(scores[row].max()), rel=1e-4)


def test_results_have_answers_as_labels_and_predictions(training):
    attribute(training, "features", "--projection-dim", 256)
    examples = pq.read_table(training / "features/examples.parquet").to_pandas()
    (queries,) = read_question_files([training / "query.jsonl"])
    expected = dict(zip(queries["id"].to_pylist(), queries["answer"].to_pylist(), strict=True))
    own = examples.drop_duplicates("test_id").set_index("test_id")["test_label"].to_dict()
    assert own == expected
    contexts = dict(zip(queries["id"].to_pylist(), queries["text_b"].to_pylist(), strict=True))
    for name, answer in zip(examples["test_id"], examples["test_prediction"], strict=True):
        assert answer in contexts[name]


def test_query_explains_the_answer_that_is_given_or_predicted(training):
    attribute(training, "query", "--projection-dim", 256)
    row = next(  # `query` takes the first place of an answer
        row
        for row in questions(5, seed=1)
        if row["context"].index(row["answers"]["text"][0]) == row["answers"]["answer_start"][0]
    )
    answer = row["answers"]["text"][0]
    arguments = ["query", training / "query", row["question"], "--text-b", row["context"]]
    result = json.loads(invoke(*arguments, "--label", answer, "--json", "--quiet"))
    assert result["label"] == answer
    assert "answer_start" in result["proponents"][0]
    stored = tm.Attributor(training / "query")
    top = pq.read_table(training / "query/top.parquet").to_pandas()
    own = top[(top["test_id"] == row["id"]) & (top["sign"] == 1)]
    assert [one["id"] for one in result["proponents"]] == own["train_id"].tolist()[:5]
    predicted = stored.query(row["question"], row["context"])
    assert predicted["label"] == predicted["prediction"]
    assert predicted["probabilities"] is None
    shown = invoke(*arguments, "--label", answer, "--quiet")
    assert f"label {answer}, predicted {predicted['prediction']}" in shown
    nothing = stored.query(row["question"], row["context"], "(no answer)")
    assert nothing["label"] == "(no answer)"
    invoke(*arguments, "--label", "nowhere", code=2)
    invoke("query", training / "query", row["question"], code=2)


def test_the_loss_can_be_stated(training):
    attribute(training, "stated", "--exact", "--loss", "span_cross_entropy")
    attribute(training, "refused", "--exact", "--loss", "cross_entropy", code=2)


def test_the_check_passes(training):
    checkpoint = checkpoint_folders(training / "training")[-1]
    invoke("check", "--model", checkpoint, "--data", training / "query.jsonl")


def test_the_explorer_shows_answers(training):
    attribute(training, "explore", "--projection-dim", 256)
    explorer = Explorer(training / "explore")
    assert explorer.has_pairs
    assert explorer.labels == []
    text_a, text_b, language, label = explorer.examples[0]
    assert label in text_b
    (answer,) = explorer.explain(text_a, text_b, language, label)
    assert answer["label"] == label
    assert list(rendered(explorer, text_a, text_b, language, label, "full", []))


# --- files ----------------------------------------------------------------------------------


def squad(rows):
    """Return the form of SQuAD of questions."""
    paragraphs = []
    for row in rows:
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        answers = [{"text": text, "answer_start": start} for text, start in pairs]
        asked = {"id": row["id"], "question": row["question"], "answers": answers}
        paragraphs.append({"context": row["context"], "qas": [asked]})
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}


def test_all_forms_of_files_give_the_same_questions(tmp_path):
    rows = [row | {"language": "de"} for row in questions(7)]
    expected = read_question_files([write(tmp_path / "a.jsonl", rows)])[0]
    plain = [{name: row[name] for name in row if name != "language"} for row in rows]
    (tmp_path / "b.json").write_text(json.dumps(squad(rows), indent=1))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps(squad(rows)).encode()))
    pq.write_table(pa.Table.from_pylist(plain), tmp_path / "d.parquet")
    (tmp_path / "e.json").write_text(json.dumps(plain))
    write(tmp_path / "f.json", plain)
    write(
        tmp_path / "g.jsonl",
        [
            row | {"answers": [{"text": row["answers"]["text"][0],
                                "answer_start": row["answers"]["answer_start"][0]}]}
            for row in plain
        ],
    )  # fmt: skip
    for name in ("b.json", "c.json.gz", "d.parquet", "e.json", "f.json", "g.jsonl"):
        assert read_question_files([tmp_path / name], language="de")[0].equals(expected), name


def test_columns_of_other_names(tmp_path):
    rows = [{"q": r["question"], "c": r["context"], "a": r["answers"]} for r in questions(3)]
    path, notes = write(tmp_path / "a.jsonl", rows), []
    names = {"question": "q", "context": "c", "answers": "a"}
    (table,) = read_question_files([path], names, notes=notes)
    assert table["id"].to_pylist() == ["0", "1", "2"]
    assert set(table["language"].to_pylist()) == {"und"}
    assert len(notes) == 2
    with pytest.raises(ValueError, match=r"a\.jsonl: expected a column question.*got q, c, a"):
        read_question_files([path])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": {"text": ["nowhere"], "answer_start": [0]}}, r"'nowhere' at character 0"),
        ({"answers": {"text": ["a"], "answer_start": []}}, r"column answers"),
        ({"answers": {"text": [" "], "answer_start": [1]}}, r"a text and a number"),
        ({"answers": "word"}, r"column answers, got 'word'"),
        ({"answers": None}, r"column answers"),
        ({"context": " "}, r"context"),
        ({"question": 3}, r"text_a is not text"),
        ({"id": "q0"}, r"'q0' occurs twice"),
    ],
)
def test_malformed_questions_are_refused_with_their_line(tmp_path, change, message):
    rows = questions(3)
    path = write(tmp_path / "a.jsonl", [rows[0], rows[1] | change, rows[2]])
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: .*{message}"):
        read_question_files([path])


def test_a_file_that_is_not_of_the_form_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"paragraphs": [{"qas": [{}]}]}]}))
    with pytest.raises(ValueError, match=r"a\.json: expected the form of SQuAD.*'id'"):
        read_question_files([tmp_path / "a.json"])


def test_damaged_files_of_the_form_are_refused(tmp_path):
    """Errors of a file name it, also those of a compressed one."""
    text = json.dumps(squad(questions(3)), indent=1)
    (tmp_path / "a.json").write_text(text[:-3])
    with pytest.raises(ValueError, match=r"a\.json:1: not valid JSON"):
        read_question_files([tmp_path / "a.json"])
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(text.encode())[:-9])
    with pytest.raises(ValueError, match=r"b\.json\.gz: cannot be read"):
        read_question_files([tmp_path / "b.json.gz"])
    with pytest.raises(ValueError, match=r"c\.json: no such file"):
        read_question_files([tmp_path / "c.json"])


# --- windows --------------------------------------------------------------------------------


def table_of(context, answer, start=None, question="der Hund"):
    place = context.index(answer) if start is None and answer else (-1 if start is None else start)
    return pa.table({
        "id": ["x"], "language": ["de"], "text_a": [question], "text_b": [context],
        "label": [0], "answer": [answer], "answer_start": [place],
    })  # fmt: skip


def test_the_window_has_the_answer_wherever_it_is(tokenizer):
    words = [word for _ in range(9) for word in WORDS["de"]]
    for place in range(len(words)):
        context = " ".join(words)
        start = len(" ".join(words[:place])) + (place > 0)
        table = table_of(context, words[place], start)
        (window,) = question_windows(tokenizer, table, 24)
        assert len(window.inputs["input_ids"]) <= 24
        first, last = window.span
        begin, end = window.characters[first][0], window.characters[last][1]
        assert context[begin:end].strip() == words[place]
        assert begin <= start < end
        assert num_cut(tokenizer, table, 24) == 1
        alone = encode(tokenizer, table, 24)[0]
        assert alone["labels"] == [first, last]


def test_the_first_window_is_that_of_the_plain_pair(tokenizer):
    context = " ".join(WORDS["de"])
    (window,) = question_windows(tokenizer, table_of(context, WORDS["de"][0]), 40)
    plain = tokenizer("der Hund", context)
    assert window.inputs["input_ids"] == plain["input_ids"]
    (nothing,) = question_windows(tokenizer, table_of(context, ""), 40)
    assert nothing.span == (0, 0)
    assert nothing.inputs == window.inputs


def test_what_does_not_fit_is_refused(tokenizer):
    context = " ".join(WORDS["de"] * 6)
    with pytest.raises(ValueError, match=r"example x: .*in one window of 16 tokens"):
        question_windows(tokenizer, table_of(context, context), 16)
    with pytest.raises(ValueError, match=r"example x: .*room for its context"):
        question_windows(tokenizer, table_of(context, "", question=context), 16)


def test_the_best_answer_is_a_span_of_the_context(tokenizer):
    context = " ".join(WORDS["de"])
    table = table_of(context, "")
    (window,) = question_windows(tokenizer, table, 40)
    size = len(window.characters)
    inside = [place for place in range(size) if window.characters[place] is not None]
    logits = torch.zeros(2, size)
    logits[0, inside[1]], logits[1, inside[2]] = 5, 5
    logits[1, inside[0]] = 9  # before the first token
    logits[:, inside[0] - 1] = 20  # a special token
    logits[:, 0] = -9
    begin, end = window.characters[inside[1]][0], window.characters[inside[2]][1]
    assert best_answers(tokenizer, table, 40, [logits]) == [context[begin:end].strip()]
    logits[:, 0] = 30
    assert best_answers(tokenizer, table, 40, [logits]) == [""]


def test_predictions_do_not_depend_on_the_batch(training, tokenizer):
    model, _ = load_model(checkpoint_folders(training / "training")[-1])
    (table,) = read_question_files([training / "train.jsonl"])
    examples = as_examples(encode(tokenizer, table, 40), model=model)
    together = predict_tokens(model, examples)
    alone = [predict_tokens(model, [example])[0] for example in examples]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
