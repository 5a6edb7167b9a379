"""LoRA adapters of PEFT: equal logits, gradients of one-example autograd, folders, and refusals."""

from __future__ import annotations

import json
import shutil
import warnings

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from families import FORMS, mixed_examples, small_model
from own_model import LABELS, own_model, own_tokenizer, write_examples
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

import tracmod as tm
from tracmod.cli import main
from tracmod.gradients.capture import FrozenParametersWarning, chosen_names, frozen_names
from tracmod.models.adapters import (
    adapter_parameters,
    add_lora,
    merge_adapters,
    plain_parameter_name,
    save_adapter,
)
from tracmod.models.digests import model_digest
from tracmod.models.inputs import collate, encode, pad_token_id
from tracmod.models.loading import load_classifier, load_model
from tracmod.subnetworks.head_mask import head_slices
from tracmod.tasks.files import read_model_files

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::tracmod.gradients.capture.FrozenParametersWarning"),
]
TARGETS = ["query", "key", "value", "attention.output.dense"]


def lora_model(base=None, *, seed=0, **options):
    """Return a classifier with a LoRA adapter whose two matrices are random."""
    options = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS, "lora_dropout": 0.1} | options
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, **options)
    return peft.get_peft_model(base if base is not None else own_model(), config)


@pytest.fixture
def examples(tmp_path):
    path = write_examples(tmp_path / "examples.tsv", 9)
    (table,) = read_model_files([path], LABELS)
    return encode(own_tokenizer(), table, 40)


def gradients(model, examples, mask=None):
    """Return each example's gradient of PEFT's own model, trained parameters only, in float64."""
    model = model.double().eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = []
    for example in examples:
        inputs = {
            name: torch.tensor([values])
            for name, values in example.items()
            if name in ("input_ids", "attention_mask", "labels")
        }
        if inputs["labels"].dim() == 2:
            inputs["labels"] = inputs["labels"][0]
        loss = model(**inputs).loss
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"target_modules": "all-linear"},
        {"bias": "lora_only"},
        {"rank_pattern": {"query": 1}, "alpha_pattern": {"value": 9}},
    ],
    ids=["lora", "rslora", "all linear", "biases", "patterns"],
)
def test_influence_is_that_of_the_trained_parameters(examples, options):
    model = lora_model(**options)
    training = {name: module.training for name, module in model.named_modules()}
    scores = tm.exact_influence(model, examples[:6], examples[6:])
    assert training == {name: module.training for name, module in model.named_modules()}
    rows = gradients(model, examples)
    expected = rows[6:] @ rows[:6].T
    error = (scores.double() - expected).norm() / expected.norm()
    assert error < 1e-6


def test_features_are_projections_of_the_same_gradients(examples):
    model = lora_model()
    rows = gradients(lora_model(), examples)
    # Small parameters are stored exactly if they fit, so the products are nearly exact.
    wide = tm.collect_features(model, examples, tm.Projection(dim=1 << 15))
    exact, products = rows @ rows.T, (wide @ wide.T).double()
    assert ((products - exact).norm() / exact.norm()) < 0.05


def test_the_same_logits_and_shared_parameters(examples):
    model = lora_model().eval()
    adapted = tm.adapted_model(model)
    ids = torch.tensor([examples[0]["input_ids"]])
    assert torch.equal(model(input_ids=ids).logits, adapted(input_ids=ids).logits)
    shared = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in shared for parameter in adapted.parameters())
    names = {plain_parameter_name(n) for n, p in model.named_parameters() if p.requires_grad}
    assert names == {n for n, p in adapted.named_parameters() if p.requires_grad}


