"""A user's model folder and example files, as `tracmod attribute` takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from encoders import tiny_encoder
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracmod.models.tokenizer import train_tokenizer

TEXTS = ["the cat sleeps", "a dog runs home", "der Hund schläft", "die Katze rennt heim"]
LABELS = ("no", "maybe", "yes")


def own_tokenizer(texts: Sequence[str] = TEXTS) -> PreTrainedTokenizerBase:
    """Train a tokenizer on the texts."""
    return train_tokenizer(list(texts) * 5, 120, 40)


def own_model(**overrides: Any) -> PreTrainedModel:
    """Build a tiny XLM-R whose classes are LABELS."""
    model = tiny_encoder("xlmr", vocab_size=len(own_tokenizer()), **overrides)
    model.config.id2label = dict(enumerate(LABELS))
    model.config.label2id = {name: label for label, name in enumerate(LABELS)}
    return model


def save_model(folder: Path, **overrides: Any) -> Path:
    """Save `own_model` and its tokenizer as a transformers folder."""
    own_model(**overrides).save_pretrained(folder)
    own_tokenizer().save_pretrained(folder)
    return folder


def write_examples(path: Path, count: int, labels: Sequence[str] = LABELS) -> Path:
    """Write a file of examples in English and German with ids `<name of the file>-<row>`."""
    lines = ["id\tlanguage\ttext_a\tlabel"]
    for row in range(count):
        text = f"{TEXTS[row % 4]} {TEXTS[(row * 3 + row // 4) % 4]}"
        lines.append(
            f"{path.stem}-{row}\t{'de' if row % 4 > 1 else 'en'}\t{text}\t{labels[row % 3]}"
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
