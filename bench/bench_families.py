"""Time collection of every model family, of tokens, answers and LoRA against a plain floor.

    python bench/bench_families.py [--examples N] [--seconds S] [--out bench/results/families.json]

The floor is written without tracmod: the forward pass and the backward pass to the output of the
embeddings, of the same ready-made batches. Every model has random weights and the shape `mini`
(LoRA also `base`). The gradients that the engine captures are compared with one-example autograd in
float64 before anything is timed; a model whose gradients are wrong is not timed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig

import tracmod as tm
from tracmod.bench.collect import require
from tracmod.bench.measure import environment, take_turns, write_json
from tracmod.bench.models import SHAPES, VOCABULARY, random_examples
from tracmod.bench.plain import floor_pass, ready_batches
from tracmod.choices import Unit
from tracmod.gradients.lean_pass import lean
from tracmod.models.adapters import add_lora
from tracmod.models.architecture import MEAN_POOLING, attention_layers, family_of
from tracmod.models.inputs import as_examples
from tracmod.models.loading import classifier_class
from tracmod.validation.gradients import check_gradients

BATCH_TOKENS, DIM, CHECKED = 8192, 4096, 4
LABELS: dict[Unit, int] = {"text": 3, "token": 5, "span": 2}
PAD = 1


class Model(NamedTuple):
    """A model to time.

    Attributes:
        model_type: its family, as transformers names it.
        settings: what its config states beside the shape.
        unit: what it says something of.
        lora: whether a LoRA adapter of rank 8 is trained in place of the weights.
        shape: of `models.SHAPES`.
    """

    model_type: str
    settings: Mapping[str, Any] = {}
    unit: Unit = "text"
    lora: bool = False
    shape: str = "mini"


DEBERTA = {
    "relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"],
    "type_vocab_size": 0, "share_att_key": True, "norm_rel_ebd": "layer_norm",
    "position_buckets": 64, "max_relative_positions": 128,
}  # fmt: skip
DISTILBERT = {"dim": 256, "n_layers": 4, "n_heads": 4, "hidden_dim": 1024}
GROUPED = {"num_key_value_heads": 2, "head_dim": 64}
MODELS = {
    "XLM-R": Model("xlm-roberta"),
    "XLM-R, mean pooling": Model("xlm-roberta", {"architectures": [MEAN_POOLING]}),
    "DistilBERT": Model("distilbert", DISTILBERT),
    "DeBERTa-v3": Model("deberta-v2", DEBERTA),
    "MPNet": Model("mpnet"),
    "ALBERT": Model("albert", {"embedding_size": 128}),
    "ModernBERT, first token": Model("modernbert", {"classifier_pooling": "cls"}),
    "ModernBERT, mean": Model("modernbert", {"classifier_pooling": "mean"}),
    "EuroBERT": Model("eurobert", GROUPED | {"classifier_pooling": "bos"}),
    "Nomic BERT": Model("nomic_bert"),
    "Llama": Model("llama", GROUPED),
    "XLM-R, tokens": Model("xlm-roberta", unit="token"),
    "XLM-R, answers": Model("xlm-roberta", unit="span"),
    "XLM-R, LoRA": Model("xlm-roberta", lora=True),
    "XLM-R base, LoRA": Model("xlm-roberta", lora=True, shape="base"),
}


def make_model(settings: Model, folder: Path) -> Any:
    """Build a model with random weights in float32 and evaluation mode."""
    shape = SHAPES[settings.shape] | {
        "vocab_size": VOCABULARY, "max_position_embeddings": 132, "pad_token_id": PAD,
        "bos_token_id": 0, "eos_token_id": 2, "num_labels": LABELS[settings.unit],
    }  # fmt: skip
    config = AutoConfig.for_model(settings.model_type, **shape | dict(settings.settings))
    torch.manual_seed(0)
    model = classifier_class(config, settings.unit).from_config(config).eval()
    if settings.lora:
        model.save_pretrained(folder)
        model = add_lora(model, str(folder), rank=8, alpha=16)
    return model


def make_examples(unit: Unit, count: int) -> list[dict[str, Any]]:
    """Build examples of 16 to 128 random tokens with labels of the unit."""
    generator = torch.Generator().manual_seed(2)
    examples = random_examples(count)
    for example in examples:
        tokens = len(example["input_ids"])
        if unit == "token":
            labels = torch.randint(-1, LABELS["token"], (tokens,), generator=generator)
            labels[labels < 0] = -100
            labels[1] = 0
            example["labels"] = labels.tolist()
        elif unit == "span":
            example["labels"] = sorted(torch.randint(tokens, (2,), generator=generator).tolist())
    return examples


def computes_first_token_alone(model: Any) -> bool:
    """Return whether the lean pass of a model computes its last layer at the first token alone."""
    last = family_of(model).lean_last_layer(model, attention_layers(model)[-1])
    with lean(model):
        return last is not None and "forward" in vars(last[0])


def run_model(settings: Model, count: int, seconds: float) -> dict[str, Any]:
    """Check and time one model.

    Returns:
        Seconds of the floor and of collection in float32 and bfloat16, and their shares.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(settings, Path(folder))
    parameters = "adapter" if settings.lora else "encoder"
    examples = as_examples(make_examples(settings.unit, count), model=model)
    checked = examples[:CHECKED]
    wrong = [p.kind for p in check_gradients(model, checked, parameters) if not p.passed]
    require(not wrong, f"gradients differ from autograd's: {', '.join(wrong)}")
    batches = ready_batches(model, examples, BATCH_TOKENS, torch.device("cpu"))
    functions: dict[str, Callable[[], Any]] = {}
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
        functions[f"floor {name}"] = partial(floor_pass, model, batches, dtype, settings.unit)
        functions[f"collect {name}"] = partial(
            tm.collect_features, model, examples, tm.Projection(DIM), parameters,
            batch_tokens=BATCH_TOKENS, dtype=dtype,
        )  # fmt: skip
    times = take_turns(functions, torch.device("cpu"), seconds=seconds)
    ratios = {name: times[f"collect {name}"] / times[f"floor {name}"]
              for name in ("float32", "bfloat16")}  # fmt: skip
    is_lean = computes_first_token_alone(model)
    return {"lean": is_lean, "examples": count, "seconds": times, "ratio": ratios}


def main() -> None:
    """Time the models, and write the results after every one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=512, help="number of examples")
    parser.add_argument("--seconds", type=float, default=20.0, help="time per model, about")
    parser.add_argument("--only", help="name of the only model")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "part": "families", "environment": environment(torch.device("cpu")),
        "load": os.getloadavg()[0], "models": {},
    }  # fmt: skip
    for name, settings in MODELS.items():
        if arguments.only not in (None, name):
            continue
        count = arguments.examples // 4 if settings.shape == "base" else arguments.examples
        row = run_model(settings, count, arguments.seconds)
        result["models"][name] = row
        write_json(arguments.out, result)
        shares = ", ".join(f"{dtype} {ratio:.2f}" for dtype, ratio in row["ratio"].items())
        print(f"{name:26} {shares} of the floor{', lean' if row['lean'] else ''}", flush=True)


if __name__ == "__main__":
    main()
