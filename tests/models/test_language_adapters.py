"""X-MOD: every example goes through the adapter of its language, in every pass."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from families import mixed_examples, small_model
from tiny_study import LANGUAGES, tiny_config
from transformers import AutoConfig

import tracmod as tm
from tracmod.attribution.explore import Explorer
from tracmod.cli import main
from tracmod.gradients.capture import chosen_names
from tracmod.models.inputs import collate
from tracmod.models.language_adapters import with_language_ids
from tracmod.models.plain_pass import batches, predict
from tracmod.study.pipeline import run_stages
from tracmod.study.run_folder import RunFolder
from tracmod.validation.gradients import autograd_gradients

OWN = ["en_XX", "de_DE", "es_XX", "zh_CN", "zh_TW"]
ADAPTERS = ["*.adapter_modules.*"]
NUMBERS = [0, 1, 1, 2, 0, 1, 0, 2, 1]  # a language per example, mixed


def model_of(**settings):
    return small_model("xmod", **{"languages": OWN, "default_language": None} | settings)


def examples_of(numbers=NUMBERS, seed=0):
    rows = mixed_examples(len(numbers), seed)
    return [row | {"lang_ids": number} for row, number in zip(rows, numbers, strict=True)]


def by_autograd(model, examples, parameters):
    """Return (N, P) gradients of one example at a time."""
    names = chosen_names(model, parameters)
    rows = [autograd_gradients(model, example, names) for example in examples]
    return torch.stack([torch.cat([row[name].flatten() for name in names]) for row in rows])


@pytest.mark.parametrize("parameters", ["encoder", ADAPTERS], ids=str)
@pytest.mark.parametrize("mask", [None, tm.HeadMask([[1, 0, 1], [0, 1, 1]])], ids=["all", "mask"])
def test_exact_influence_is_that_of_autograd(parameters, mask):
    model = model_of()
    train, query = examples_of(), examples_of([2, 0, 1, 1], seed=1)
    actual = tm.exact_influence(model, train, query, parameters, head_mask=mask)
    if mask is not None:
        with mask.apply(model):
            rows = [by_autograd(model, examples, parameters) for examples in (query, train)]
    else:
        rows = [by_autograd(model, examples, parameters) for examples in (query, train)]
    torch.testing.assert_close(actual.double(), rows[0] @ rows[1].T, rtol=1e-5, atol=1e-7)


def test_features_are_those_of_exact_influence():
    model, examples = model_of(dtype=torch.float32), examples_of()
    exact = tm.exact_influence(model, examples, examples, ADAPTERS)
    products = 0
    for seed in range(40):
        features = tm.collect_features(model, examples, tm.Projection(512, seed=seed), ADAPTERS)
        products = products + features @ features.T / 40
    torch.testing.assert_close(products, exact, rtol=0.1, atol=0.1 * float(exact.abs().max()))


def test_adapters_share_nothing_between_languages():
    scores = tm.exact_influence(model_of(), examples_of(), examples_of(), ADAPTERS)
    for query, own in enumerate(NUMBERS):
        for train, other in enumerate(NUMBERS):
            assert (scores[query, train] != 0) == (own == other)
    others = tm.exact_influence(model_of(), examples_of(), examples_of(), ["*.query.weight"])
    assert bool((others != 0).all())


def test_batches_have_one_language_each():
    model, examples = model_of(), examples_of()
    seen = []
    for rows, batch in batches(model, examples, 4096):
        assert set(batch["lang_ids"].tolist()) == {NUMBERS[rows[0]]}
        seen += rows
    assert sorted(seen) == list(range(len(examples)))


def test_predictions_are_those_of_the_model():
    model, examples = model_of(), examples_of()
    expected = []
    for example in examples:
        batch = collate([example], 1)
        batch.pop("labels")
        with torch.no_grad():
            expected.append(model(**batch).logits[0])
    torch.testing.assert_close(predict(model, examples), torch.stack(expected))


def test_adapters_are_the_modules_of_all_languages():
    model = model_of()
    assert chosen_names(model, "adapter") == chosen_names(model, ADAPTERS)


def test_languages_are_found_by_their_name_or_its_first_part():
    config = model_of().config
    examples = mixed_examples(3)
    numbered = with_language_ids(config, examples, ["de", "zh_TW", "en_XX"])
    assert [example["lang_ids"] for example in numbered] == [1, 4, 0]
    for language, number in (("zh", 2), ("fr", 0)):
        with pytest.raises(ValueError, match=rf"language {language}: .*en_XX.*got {number}"):
            with_language_ids(config, examples, [language] * 3)
    with pytest.raises(ValueError, match="default_language"):
        with_language_ids(config, examples, None)
    default = model_of(default_language="de_DE").config
    assert with_language_ids(default, examples, None) == examples
    assert "lang_ids" not in with_language_ids(default, examples, ["fr"] * 3)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lang_ids": 5}, "row 1.*lang_ids from 0 to 4, got 5"),
        ({"lang_ids": "de"}, "row 1.*lang_ids.*got 'de'"),
        ({"lang_ids": None}, "row 1.*lang_ids in all rows"),
    ],
    ids=str,
)
def test_numbers_that_are_none_of_an_adapter_are_refused(change, message):
    examples = examples_of()
    examples[1] |= change
    with pytest.raises(ValueError, match=message):
        tm.collect_features(model_of(), examples, tm.Projection(64))


def test_examples_without_a_language_are_refused():
    with pytest.raises(ValueError, match=r"row 0.*lang_ids.*default_language"):
        tm.collect_features(model_of(), mixed_examples(2), tm.Projection(64))


# --- the study ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A study of an X-MOD from its config, by the gradients of its language adapters."""
    folder = tmp_path_factory.mktemp("xmod")
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    languages = [f"{language}_XX" for language in LANGUAGES]
    config = AutoConfig.for_model(
        "xmod", **shape, intermediate_size=40, max_position_embeddings=72, languages=languages
    )
    config.save_pretrained(folder / "model")
    study = tiny_config(
        model={"name": str(folder / "model")},
        # Enough numbers that every layer is stored exactly.
        collect={
            "parameters": ADAPTERS,
            "projection_layers": "concatenate",
            "projection_dim": 4000,
        },
        influence={"certify": {"queries": 4, "train": 12}},
    )
    run_stages(RunFolder(folder / "run", study))
    return folder / "run"


