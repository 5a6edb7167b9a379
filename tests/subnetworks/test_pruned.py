"""Exported subnetworks: the masked model's logits, fewer numbers, and clear errors."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from click.testing import CliRunner
from encoders import ragged_examples, tiny_encoder
from safetensors.torch import load_file, save_file
from tiny_models import tiny_examples, tiny_model
from tiny_study import tiny_config
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tracmod as tm
from tracmod.cli import main
from tracmod.models.architecture import attention_layers
from tracmod.models.loading import load_model
from tracmod.models.plain_pass import predict
from tracmod.study.export import export_subnetwork
from tracmod.study.pipeline import run_stages
from tracmod.study.run_folder import RunFolder
from tracmod.subnetworks.importance import head_importance
from tracmod.subnetworks.pruned_model import MASK_FILE, WEIGHTS_FILE
from tracmod.validation.gradients import check_gradients

FAMILIES = ("bert", "roberta", "xlmr", "distilbert")
MASKS = {
    "uneven": [[0, 1, 1], [1, 0, 0]],
    "empty layer": [[0, 0, 0], [1, 1, 0]],
    "nothing": [[0, 0, 0], [0, 0, 0]],
    "everything": [[1, 1, 1], [1, 1, 1]],
}
EXAMPLES = ragged_examples(9)


def masked_logits(model, mask, examples=EXAMPLES):
    with mask.apply(model):
        return predict(model, examples)


@pytest.fixture(params=MASKS)
def mask(request):
    return tm.HeadMask(MASKS[request.param])


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_form_is_loaded_by_transformers_and_gives_the_same_bits(family, mask, tmp_path):
    model = tiny_encoder(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tm.save_masked(model, mask, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(predict(loaded, EXAMPLES), masked_logits(model, mask))
    for layer, kept_H in zip(attention_layers(loaded), mask.array, strict=True):
        rows = layer.value.weight.unflatten(0, (3, 8)), layer.query.bias.unflatten(0, (3, 8))
        columns = layer.output.weight.T.unflatten(0, (3, 8))
        for part in (*rows, columns):
            assert part.flatten(1).any(dim=1).int().tolist() == kept_H.tolist()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    if mask.size < 6:  # the zeros compress
        whole = tmp_path / "whole"
        model.save_pretrained(whole)
        sizes = [
            len(gzip.compress((folder / "model.safetensors").read_bytes()))
            for folder in (tmp_path, whole)
        ]
        assert sizes[0] < sizes[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_form_gives_the_masked_models_logits(family, mask, tmp_path):
    model = tiny_encoder(family)
    tm.save_pruned(model, mask, tmp_path)
    loaded = tm.load_pruned(tmp_path)
    assert not loaded.training
    expected = masked_logits(model, mask)
    torch.testing.assert_close(predict(loaded, EXAMPLES), expected, rtol=1e-5, atol=1e-6)
    kept = [max(1, int(kept_H.sum())) for kept_H in mask.array]
    assert [layer.num_heads for layer in attention_layers(loaded)] == kept
    assert [layer.head_dim for layer in attention_layers(loaded)] == [8, 8]
    # Rows of query, key and value, with their bias, and columns of the output, of width 8 in 24.
    removed = sum(3 - heads for heads in kept) * (4 * 24 * 8 + 3 * 8)
    numbers = [sum(parameter.numel() for parameter in m.parameters()) for m in (model, loaded)]
    assert numbers[0] - numbers[1] == removed
    stored = load_file(tmp_path / WEIGHTS_FILE)
    assert sum(tensor.numel() for tensor in stored.values()) == numbers[1]


def test_layer_without_heads_gives_the_projections_bias(tmp_path):
    model = tiny_encoder()
    tm.save_pruned(model, tm.HeadMask(MASKS["empty layer"]), tmp_path)
    loaded = tm.load_pruned(tmp_path)
    seen = []
    first = attention_layers(loaded)[0].output
    first.register_forward_hook(lambda module, inputs, output: seen.append(output))
    predict(loaded, EXAMPLES)
    for output_BSO in seen:
        assert torch.equal(output_BSO, first.bias.expand_as(output_BSO))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_ugly_sizes_are_kept(dtype, tmp_path):
    model = tiny_model("bert", layers=3, hidden=35, heads=5, dtype=dtype, scale=1.0)
    mask = tm.HeadMask.random(3, 5, 7, seed=3)
    tm.save_pruned(model, mask, tmp_path / "pruned")
    loaded = tm.load_pruned(tmp_path / "pruned")
    assert loaded.dtype == dtype
    examples = tiny_examples(11)
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(
        predict(loaded, examples),
        masked_logits(model, mask, examples),
        rtol=tolerance,
        atol=tolerance,
    )


def test_gradients_of_a_pruned_model_agree_with_autograd(tmp_path):
    tm.save_pruned(tiny_encoder(), tm.HeadMask(MASKS["uneven"]), tmp_path)
    errors = check_gradients(tm.load_pruned(tmp_path), ragged_examples(5))
    assert all(error.passed for error in errors), errors


def test_transformers_refuses_the_pruned_form(tmp_path):
    tm.save_pruned(tiny_encoder(), tm.HeadMask(MASKS["uneven"]), tmp_path)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_mask_is_refused_for_a_pruned_model_whose_layers_differ(tmp_path):
    mask = tm.HeadMask(MASKS["uneven"])
    tm.save_pruned(tiny_encoder(), mask, tmp_path)
    loaded = tm.load_pruned(tmp_path)
    refusal = r"heads in every layer, got \[2, 1\]"
    with pytest.raises(ValueError, match=refusal), mask.apply(loaded):
        pass
    with pytest.raises(ValueError, match=refusal):
        head_importance(loaded, EXAMPLES)
    with pytest.raises(ValueError, match=refusal):
        tm.save_pruned(loaded, mask, tmp_path / "again")


def test_model_that_needs_all_its_heads_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    model = tiny_encoder()
    attention = type(model.roberta.encoder.layer[0].attention.self)
    plain = attention.forward

    def forward(module, hidden_states, *arguments, **options):
        if module.query.weight.shape[0] != 24:
            raise RuntimeError("shape '[2, 4, 3, 8]' is invalid")
        return plain(module, hidden_states, *arguments, **options)

    monkeypatch.setattr(attention, "forward", forward)
    with pytest.raises(ValueError, match=r"XLMRobertaForSequenceClassification: .*logits"):
        tm.save_pruned(model, tm.HeadMask(MASKS["uneven"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("save", [tm.save_masked, tm.save_pruned])
def test_mask_of_another_shape_is_refused_before_anything_is_written(save, tmp_path):
    with pytest.raises(ValueError, match="expected 2 layers of 3 heads"):
        save(tiny_encoder(), tm.HeadMask.full(2, 4), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_whose_files_do_not_match_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"found no config\.json"):
        tm.load_pruned(tmp_path)
    tm.save_pruned(tiny_encoder(), tm.HeadMask(MASKS["uneven"]), tmp_path)
    tm.HeadMask(MASKS["everything"]).save(tmp_path / MASK_FILE)
    with pytest.raises(ValueError, match=r"pruned\.safetensors: expected the weights that"):
        tm.load_pruned(tmp_path)
    tm.HeadMask.full(2, 5).save(tmp_path / MASK_FILE)
    with pytest.raises(ValueError, match="expected 2 layers of 3 heads"):
        tm.load_pruned(tmp_path)
    tm.HeadMask(MASKS["uneven"]).save(tmp_path / MASK_FILE)
    state = load_file(tmp_path / WEIGHTS_FILE)
    state.pop("classifier.dense.weight")
    save_file(state, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"classifier\.dense\.weight"):
        tm.load_pruned(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"pruned\.safetensors"):
        tm.load_pruned(tmp_path)


# --- the command ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fine-tuned and pruned run, in which the mask of `de` is replaced by an uneven one."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("export") / "run"
    run_folder = RunFolder(folder, tiny_config(finetune={"epochs": 1}))
    with run_folder.locked():
        run_stages(run_folder, ["data", "finetune", "prune"])
    tm.HeadMask(MASKS["uneven"]).save(folder / "subnetworks" / "de.json", language="de")
    return folder


def export(*arguments):
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


@pytest.mark.parametrize("form", ["masked", "pruned"])
def test_command_exports_a_languages_subnetwork(run, form, tmp_path):
    out = tmp_path / "made" / form
    done = export(run, "--language", "de", "--form", form, "--out", out)
    assert done.exit_code == 0, done.output
    assert "3 of 6 heads" in done.output
    model, tokenizer = load_model(run / "models/full/checkpoint-1")
    encoded = [dict(tokenizer(text), labels=0) for text in ("the king sleeps", "der Hund")]
    load = {"masked": AutoModelForSequenceClassification.from_pretrained, "pruned": tm.load_pruned}
    expected = masked_logits(model, tm.HeadMask(MASKS["uneven"]), encoded)
    torch.testing.assert_close(predict(load[form](out), encoded), expected, rtol=1e-5, atol=1e-6)
    assert AutoTokenizer.from_pretrained(out)("der Hund")["input_ids"] == encoded[1]["input_ids"]
    made_from = json.loads((out / MASK_FILE).read_text())
    assert (
        made_from.items() >= {"language": "de", "model": "full", "epoch": 1, "form": form}.items()
    )
    assert tm.HeadMask.load(out / MASK_FILE) == tm.HeadMask(MASKS["uneven"])
    assert [path.name for path in out.parent.iterdir()] == [form]
    again = export(run, "--language", "de", "--out", out)
    assert again.exit_code == 2
    assert "expected a folder that is empty or not there yet" in again.output


def test_command_exports_any_mask(run, tmp_path):
    tm.HeadMask(MASKS["empty layer"]).save(tmp_path / "mask.json")
    done = export(
        run, "--mask", tmp_path / "mask.json", "--form", "pruned", "--out", tmp_path / "o"
    )
    assert done.exit_code == 0, done.output
    assert [la.num_heads for la in attention_layers(tm.load_pruned(tmp_path / "o"))] == [1, 2]


def test_command_reports_wrong_arguments_in_one_sentence(run, tmp_path):
    tm.HeadMask.full(4, 4).save(tmp_path / "other.json")
    cases = [
        (["--language", "fr"], "expected a language with a subnetwork, de, en, es, got fr"),
        ([], "expected either a language or a mask file"),
        (["--language", "de", "--mask", tmp_path / "other.json"], "either a language or a mask"),
        (["--mask", tmp_path / "other.json"], "expected 2 layers of 3 heads, as the model has"),
        (["--language", "de", "--model", "sparse"], "no such folder"),
    ]
    for options, message in cases:
        done = export(run, *options, "--out", tmp_path / "out")
        assert done.exit_code == 2, done.output
        assert message in done.output
        assert len(done.output.strip().splitlines()) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_unknown_form_or_model_is_refused(run, tmp_path):
    for named in ({"form": "onnx"}, {"model": "half"}):
        with pytest.raises(ValueError, match="export: expected a model of full, sparse"):
            export_subnetwork(run, tmp_path / "out", language="de", **named)