def test_a_masked_head_has_no_effect_through_its_adapters(examples):
    adapted = tm.adapted_model(lora_model())
    layers, heads = adapted.config.num_hidden_layers, adapted.config.num_attention_heads
    array = torch.ones(layers, heads, dtype=torch.int64)
    array[0, 1] = 0
    mask = tm.HeadMask(array.tolist())
    masked = tm.collect_features(adapted, examples, tm.Projection(dim=256), head_mask=mask)
    ids = torch.tensor([examples[0]["input_ids"]])
    with mask.apply(adapted):
        expected = adapted(input_ids=ids).logits
        plain = tm.collect_features(adapted, examples, tm.Projection(dim=256))
    torch.testing.assert_close(masked, plain)
    slices = head_slices(adapted, mask)
    own = {part.name.split("layer.0.attention.")[-1] for part in slices}
    assert {"self.query.lora_B.weight", "output.dense.lora_A.weight"} <= own
    with torch.no_grad():
        for part in slices:  # the parameters of a masked head do not count
            part.parameter[part.index] = torch.randn_like(part.parameter[part.index])
    with mask.apply(adapted):
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """A base model's folder, and the output of a LoRA training of it with TracInCallback."""
    folder = tmp_path_factory.mktemp("training")
    own_model().save_pretrained(folder / "base")
    own_tokenizer().save_pretrained(folder / "base")
    (table,) = read_model_files([write_examples(folder / "train.tsv", 12)], LABELS)
    base, _ = load_model(folder / "base")
    model = lora_model(base, lora_dropout=0.0)
    arguments = TrainingArguments(
        str(folder / "out"),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    callback = tm.TracInCallback(every="epoch", second_moment=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            model,
            arguments,
            train_dataset=encode(own_tokenizer(), table, 40),
            processing_class=own_tokenizer(),
            callbacks=[callback],
        ).train()
    return folder, model


def test_a_checkpoint_is_the_adapted_model(training, examples):
    folder, model = training
    loaded = load_classifier(folder / "out" / "checkpoint-6")
    ids = torch.tensor([examples[0]["input_ids"]])
    assert torch.equal(model.eval()(input_ids=ids).logits, loaded(input_ids=ids).logits)
    assert list(loaded.config.id2label.values()) == list(LABELS)
    record = json.loads((folder / "out" / "checkpoint-6" / "tracmod.json").read_text())
    frozen = {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    assert set(record["frozen_parameters"]) == frozen
    moments = load_file(folder / "out" / "checkpoint-6" / "second_moment.safetensors")
    assert moments.keys() == {name for name, _ in loaded.named_parameters()}


def test_attribute_and_check_take_adapter_folders(training, tmp_path):
    folder, _ = training
    query = write_examples(tmp_path / "query.tsv", 5)
    data = ["--train", str(folder / "train.tsv"), "--query", str(query)]
    checkpoint = str(folder / "out" / "checkpoint-6")
    result = CliRunner().invoke(main, ["check", "--model", checkpoint, "--data", str(query)])
    assert result.exit_code == 0, result.output
    options = [*data, "--checkpoints", str(folder / "out"), "--out", str(tmp_path / "out")]
    options += ["--model", checkpoint, "--exact", "-k", "12", "--normalize", "none"]
    result = CliRunner().invoke(main, ["attribute", *options])
    assert result.exit_code == 0, result.output
    top = pq.read_table(tmp_path / "out" / "top.parquet")
    # The sum over the checkpoints of rate times product, by autograd on PEFT's own models.
    tables = read_model_files([folder / "train.tsv", query], LABELS)
    train, queries = (encode(own_tokenizer(), table, 40) for table in tables)
    expected = torch.zeros(len(queries), len(train), dtype=torch.float64)
    for number in (3, 6):
        path = folder / "out" / f"checkpoint-{number}"
        base = load_model(folder / "base")[0]
        model = peft.PeftModel.from_pretrained(base, str(path), is_trainable=True)
        rate = json.loads((path / "tracmod.json").read_text())["learning_rate"]
        expected += rate * gradients(model, queries) @ gradients(model, train).T
    rows = [row for row in top.to_pylist() if row["sign"] == 1]
    assert len(rows) == expected.numel()
    for row in rows:
        query_row, train_row = (int(row[name].split("-")[1]) for name in ("test_id", "train_id"))
        score = float(expected[query_row, train_row])
        assert row["score"] == pytest.approx(
            score, rel=1e-4, abs=1e-5 * float(expected.abs().max())
        )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_dora": True}, "DoRA|Dora"),
        ({"target_modules": ["query", "word_embeddings"]}, "word_embeddings"),
    ],
    ids=["dora", "embedding"],
)
def test_other_kinds_of_lora_are_refused(examples, options, match):
    with pytest.raises(ValueError, match=match):
        tm.exact_influence(lora_model(**options), examples, examples)