def test_the_study_finds_that_adapters_learn_from_their_own_language_alone(run):
    rows = pq.read_table(run / "influence/full/full/top.parquet").to_pylist()
    language = {
        row["id"]: row["language"]
        for split in ("train", "test")
        for row in pq.read_table(run / f"data/{split}.parquet").to_pylist()
    }
    scored = [row for row in rows if row["score"] != 0]
    assert scored
    assert all(language[row["test_id"]] == language[row["train_id"]] for row in scored)


def test_the_finished_study_verifies(run):
    result = CliRunner().invoke(main, ["verify", str(run)])
    assert result.exit_code == 0, result.output


def test_a_query_needs_to_know_the_language(run):
    result = CliRunner().invoke(main, ["query", str(run), "the dog sleeps"])
    assert result.exit_code == 2
    assert "--text-language" in result.output
    with pytest.raises(ValueError, match=r"language fr: .*got 0"):
        tm.Attributor(run).query("the dog sleeps", language="fr")


def test_a_query_goes_through_the_adapter_of_its_language(run):
    """An adapter's gradient is 0 for training examples of other languages."""
    for language in LANGUAGES:
        arguments = ["query", str(run), "the dog sleeps", "--text-language", language, "--json"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        answer = json.loads(result.output)
        scored = {row["language"] for row in answer["proponents"] if row["score"] != 0}
        assert scored == {language}


def test_the_explorer_goes_through_the_adapter_of_the_language_of_its_text(run):
    explorer = Explorer(run)
    first = next(explorer.explain("the dog sleeps", None, LANGUAGES[1]))
    scored = {row["language"] for row in first["proponents"] if row["score"] != 0}
    assert scored == {LANGUAGES[1]}


def test_attribute_and_check_take_the_language_column(run, tmp_path):
    checkpoint = str(run / "models/full/checkpoint-2")
    lines = ["text_a\ttext_b\tlabel\tlanguage"]
    lines += [f"the dog {n}\tthe cat\t{n % 3}\t{LANGUAGES[n % 3]}" for n in range(9)]
    (tmp_path / "data.tsv").write_text("\n".join(lines) + "\n")
    data = ["--data", str(tmp_path / "data.tsv")]
    result = CliRunner().invoke(main, ["check", "--model", checkpoint, *data])
    assert result.exit_code == 0, result.output
    files = ["--train", str(tmp_path / "data.tsv"), "--query", str(tmp_path / "data.tsv")]
    out = ["--out", str(tmp_path / "out"), "--exact", "--parameters", ADAPTERS[0]]
    result = CliRunner().invoke(main, ["attribute", "--model", checkpoint, *files, *out])
    assert result.exit_code == 0, result.output
    scores = pq.read_table(tmp_path / "out/top.parquet").to_pylist()
    same = [row for row in scores if int(row["test_id"]) % 3 == int(row["train_id"]) % 3]
    assert len(scores) > len(same) > 0
    assert any(row["score"] != 0 for row in same)
    assert all(row["score"] == 0 for row in scores if row not in same)
