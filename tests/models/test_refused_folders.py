"""Folders whose loaded model would not be the one that was trained are refused, with the reason."""

from __future__ import annotations

import json
import re

import pytest
import torch
from own_model import save_model
from safetensors.torch import load_file, save_file

from tracmod.models.checkpoints import check_checkpoint
from tracmod.models.loading import load_classifier, load_model


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def rename(prefix):
    return lambda tensors: {prefix + name: t.clone() for name, t in tensors.items()}


def quantize(dtype):
    return lambda tensors: {n: t.to(dtype) if t.ndim == 2 else t for n, t in tensors.items()}


def with_tensor(name):
    return lambda tensors: tensors | {name: torch.ones(2)}


def only_shards(folder, lost):
    """Turn the weights into shards of one tensor each, and lose some."""
    tensors = load_file(folder / "model.safetensors")
    files = {name: f"model-{number:05}.safetensors" for number, name in enumerate(tensors)}
    for name, file in files.items():
        if file != lost:
            save_file({name: tensors[name]}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def change_index(folder, **changes):
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def no_safetensors(folder, instead):
    (folder / "model.safetensors").rename(folder / instead)


def pipeline(folder):
    modules = [{"type": f"sentence_transformers.models.{n}"} for n in ("Transformer", "Pooling")]
    (folder / "modules.json").write_text(json.dumps(modules))


FAULTS = {
    "adapter weights (.bin)": (lambda f: (f / "adapter_model.bin").touch(), "adapter_model.bin"),
    "adapter weights": (
        lambda f: (f / "adapter_model.safetensors").touch(), "adapter_model.safetensors"
    ),
    "adapters library": (lambda f: (f / "pytorch_adapter.bin").touch(), "pytorch_adapter.bin"),
    "torch.compile": (lambda f: change_weights(f, rename("_orig_mod.")), "_orig_mod"),
    "DataParallel": (lambda f: change_weights(f, rename("module.")), r"it has module\."),
    "int8": (lambda f: change_weights(f, quantize(torch.int8)), "quantized.*I8"),
    "float8": (lambda f: change_weights(f, quantize(torch.float8_e4m3fn)), "quantized.*F8"),
    "bitsandbytes": (
        lambda f: change_config(f, quantization_config={"quant_method": "bitsandbytes"}),
        "quantization_config",
    ),
    "own head": (lambda f: change_weights(f, with_tensor("cls.scorer.weight")), "cls.scorer"),
    "own vocabulary": (lambda f: change_weights(f, with_tensor("vocab_x.weight")), "vocab_x"),
    "lost shard": (lambda f: only_shards(f, "model-00003.safetensors"), "model-00003"),
    "empty index": (
        lambda f: (
            no_safetensors(f, "x"), (f / "model.safetensors.index.json").write_text("{}")
        ),
        "weight_map",
    ),
    "pickle only": (lambda f: no_safetensors(f, "pytorch_model.bin"), "pytorch_model.bin"),
    "FSDP": (lambda f: no_safetensors(f, "pytorch_model_fsdp_0"), "pytorch_model_fsdp_0"),
    "Git LFS": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec"),
        "model.safetensors.*damaged",
    ),
    "custom code": (
        lambda f: change_config(f, auto_map={"AutoModelForSequenceClassification": "m.Own"}),
        "auto_map",
    ),
    "pruned heads": (lambda f: change_config(f, pruned_heads={"0": [1]}), "pruned_heads"),
    "gap in id2label": (
        lambda f: change_config(f, id2label={"0": "no", "1": "maybe", "7": "yes"}, label2id={}),
        "id2label.*0 to 2",
    ),
    "repeated class": (
        lambda f: change_config(f, id2label={"0": "no", "1": "no", "2": "yes"}, label2id={}),
        "no twice",
    ),
    "contradicting classes": (
        lambda f: change_config(f, label2id={"no": 2, "maybe": 1, "yes": 0}), "id2label.*label2id"
    ),
    "names that are numbers": (
        lambda f: change_config(f, id2label={"0": 0, "1": 1, "2": 2}, label2id={}), "id2label.*0"
    ),
    "list of names": (lambda f: change_config(f, id2label=["no", "maybe", "yes"]), "config.*list"),
    "text for a number": (lambda f: change_config(f, vocab_size="120"), "config.*vocab_size"),
    "index without metadata": (
        lambda f: (only_shards(f, lost=None), change_index(f, metadata=None)), "index.*metadata"
    ),
    "link to a lost file (shard)": (
        lambda f: (no_safetensors(f, "x"), (f / "model.safetensors").symlink_to(f / "lost")),
        "model.safetensors.*link",
    ),
    "more classes": (lambda f: change_config(f, num_labels=5), r"\(5,.*\(3,"),
    "sentence-transformers": (pipeline, "Pooling"),
    "SetFit": (lambda f: (f / "model_head.pkl").touch(), "model_head.pkl"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_is_refused_with_its_fault(tmp_path, fault):
    folder = save_model(tmp_path / "classifier")
    expected = load_classifier(folder).config
    damage, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)
    if re.search("adapter|pickle|FSDP|shard|index|LFS|int8|float8", fault):
        # What the files show is found at a checkpoint before any model is loaded.
        with pytest.raises(ValueError, match=f"(?s){message}"):
            check_checkpoint(folder, expected)


def test_whole_shards_and_half_precision_are_accepted(tmp_path):
    expected = load_classifier(save_model(tmp_path / "whole")).state_dict()
    shards = save_model(tmp_path / "shards")
    only_shards(shards, lost=None)
    (shards / "adapter").mkdir()  # of another training, in a folder of its own
    (shards / "adapter" / "adapter_config.json").write_text("{}")
    for name, tensor in load_model(shards)[0].state_dict().items():
        assert torch.equal(tensor, expected[name])
    half = save_model(tmp_path / "half")
    change_weights(half, quantize(torch.bfloat16))
    assert load_classifier(half).dtype == torch.float32


def test_an_encoder_of_sentence_transformers_may_be_fine_tuned(tmp_path):
    folder = save_model(tmp_path / "encoder")
    change_weights(folder, lambda t: {n: v for n, v in t.items() if "classifier" not in n})
    pipeline(folder)
    assert load_classifier(folder, ["no", "maybe", "yes"]).config.num_labels == 3