def test_other_adapters_and_states_are_refused(examples):
    ia3 = peft.IA3Config(task_type="SEQ_CLS", target_modules=["query"], feedforward_modules=[])
    with pytest.raises(ValueError, match=r"LoRA.*IA3"):
        tm.exact_influence(peft.get_peft_model(own_model(), ia3), examples, examples)
    merged = lora_model()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        tm.exact_influence(merged, examples, examples)
    switched_off = lora_model()
    switched_off.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"switched on|active"):
        tm.exact_influence(switched_off, examples, examples)
    with pytest.raises(ValueError, match="PeftModel"):
        tm.adapted_model(own_model())


def test_a_model_with_adapters_is_not_saved_as_a_plain_one(tmp_path):
    adapted = tm.adapted_model(lora_model())
    ones = torch.ones(adapted.config.num_hidden_layers, adapted.config.num_attention_heads)
    for save in (tm.save_masked, tm.save_pruned):
        with pytest.raises(ValueError, match=r"adapters.*LoRA"):
            save(adapted, tm.HeadMask(ones.long().tolist()), tmp_path / "saved")


@pytest.mark.parametrize("fault", ["no weights", "truncated", "other base", "no base", "lacking"])
def test_damaged_adapter_folders_are_refused(training, tmp_path, fault):
    folder = tmp_path / "adapter"
    shutil.copytree(training[0] / "out" / "checkpoint-6", folder)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    settings = json.loads(config.read_text())
    match = "adapter"
    if fault == "no weights":
        weights.unlink()
        match = r"adapter_model\.safetensors"
    elif fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        match = r"adapter_model\.safetensors.*damaged"
    elif fault == "other base":
        wide = own_model(hidden_size=36, num_attention_heads=3)
        wide.save_pretrained(tmp_path / "wide")
        own_tokenizer().save_pretrained(tmp_path / "wide")
        config.write_text(
            json.dumps(settings | {"base_model_name_or_path": str(tmp_path / "wide")})
        )
        match = "adapter of its base"
    elif fault == "no base":
        config.write_text(
            json.dumps(settings | {"base_model_name_or_path": str(tmp_path / "gone")})
        )
        match = "gone"
    else:
        tensors = load_file(weights)
        name = next(name for name in tensors if "lora_A" in name)
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, weights)
        match = "lack.*lora_A"
    with pytest.raises(ValueError, match=match):
        load_model(folder)


def test_training_an_adapter_of_a_model_without_a_name_is_refused(tmp_path, examples):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = Trainer(
        lora_model(), arguments, train_dataset=examples, callbacks=[tm.TracInCallback()]
    )
    with pytest.raises(ValueError, match=r"TracInCallback.*from_pretrained"):
        trainer.train()


def test_the_frozen_base_is_said_once(examples):
    with pytest.warns(FrozenParametersWarning, match="frozen") as warned:
        tm.exact_influence(lora_model(), examples, examples)
    assert [entry.category for entry in warned].count(FrozenParametersWarning) == 1


@pytest.mark.parametrize("parameters", ["adapter", "attention"])
def test_named_sets_have_the_matrices_of_lora(examples, parameters):
    """`attention` has those that heads divide."""
    model = tm.adapted_model(lora_model())
    chosen = set(chosen_names(model, parameters)) - set(frozen_names(model, parameters))
    divided = {part.name for part in head_slices(model) if ".lora_" in part.name}
    matrices = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert divided < matrices
    assert chosen == (matrices if parameters == "adapter" else divided)
    features = tm.collect_features(model, examples, tm.Projection(512), parameters)
    patterns = tm.collect_features(model, examples, tm.Projection(512), sorted(chosen))
    assert torch.equal(features, patterns)


def test_a_model_without_adapters_has_none_to_select(examples):
    with pytest.raises(ValueError, match=r"parameters 'adapter': .*XLMRoberta"):
        tm.collect_features(own_model(), examples, tm.Projection(512), "adapter")


