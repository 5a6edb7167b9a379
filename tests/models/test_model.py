"""Models: creation and loading, tokenizers, checkpoints, inputs, devices and digests."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, SENTENCES, table, tiny_examples, tiny_model, tiny_tokenizer
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertModel,
    GPT2Config,
)
from transformers import GPT2ForSequenceClassification as GPT2Classifier

import tracmod as tm
from tracmod.models.architecture import attention_layers, embeddings_module
from tracmod.models.checkpoints import load_checkpoints
from tracmod.models.digests import model_digest, tokenizer_digest
from tracmod.models.inputs import BATCH_COST, accuracy, collate, encode, plan_batches
from tracmod.models.loading import create_model, load_classifier, load_model, max_tokens
from tracmod.models.loss import per_example_loss
from tracmod.models.modes import device_of_worker, resolve_device
from tracmod.models.plain_pass import predict
from tracmod.models.tokenizer import read_sentencepiece, train_tokenizer

REAL_VOCABULARY = Path(
    os.environ.get(
        "TRACMOD_XLMR_SENTENCEPIECE",
        Path(__file__).resolve().parents[3]
        / "shared/data/xlmr_tokenizer/sentencepiece.bpe.model.rebuilt.gz",
    )
)
LABELS = ["entailment", "neutral", "contradiction"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def saved(tokenizer, tmp_path):
    """A folder with a small XLM-R classifier and its tokenizer."""
    model = create_model(tokenizer, LABELS, layers=2, hidden=16, heads=2, max_length=32)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# --- tokenizers -----------------------------------------------------------------------------


def test_trained_tokenizer_has_the_numbering_of_xlmr(tokenizer):
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2, 3, len(tokenizer) - 1]
    single = tokenizer("the cat")["input_ids"]
    first, second = single[1:-1], tokenizer("el gato")["input_ids"][1:-1]
    assert single == [0, *first, 2]
    assert tokenizer("the cat", "el gato")["input_ids"] == [0, *first, 2, 2, *second, 2]
    assert tokenizer.decode(first) == "the cat"
    assert 3 not in tokenizer(list(SENTENCES))["input_ids"][-1]


def test_trained_tokenizer_is_the_same_in_another_process(tokenizer):
    code = (
        "from tiny_models import tiny_tokenizer;"
        "from tracmod.models.digests import tokenizer_digest;"
        "print(tokenizer_digest(tiny_tokenizer()))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == tokenizer_digest(tokenizer)


def test_vocabulary_counts_the_special_tokens():
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(2000)]
    texts = [" ".join(draw.choices(words, k=8)) for _ in range(1000)]
    assert len(train_tokenizer(texts, 500, 32)) == 500


def test_tokenizer_is_unchanged_by_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_digest(loaded) == tokenizer_digest(tokenizer)
    texts = ["  \uff21\uff22\uff23  \ufb01ne ", "", "猫 и gato", "�", "the\tcat\nsits"]
    assert loaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]


def test_tokenizer_digest_ignores_truncation_but_not_content(tokenizer):
    before = tokenizer_digest(tokenizer)
    tokenizer("the cat", truncation=True, max_length=3, padding="max_length")
    assert tokenizer_digest(tokenizer) == before
    assert tokenizer_digest(train_tokenizer(SENTENCES[:3] * 10, 300, 32)) != before


def test_sentencepiece_files_are_read(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 10),
        model_prefix=str(tmp_path / "own"),
        vocab_size=300,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    plain = tmp_path / "own.model"
    packed = tmp_path / "own.model.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    ours = read_sentencepiece(plain, 32)
    assert tokenizer_digest(ours) == tokenizer_digest(read_sentencepiece(packed, 32))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(plain))
    for text in [*SENTENCES, "unseen ☃ words"]:
        expected = [piece + 1 if piece else 3 for piece in theirs.encode(text)]
        assert ours(text)["input_ids"] == [0, *expected, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.model", None, "no such file"),
        ("text.model", b"not a model at all", "SentencePiece"),
        ("text.gz", b"not packed", "cannot be read"),
    ],
)
def test_bad_sentencepiece_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        read_sentencepiece(tmp_path / name, 32)


def test_other_sentencepiece_types_are_refused(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 10),
        model_prefix=str(tmp_path / "bpe"),
        model_type="bpe",
        vocab_size=120,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="unigram"):
        read_sentencepiece(tmp_path / "bpe.model", 32)


def test_training_a_tokenizer_needs_texts():
    with pytest.raises(ValueError, match="got none"):
        train_tokenizer(["", "  "], 300, 32)


def test_a_trained_tokenizer_knows_every_character_and_whole_words():
    tokenizer = train_tokenizer(SENTENCES * 10, 10, 128)
    for sentence in SENTENCES:
        assert tokenizer.unk_token_id not in tokenizer(sentence)["input_ids"]
    tokenizer = train_tokenizer(SENTENCES * 10, 1000, 32)
    assert tokenizer.tokenize("the green park") == ["▁the", "▁green", "▁park"]
    assert tokenizer.tokenize("猫坐在") == ["▁", "猫", "坐", "在"]


@pytest.mark.skipif(not REAL_VOCABULARY.is_file(), reason="XLM-R's vocabulary is not here")
def test_real_vocabulary_gives_published_ids():
    tokenizer = read_sentencepiece(REAL_VOCABULARY, 512)
    assert len(tokenizer) == 250002
    assert tokenizer.mask_token_id == 250001
    # fairseq's README of XLM-R
    assert tokenizer("Hello world!")["input_ids"] == [0, 35378, 8999, 38, 2]
    assert tokenizer("你好\uff0c世界")["input_ids"] == [0, 6, 124084, 4, 3221, 2]


# --- creation and loading -------------------------------------------------------------------


def test_created_model_depends_on_the_seed_alone(tokenizer):
    def create(seed):
        return create_model(tokenizer, LABELS, layers=2, hidden=16, heads=2, seed=seed)

    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    first = create(5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(999)
    assert model_digest(first) == model_digest(create(5))
    assert model_digest(first) != model_digest(create(6))
    assert not first.training
    assert first.config.id2label == dict(enumerate(LABELS))
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}


def test_created_model_takes_max_length_tokens(tokenizer):
    model = create_model(tokenizer, LABELS, layers=1, hidden=16, heads=2, max_length=9)
    example = {"input_ids": [0] + [5] * 7 + [2], "attention_mask": [1] * 9, "labels": 0}
    assert predict(model, [example]).shape == (1, 3)
    assert model.config.max_position_embeddings == 11


def test_created_model_needs_heads_that_divide(tokenizer):
    with pytest.raises(ValueError, match="multiple of heads"):
        create_model(tokenizer, LABELS, hidden=30, heads=4)


def test_loaded_model_is_the_saved_one(saved, tokenizer):
    model, loaded = load_model(saved)
    own = create_model(tokenizer, LABELS, layers=2, hidden=16, heads=2, max_length=32)
    assert model_digest(model) == model_digest(own)
    assert tokenizer_digest(loaded) == tokenizer_digest(tokenizer)
    assert not model.training
    assert load_model(saved, ["Entailment", "neutral", "contradiction"])[0].num_labels == 3


def test_a_model_without_classifier_gets_one_from_the_seed(tmp_path, tokenizer):
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a sequence classifier"):
        load_model(tmp_path)
    first, _ = load_model(tmp_path, LABELS, seed=1)
    torch.manual_seed(7)
    second, _ = load_model(tmp_path, LABELS, seed=1)
    third, _ = load_model(tmp_path, LABELS, seed=2)
    assert first.config.id2label == dict(enumerate(LABELS))
    assert model_digest(first) == model_digest(second) != model_digest(third)


@pytest.mark.parametrize(
    "labels", [["yes", "no"], ["neutral", "entailment", "contradiction"]], ids=str
)
def test_other_classes_are_refused(saved, labels):
    with pytest.raises(ValueError, match=rf"classes .*{labels[0]}.*{labels[1]}.*{LABELS[0]}"):
        load_model(saved, labels)


def test_folders_that_are_no_model_are_refused(saved, tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"model .*gone: no such folder"):
        load_model(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"model .*empty: .*config\.json"):
        load_model(tmp_path / "empty")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved / name).unlink()
    with pytest.raises(ValueError, match=rf"model {saved}: no tokenizer .*tokenizer\.json"):
        load_model(saved)
    tokenizer.save_pretrained(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"model {saved}: .*model\.safetensors"):
        load_model(saved)


def test_another_number_of_classes_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    config["id2label"] = {"0": "LABEL_0", "1": "LABEL_1"}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"classifier\.out_proj\.(weight|bias) of shape"):
        load_model(saved, ["yes", "no"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_input_is_the_one_that_the_positions_allow(family, tokenizer):
    model = tiny_model(family)
    tokenizer = tiny_tokenizer(10**9)
    longest = max_tokens(model, tokenizer)
    assert longest < model.config.max_position_embeddings + 1
    example = {"attention_mask": [1] * longest, "input_ids": [5] * longest, "labels": 0}
    assert predict(model, [example]).isfinite().all()
    longer = {name: [1] * (longest + 1) for name in ("attention_mask", "input_ids")}
    longer["input_ids"] = [5] * (longest + 1)
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        predict(model, [{**longer, "labels": 0}])
    tokenizer.model_max_length = 7
    assert max_tokens(model, tokenizer) == 7


def test_a_loaded_tokenizer_is_limited_to_the_models_positions(saved, tokenizer):
    unlimited = tiny_tokenizer(10**9)
    unlimited.save_pretrained(saved)
    _, loaded = load_model(saved)
    assert loaded.model_max_length == 32
    with pytest.raises(ValueError, match=r"max_length: .*\b32\b.*\b33\b"):
        encode(loaded, table([("a", "the cat", None, 0)]), 33)


def test_an_unknown_name_is_refused_at_once(monkeypatch):
    def no_network(url):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", no_network)
    monkeypatch.setattr("transformers.AutoConfig", None)  # which would try for 20 seconds
    with pytest.raises(ValueError, match=r"model nosuch: no such folder, .*Hub.*: Name or service"):
        load_model("nosuch")


@pytest.mark.parametrize("name", ["foo", "mps", "cuda:99", "meta"])
def test_a_device_that_does_not_exist_is_refused(name):
    with pytest.raises(ValueError, match=rf"device: .*got {name}"):
        resolve_device(name)


def test_devices(monkeypatch):
    assert resolve_device("cpu") == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [resolve_device(text) for text in (None, "auto", "cuda:1")] == ["cuda", "cuda", "cuda:1"]
    with pytest.raises(ValueError, match="torch finds 2 GPUs"):
        resolve_device("cuda:2")
    workers = [device_of_worker("cuda", number) for number in range(3)]
    assert workers == ["cuda:0", "cuda:1", "cuda:0"]
    assert device_of_worker("cuda:1", 2) == "cuda:1"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert device_of_worker("cpu", 1) == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert resolve_device(None) == resolve_device("auto") == "cpu"
    with pytest.raises(ValueError, match="torch finds no GPUs"):
        resolve_device("cuda")


def test_a_tokenizer_larger_than_the_model_is_refused(saved):
    larger, _ = load_model(saved)
    larger.resize_token_embeddings(20)
    larger.save_pretrained(saved)
    with pytest.raises(ValueError, match="only 20 rows"):
        load_model(saved)


def test_other_architectures_are_refused(tmp_path, tokenizer):
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, num_labels=3, pad_token_id=1
    )
    GPT2Classifier(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BERT family"):
        load_model(tmp_path)


# --- checkpoints ----------------------------------------------------------------------------


def folder_with(path, name, tree):
    path.mkdir()
    (path / name).write_text(json.dumps(tree))
    return path


def test_checkpoints_of_tracmod(tmp_path):
    tree = {"epoch": 2, "step": 40, "learning_rate": 1e-5}
    path = folder_with(tmp_path / "a", "tracmod.json", tree)
    (checkpoint,) = load_checkpoints([path])
    assert (checkpoint.path, checkpoint.epoch, checkpoint.step) == (path, 2, 40)
    assert checkpoint.learning_rate == 1e-5


def test_checkpoints_of_the_trainer(tmp_path):
    log = [{"step": step, "learning_rate": step / 10} for step in (10, 20, 30, 40)]
    log.insert(2, {"step": 20, "eval_loss": 1.0})
    paths = []
    for epoch, step in ((1, 20), (2, 40), (3, 45)):
        tree = {"epoch": float(epoch), "global_step": step}
        tree["log_history"] = [row for row in log if row["step"] <= step]
        paths.append(folder_with(tmp_path / f"checkpoint-{step}", "trainer_state.json", tree))
    checkpoints = load_checkpoints(paths)
    assert [c.epoch for c in checkpoints] == [1, 2, 3]
    assert [c.step for c in checkpoints] == [20, 40, 45]
    # Means of steps 10, 20 and 30, 40; none logged after 40, so the last.
    assert [c.learning_rate for c in checkpoints] == pytest.approx([1.5, 3.5, 4.0])
    assert load_checkpoints(paths[1:2])[0].learning_rate == pytest.approx(2.5)


def test_checkpoints_without_a_record_and_bad_ones(tmp_path):
    (tmp_path / "plain").mkdir()
    (checkpoint,) = load_checkpoints([tmp_path / "plain"])
    assert (checkpoint.epoch, checkpoint.step, checkpoint.learning_rate) == (1, 0, None)
    with pytest.raises(ValueError, match="no such folder"):
        load_checkpoints([tmp_path / "gone"])
    with pytest.raises(ValueError, match="learning_rate"):
        load_checkpoints([folder_with(tmp_path / "half", "tracmod.json", {"epoch": 1})])


@pytest.mark.parametrize(
    ("name", "tree", "expected"),
    [
        ("tracmod.json", {"epoch": 1, "step": 2, "learning_rate": "high"}, "learning_rate"),
        ("tracmod.json", {"epoch": [], "step": 2, "learning_rate": 0.1}, "epoch"),
        ("tracmod.json", {"epoch": 1, "step": 2, "learning_rate": float("nan")}, "learning_rate"),
        ("trainer_state.json", {"log_history": [{"learning_rate": 0.1}]}, "step"),
        ("trainer_state.json", {"log_history": [{"step": 1, "learning_rate": {}}]}, "learning"),
        ("trainer_state.json", {"log_history": [3]}, "log_history"),
        ("trainer_state.json", {"log_history": None}, "log_history"),
    ],
)  # fmt: skip
def test_bad_training_records_are_named(tmp_path, name, tree, expected):
    with pytest.raises(ValueError, match=rf"{name}: expected {expected}.* to be a"):
        load_checkpoints([folder_with(tmp_path / "bad", name, tree)])


# --- architecture ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_layers_are_found(family):
    model = tiny_model(family, layers=3, hidden=24, heads=4)
    layers = attention_layers(model)
    assert [(layer.num_heads, layer.head_dim) for layer in layers] == [(4, 6)] * 3
    assert len({id(linear) for layer in layers for linear in layer[:4]}) == 12
    inside = {id(module) for module in embeddings_module(model).modules()}
    assert id(model.get_input_embeddings()) in inside
    assert not inside & {id(linear) for layer in layers for linear in layer[:4]}


def test_a_module_without_attention_is_refused():
    with pytest.raises(ValueError, match=r"Linear.*BERT family"):
        attention_layers(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="embeddings"):
        embeddings_module(torch.nn.Linear(2, 2))


# --- examples, batches, loss ----------------------------------------------------------------


def test_encode_keeps_the_order_and_cuts_the_longest(tokenizer):
    rows = [
        ("a", "the cat", "el gato", 0),
        ("b", "the cat", None, 2),
        ("c", " ".join(["the cat sits on the mat"] * 5), "el gato", 1),
        ("d", "el gato", "", 1),
    ]
    examples = encode(tokenizer, table(rows), 20, num_labels=3)
    assert [example["labels"] for example in examples] == [0, 2, 1, 1]
    assert examples[0]["input_ids"] == tokenizer("the cat", "el gato")["input_ids"]
    assert examples[1]["input_ids"] == tokenizer("the cat")["input_ids"]
    # An empty second text is a pair, a missing one is not.
    assert examples[3]["input_ids"] == [*tokenizer("el gato")["input_ids"], 2, 2]
    assert len(examples[2]["input_ids"]) == 20
    gato = tokenizer("el gato")["input_ids"][1:-1]
    assert examples[2]["input_ids"][-1 - len(gato) :] == [*gato, 2]
    for example in examples:
        assert set(example) == {"input_ids", "attention_mask", "labels"}
        assert example["attention_mask"] == [1] * len(example["input_ids"])


def test_encode_names_labels_and_lengths_that_do_not_fit(tokenizer):
    rows = [("first", "the cat", None, 2), ("second", "the cat", None, 3)]
    with pytest.raises(ValueError, match=r"example second: expected a label from 0 to 2, got 3"):
        encode(tokenizer, table(rows), 12, num_labels=3)
    with pytest.raises(ValueError, match=r"max_length: .*\b32\b.*\b64\b"):
        encode(tokenizer, table(rows), 64)
    assert len(encode(tokenizer, table(rows), 12, num_labels=1)) == 2
    for too_short in (-1, 0, 1, 4):
        with pytest.raises(ValueError, match=rf"max_length: .*\b4\b.* {too_short}$"):
            encode(tokenizer, table(rows), too_short)
    assert len(encode(tokenizer, table([("a", "the cat", "el gato", 0)]), 5)[0]["input_ids"]) == 5


@pytest.mark.parametrize("count", [0, 1, 7, 200])
@pytest.mark.parametrize("batch_tokens", [1, 16, 100, 10_000])
def test_batches_hold_every_example_once_within_the_bound(count, batch_tokens):
    draw = random.Random(count)
    lengths = [draw.randint(1, 40) for _ in range(count)]
    batches = plan_batches(lengths, batch_tokens)
    assert sorted(position for batch in batches for position in batch) == list(range(count))
    for batch in batches:
        longest = max(lengths[position] for position in batch)
        assert len(batch) == 1 or longest * len(batch) <= batch_tokens
        padding = longest * len(batch) - sum(lengths[position] for position in batch)
        assert padding <= BATCH_COST * (1 + math.log(len(batch)))
    assert batches == plan_batches(list(lengths), batch_tokens)


def every_partition(positions):
    """Every way to divide the positions into batches, of any lengths in any order."""
    if not positions:
        yield []
        return
    first, *others = positions
    for rest in every_partition(others):
        yield [[first], *rest]
        for number, batch in enumerate(rest):
            yield [*rest[:number], [first, *batch], *rest[number + 1 :]]


@pytest.mark.parametrize("batch_tokens", [60, 300, 10_000])
@pytest.mark.parametrize("longest", [3, 30, 120])
def test_no_other_batches_cost_less(batch_tokens, longest):
    def tokens(batch):
        return max(lengths[position] for position in batch) * len(batch)

    def cost(batches):
        return sum(BATCH_COST + tokens(batch) for batch in batches)

    draw = random.Random(longest)
    for count in (1, 2, 5, 8):
        lengths = [draw.randint(1, longest) for _ in range(count)]
        allowed = [
            batches
            for batches in every_partition(list(range(count)))
            if all(len(batch) == 1 or tokens(batch) <= batch_tokens for batch in batches)
        ]
        assert cost(plan_batches(lengths, batch_tokens)) == min(map(cost, allowed))


def test_batches_of_many_examples_are_planned_in_time_that_grows_with_their_number():
    draw = random.Random(0)
    lengths = [draw.randint(16, 128) for _ in range(20_000)]
    batches = plan_batches(lengths, 8192)
    computed = sum(max(lengths[p] for p in batch) * len(batch) for batch in batches)
    assert computed <= 1.01 * sum(lengths)


def test_batches_need_room():
    with pytest.raises(ValueError, match="batch_tokens"):
        plan_batches([3], 0)


def test_collate_pads_on_the_right():
    examples = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": 2},
        {"input_ids": [8], "attention_mask": [1], "labels": 0},
    ]
    batch = collate(examples, pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [2, 0]
    assert "token_type_ids" not in batch
    typed = [{**example, "token_type_ids": [1] * len(example["input_ids"])} for example in examples]
    assert collate(typed, pad_id=1)["token_type_ids"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_per_example_loss():
    logits = torch.randn(5, 3, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1])
    loss = per_example_loss(logits, labels)
    expected = -torch.log(torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True))
    torch.testing.assert_close(loss, expected[torch.arange(5), labels])
    assert loss.dtype == torch.float64
    assert per_example_loss(logits.bfloat16(), labels).dtype == torch.float32
    squared = per_example_loss(logits[:, :1], torch.arange(5))
    torch.testing.assert_close(squared, (logits[:, 0] - torch.arange(5)) ** 2)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("batch_tokens", [1, 30, 8192])
def test_predictions_do_not_depend_on_batches(family, batch_tokens):
    model = tiny_model(family, dropout=0.3).train()
    examples = tiny_examples(9)
    logits = predict(model, examples, batch_tokens=batch_tokens)
    assert model.training
    model.eval()
    for example, row in zip(examples, logits, strict=True):
        ids = torch.tensor([example["input_ids"]])
        torch.testing.assert_close(model(input_ids=ids).logits[0], row)


def test_accuracy():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 2.0]])
    assert accuracy(logits, [0, 1, 1]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="accuracy"):
        accuracy(torch.zeros(0, 2), [])


# --- digests --------------------------------------------------------------------------------


def test_model_digest_sees_every_bit_of_the_weights():
    model = tiny_model("bert", dtype=torch.float32)
    before = model_digest(model)
    assert model_digest(model.train()) == before
    weight = model.classifier.bias
    with torch.no_grad():
        weight[0] = torch.nextafter(weight[0], torch.tensor(10.0))
    assert model_digest(model) != before
    assert model_digest(tiny_model("bert", dtype=torch.float64)) != before
    other = {"a": torch.zeros(2, 3), "b": torch.zeros(0)}
    module = torch.nn.Module()
    for name, tensor in other.items():
        module.register_buffer(name, tensor)
    module.register_buffer("scalar", torch.tensor(3))
    assert len(model_digest(module)) == 64


def test_model_digest_sees_the_config():
    few, many = tiny_model("bert", hidden=24, heads=3), tiny_model("bert", hidden=24, heads=4)
    many.load_state_dict(few.state_dict())
    assert model_digest(few) != model_digest(many)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_digest_is_unchanged_by_saving_and_use(family, tmp_path):
    model = tiny_model(family, dtype=torch.float32)
    model.config.id2label = {label: f"class {label}" for label in range(3)}
    before = model_digest(model)
    model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([1]))  # sets problem_type
    assert model_digest(model) == before
    model.save_pretrained(tmp_path / "once")
    loaded = load_classifier(tmp_path / "once")
    assert model_digest(loaded) == before
    loaded.save_pretrained(tmp_path / "twice")
    assert model_digest(load_classifier(tmp_path / "twice")) == before


def test_model_digest_of_eleven_classes_is_unchanged_by_saving(tokenizer, tmp_path):
    """A file has the labels as strings, and as strings 10 comes before 2."""
    names = [f"class {label}" for label in range(11)]
    model = create_model(tokenizer, names, layers=1, hidden=16, heads=2)
    model.save_pretrained(tmp_path)
    assert model_digest(load_classifier(tmp_path)) == model_digest(model)


# --- The loaded model is the one that was trained -------------------------------------------


def add_tensors(folder, **tensors):
    """Add tensors to model.safetensors; `__` in a name stands for a dot."""
    weights = load_file(folder / "model.safetensors")
    weights |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "roberta__encoder__layer__0__output__adapters__task__down__weight",  # bottleneck adapter
        "roberta__encoder__layer__2__output__dense__weight",  # a layer more than the config has
        "roberta__encoder__layer__0__attention__self__distance_embedding__weight",
        "roberta__pooler__attention__weight",  # a pooling layer of one's own
        "classifier__extra__weight",
    ],
)
def test_weights_without_a_place_in_the_model_are_refused_by_name(saved, name):
    add_tensors(saved, **{name: torch.ones(2, 2)})
    with pytest.raises(ValueError, match=re.escape(name.replace("__", "."))):
        load_model(saved)


def test_leftovers_of_pretraining_are_accepted(saved):
    expected = model_digest(load_classifier(saved))
    add_tensors(
        saved,
        roberta__embeddings__position_ids=torch.arange(4),
        roberta__pooler__dense__weight=torch.ones(2, 2),
        roberta__pooler__dense__bias=torch.ones(2),
        lm_head__dense__weight=torch.ones(2, 2),
        cls__predictions__bias=torch.ones(2),
        vocab_projector__bias=torch.ones(2),
    )
    assert model_digest(load_classifier(saved)) == expected


def test_an_adapter_beside_a_model_or_alone_is_refused(saved, tmp_path):
    alone = tmp_path / "adapter"
    alone.mkdir()
    for folder in (saved, alone):
        (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(ValueError, match=r"adapter_config\.json"):
            load_model(folder)


def test_a_model_trained_as_another_class_is_refused(saved):
    file = saved / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"architectures": ["MyPooledClassifier"]}))
    with pytest.raises(ValueError, match="MyPooledClassifier"):
        load_model(saved)
    file.write_text(json.dumps({k: v for k, v in config.items() if k != "architectures"}))
    load_model(saved)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights_are_refused_by_folder(saved, size):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=re.escape(str(saved))):
        load_model(saved)


@pytest.mark.parametrize("head", [BertModel, BertForMaskedLM, BertForMultipleChoice])
def test_a_model_that_is_no_classifier_is_refused(head):
    shape = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 8}
    model = head(BertConfig(vocab_size=60, num_hidden_layers=1, **shape)).eval()
    rows = [{"input_ids": [1, 2], "labels": 0}]
    for function in (
        lambda: tm.collect_features(model, rows, tm.Projection(64)),
        lambda: tm.exact_influence(model, rows, rows),
        lambda: tm.fit_ekfac(model, rows),
    ):
        with pytest.raises(ValueError, match=head.__name__):
            function()


def test_data_that_are_no_rows_are_refused():
    model = tiny_model(dtype=torch.float32)
    for dataset, named in (
        ({"input_ids": [[1, 2]], "labels": [0]}, "input_ids, labels"),
        ([[1, 2, 3]], "row 0.*list"),
        (["a text"], "row 0.*str"),
    ):
        with pytest.raises(ValueError, match=named):
            tm.collect_features(model, dataset, tm.Projection(64))
