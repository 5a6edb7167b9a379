"""A study whose models are LoRA adapters: trained, pruned, traced, differentiated, retrained."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from encoders import tiny_encoder
from own_model import own_model, own_tokenizer
from safetensors.torch import load_file
from tiny_study import (
    assert_sound_with_own_metagradient,
    files_of,
    run_killing,
    tiny_config,
)

import tracmod as tm
from tracmod.cli import main
from tracmod.config import parse_config
from tracmod.features.store import FeatureStore
from tracmod.models.adapters import adapter_tensors
from tracmod.models.inputs import encode
from tracmod.models.loading import load_model
from tracmod.study.context import RunContext
from tracmod.study.export import export_subnetwork
from tracmod.study.forecast import Forecast
from tracmod.study.pipeline import run_stages
from tracmod.study.run_folder import RunFolder
from tracmod.study.stages import metagradient
from tracmod.subnetworks.head_mask import HeadMask, head_slices

peft = pytest.importorskip("peft")
LORA = {"rank": 3, "alpha": 6, "targets": ["query", "value", "attention.output.dense"]}
OWN = {"layers": 4, "hidden": 128, "heads": 4, "vocabulary": 4000}  # unused with a model's name


def lora_config(folder, lora=LORA, **overrides):
    """Return the config of a tiny study of an adapter on a pretrained model in `folder`/base."""
    base = folder / "base"
    if not base.exists():
        torch.manual_seed(3)
        tiny_encoder("xlmr", vocab_size=len(own_tokenizer())).base_model.save_pretrained(base)
        own_tokenizer().save_pretrained(base)
    model = {"name": str(base), "lora": lora, "max_length": 32, **OWN}
    return tiny_config(
        **{
            "model": model,
            "prune": {"threshold": 0.5},
            "collect": {"untrained": True},
            "metagradient": {"checks": [0.1]},
            "retrain": {"subsets": 2, "seeds": 1, "methods": ["tracin"], "removed": 0},
        }
        | overrides
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lora")
    run = RunFolder(folder / "run", lora_config(folder))
    with run.locked():
        run_stages(run)
    return run


def examples_of(run, split, tokenizer):
    return encode(tokenizer, pq.read_table(run.path / f"data/{split}.parquet"), 32)


def test_checkpoints_are_adapter_folders_that_peft_reads(run):
    folder = run.path / "models/full/checkpoint-2"
    assert not (folder / "config.json").exists()
    model, tokenizer = load_model(folder)
    base, _ = load_model(run.config.model.name, ["a", "b", "c"])
    by_peft = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    for example in examples_of(run, "test", tokenizer)[:5]:
        ids = torch.tensor([list(example["input_ids"])])
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, by_peft(ids).logits)


@pytest.mark.parametrize("model_name", ["full", "sparse"])
def test_training_moves_the_adapter_and_the_classifier_alone(run, model_name):
    before = adapter_tensors(run.path / "models/untrained/checkpoint-0")
    after = adapter_tensors(run.path / f"models/{model_name}/checkpoint-2")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert {".lora_A." in n or ".lora_B." in n or n.startswith("classifier.") for n in after} == {
        True
    }
    assert {"classifier.out_proj.weight"} < moved
    assert any(".lora_B." in name for name in moved)


def test_sparse_training_moves_the_adapters_of_heads_in_some_subnetwork_alone(run):
    masks = [HeadMask.load(file) for file in (run.path / "subnetworks").glob("??.json")]
    assert len(masks) == len(run.config.task.languages)
    used = sum(torch.tensor(mask.array.tolist()) for mask in masks) > 0
    before, _ = load_model(run.path / "models/untrained/checkpoint-0")
    after, _ = load_model(run.path / "models/sparse/checkpoint-2")
    slices = [part for part in head_slices(before) if ".lora_" in part.name]
    assert slices
    assert not used.all()  # otherwise the test shows nothing
    parameters = dict(after.named_parameters())
    for part in slices:
        same = torch.equal(part.parameter[part.index], parameters[part.name][part.index])
        assert same == (not used[part.layer, part.head]), part


@pytest.mark.parametrize("model_name", ["full", "sparse", "untrained"])
def test_features_are_those_of_what_training_moves(run, model_name):
    epoch = 0 if model_name == "untrained" else 2
    model, tokenizer = load_model(run.path / f"models/{model_name}/checkpoint-{epoch}")
    examples = examples_of(run, "train", tokenizer)
    parameters = ["*.lora_A.weight", "*.lora_B.weight", "classifier.*"]
    expected = tm.collect_features(
        model.requires_grad_(True), examples, tm.Projection(256), parameters
    )
    folder = run.path / f"features/{model_name}/full/checkpoint-{epoch}/train"
    torch.testing.assert_close(
        torch.as_tensor(FeatureStore.open(folder).read()), expected, rtol=1e-4, atol=1e-6
    )


def test_the_run_is_sound_and_its_metagradient_is_of_its_own_training(run):
    assert_sound_with_own_metagradient(run.path)
    assert (run.path / "report").is_dir()


def test_a_query_of_the_run_is_answered(run):
    result = CliRunner().invoke(
        main, ["query", str(run.path), "the cat sleeps", "--language", "en", "-k", "2"]
    )
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(
        main, ["query", str(run.path), "the cat sleeps", "--text-language", "en"]
    )
    assert result.exit_code == 2
    assert "--text-language" in result.output


def test_a_killed_run_gives_the_same_adapters(run, tmp_path):
    folder = run.path.parent
    small = lora_config(folder, views={"random": 0, "subnetwork": False})
    names = {"metagradient", "retrain"}
    tree = {key: value for key, value in small.model_dump(mode="json").items() if key not in names}
    assert run_killing(parse_config(tree, "small"), tmp_path / "killed") > 0
    pattern = "models/*/checkpoint-*/adapter_model.safetensors"
    killed, whole = files_of(tmp_path / "killed", pattern), files_of(run.path, pattern)
    assert len(whole) == 5
    assert killed == whole


def test_an_adapter_without_a_pretrained_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model.*lora.*name"):
        tiny_config(model={"lora": {}})
    shape = tmp_path / "shape"
    shape.mkdir()
    own_model().config.save_pretrained(shape)
    config = lora_config(tmp_path, model={"name": str(shape), "lora": LORA, **OWN})
    run = RunFolder(tmp_path / "run", config)
    with run.locked(), pytest.raises(ValueError, match=r"model\.lora.*shape has no weights"):
        run_stages(run, ["data", "finetune"])


def test_targets_that_the_model_does_not_have_are_refused(tmp_path):
    config = lora_config(tmp_path, {"targets": ["nowhere"]})
    run = RunFolder(tmp_path / "run", config)
    with run.locked(), pytest.raises(ValueError, match="nowhere"):
        run_stages(run, ["data", "finetune"])


def test_an_adapter_folder_has_all_that_a_fine_tuning_of_it_moved(tmp_path):
    """Also its biases, which PEFT trains with `bias="lora_only"`."""
    from tracmod.models.adapters import adapter_parameters, save_adapter

    options = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], bias="lora_only")
    adapted = tm.adapted_model(peft.get_peft_model(own_model(), options))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert any(name.endswith("query.bias") for name in trained)
    assert set(adapter_parameters(adapted)) == trained
    (tmp_path / "adapter").mkdir()
    save_adapter(adapted, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(trained)


def test_the_cost_of_a_study_of_adapters_is_estimated(run, tmp_path):
    config = tmp_path / "config.yaml"
    tree = lora_config(run.path.parent).model_dump(mode="json", exclude_unset=True)
    config.write_text(json.dumps(tree))
    arguments = ["run", str(config), "--out", str(tmp_path / "run"), "--check"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    # A checkpoint has the adapter alone. The rest of the estimate is for the tokenizer.
    adapter = adapter_tensors(run.path / "models/full/checkpoint-2")
    in_adapter = sum(tensor.nbytes for tensor in adapter.values())
    assert Forecast(run, RunContext(run)).checkpoint_bytes == 4_000_000 + in_adapter


def test_a_subnetwork_is_exported_with_the_adapter_merged(run, tmp_path):
    language = run.config.task.languages[0]
    mask = HeadMask.load(run.subnetwork(language))
    model, tokenizer = load_model(run.path / "models/full/checkpoint-2")
    examples = examples_of(run, "test", tokenizer)[:4]
    for form in ("masked", "pruned"):
        export_subnetwork(run.path, tmp_path / form, language=language, form=form)
    masked, _ = load_model(tmp_path / "masked")
    pruned = tm.load_pruned(tmp_path / "pruned")
    for example in examples:
        ids = torch.tensor([list(example["input_ids"])])
        with torch.no_grad():
            with mask.apply(model):
                expected = model(ids).logits
            for exported in (masked, pruned):
                torch.testing.assert_close(exported(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_only_what_is_trained_counts_towards_the_memory_of_adjoints(run):
    context = RunContext(run)
    trained = sum(
        t.numel() for t in adapter_tensors(run.path / "models/full/checkpoint-2").values()
    )
    room = run.config.metagradient.model_copy(update={"memory": 2 * 3 * 4 * trained * 3})
    config = run.config.model_copy(update={"metagradient": room})
    context.config = config
    assert metagradient._groups(context, "full") == [tuple(run.config.task.languages)]


SPARSE = ["data", "finetune", "prune", "sparse-finetune"]


def test_adapters_that_no_head_divides_are_trained_by_every_language(tmp_path):
    config = lora_config(tmp_path, {"targets": ["intermediate.dense"]})
    run = RunFolder(tmp_path / "run", config)
    with run.locked():
        run_stages(run, SPARSE)
    tensors = adapter_tensors(run.path / "models/sparse/checkpoint-2")
    assert all(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name)


def test_adapters_that_could_not_learn_are_refused_before_any_training(tmp_path):
    """The second matrix on the attention output is 0 at first, and no head owns a part of it."""
    config = lora_config(
        tmp_path,
        {"targets": ["attention.output.dense"]},
        sparse_finetune={"shared": "frozen"},
        collect={"parameters": "attention"},
    )
    run = RunFolder(tmp_path / "run", config)
    with run.locked(), pytest.raises(ValueError, match=r"sparse_finetune: shared: .*output\.dense"):
        run_stages(run, SPARSE)
    assert not (run.path / "models").exists()


def test_layers_that_the_model_does_not_have_are_refused_before_any_training(tmp_path):
    config = lora_config(tmp_path, sparse_finetune={"train_layers": 3})
    run = RunFolder(tmp_path / "run", config)
    with (
        run.locked(),
        pytest.raises(ValueError, match=r"sparse_finetune: train_layers: .*2.*got 3"),
    ):
        run_stages(run, SPARSE)
    assert not (run.path / "models").exists()


def test_an_adapter_as_the_model_to_begin_with_is_refused(run, tmp_path):
    adapter = run.path / "models/full/checkpoint-2"
    config = lora_config(tmp_path, model={"name": str(adapter), **OWN})
    second = RunFolder(tmp_path / "run", config)
    with second.locked(), pytest.raises(ValueError, match=r"model\.name: .*adapter"):
        run_stages(second, ["data", "finetune"])


def test_checkpoints_are_read_from_any_working_directory(tmp_path, monkeypatch):
    config = lora_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    relative = config.model.model_copy(update={"name": "base"})
    run = RunFolder(tmp_path / "run", config.model_copy(update={"model": relative}))
    with run.locked():
        run_stages(run, ["data", "finetune"])
    monkeypatch.chdir("/")
    load_model(tmp_path / "run/models/full/checkpoint-2")