# --- new adapters ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_new_adapter_of_every_family_is_saved_and_loaded(form, tmp_path):
    """It starts as the base model; all after the layers is trained whole, and the rest frozen."""
    base = small_model(form).float()
    batch = [collate([example], pad_token_id(base)) for example in mixed_examples(4)]
    inputs = [{k: v for k, v in example.items() if k != "labels"} for example in batch]
    with torch.no_grad():
        before = [base(**example).logits for example in inputs]
    base.save_pretrained(tmp_path / "base")
    after_layers = {
        name
        for name, _ in base.named_parameters()
        if not name.startswith(f"{base.base_model_prefix}.") or ".pooler." in name
    }
    adapted = add_lora(base, str(tmp_path / "base"), rank=2, alpha=4)
    with torch.no_grad():
        for example, logits in zip(inputs, before, strict=True):
            torch.testing.assert_close(adapted(**example).logits, logits)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    adapters = {name for name in trained if ".lora_" in name}
    assert adapters
    assert trained == adapters | after_layers == set(adapter_parameters(adapted))
    with torch.no_grad():
        for parameter in adapter_parameters(adapted).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    (tmp_path / "adapter").mkdir()
    save_adapter(adapted, tmp_path / "adapter")
    again = load_classifier(tmp_path / "adapter")
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained
    with torch.no_grad():
        for example, logits in zip(inputs, before, strict=True):
            changed = adapted(**example).logits
            assert not torch.allclose(changed, logits, atol=1e-3)
            torch.testing.assert_close(again(**example).logits, changed)


def test_new_adapters_depend_on_their_seed_alone():
    first, same, other = (add_lora(own_model(), "base", rank=2, alpha=4, seed=s) for s in (1, 1, 2))
    name = "roberta.encoder.layer.0.attention.self.query.lora_A.weight"
    matrices = [dict(model.named_parameters())[name] for model in (first, same, other)]
    assert torch.equal(matrices[0], matrices[1])
    assert not torch.equal(matrices[0], matrices[2])


def test_a_target_that_matches_nothing_is_refused_beside_one_that_does():
    with pytest.raises(ValueError, match=r"targets: .*query.*got vlaue"):
        add_lora(own_model(), "base", rank=2, alpha=4, targets=["query", "vlaue"])


@pytest.mark.parametrize("options", [{"alpha": 64}, {"rank_stabilized": True}], ids=str)
def test_models_that_scale_their_adapter_differently_are_others(options):
    settings = {"rank": 2, "alpha": 4}
    one, other = (add_lora(own_model(), "base", **s) for s in (settings, settings | options))
    assert model_digest(one) != model_digest(other)
    assert model_digest(one) == model_digest(add_lora(own_model(), "base", **settings))


def test_files_of_an_adapter_do_not_depend_on_the_order_of_its_names(tmp_path):
    folders = []
    for order in (["query", "value"], ["value", "query"]):
        folders.append(tmp_path / order[0])
        folders[-1].mkdir()
        save_adapter(add_lora(own_model(), "b", rank=2, alpha=4, targets=order), folders[-1])
    config = json.loads((folders[0] / "adapter_config.json").read_text())
    assert (config["target_modules"], config["modules_to_save"]) == (
        ["query", "value"], ["classifier", "score"],
    )  # fmt: skip
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_a_trained_parameter_outside_the_adapter_is_not_lost_in_silence(tmp_path):
    adapted = add_lora(own_model(), "base", rank=2, alpha=4)
    adapted.roberta.embeddings.word_embeddings.requires_grad_(True)
    with pytest.raises(ValueError, match="word_embeddings"):
        save_adapter(adapted, tmp_path)


def test_merged_adapters_give_the_same_logits(examples):
    adapted = tm.adapted_model(lora_model()).double()
    batch = collate(examples, pad_token_id(adapted))
    del batch["labels"]
    expected = adapted(**batch).logits
    merge_adapters(adapted)
    assert not adapter_parameters(adapted)
    assert not any("lora" in name for name, _ in adapted.named_parameters())
    torch.testing.assert_close(adapted(**batch).logits, expected)


def test_a_pooler_that_was_drawn_at_random_and_not_saved_is_refused(tmp_path):
    """PEFT saves the classifier, but not the pooler of a BERT that was pretrained without one."""
    base = small_model("bert").float()
    encoder = base.bert.__class__(base.config, add_pooling_layer=False)
    encoder.save_pretrained(tmp_path / "base")
    options = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    model = peft.get_peft_model(base, options)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"expected bert\.pooler\.dense\.(bias|weight) in the adapter"
    ):
        load_classifier(tmp_path / "adapter", ["a", "b", "c"])
