"""Checkpoints of a tiny model, and example files for it."""

from __future__ import annotations

import json

import torch
from encoders import tiny_encoder

from tracmod.models.tokenizer import train_tokenizer

LABELS = ["no", "maybe", "yes"]
RATES = [0.5, 0.25]  # learning rates of the two checkpoints
WORDS = {
    "en": ["the", "cat", "dog", "sleeps", "runs", "home", "sings", "old", "small"],
    "de": ["die", "Katze", "Hund", "schläft", "rennt", "heim", "singt", "alt", "klein"],
    "es": ["el", "gato", "perro", "duerme", "corre", "casa", "canta", "viejo"],
}


def save_checkpoints(folder, num_labels=3):
    """Save model/ and two checkpoints with other weights and with learning rates."""
    tokenizer = train_tokenizer([" ".join(words) for words in WORDS.values()] * 9, 120, 40)
    for number, name in enumerate(("model", "checkpoint-1", "checkpoint-2")):
        model = tiny_encoder("xlmr", number, vocab_size=len(tokenizer), num_labels=num_labels)
        if num_labels == 3:
            model.config.id2label = dict(enumerate(LABELS))
            model.config.label2id = {label: index for index, label in enumerate(LABELS)}
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if number:
            log = [{"step": number, "learning_rate": RATES[number - 1]}]
            state = {"global_step": number, "epoch": number, "log_history": log}
            (folder / name / "trainer_state.json").write_text(json.dumps(state))


def write_examples(path, per_language, labels=LABELS):
    """Write a file of examples of random words in three languages, in groups of three."""
    generator = torch.Generator().manual_seed(per_language)
    lines = ["id\tlanguage\ttext_a\tlabel\tgroup"]
    for row in range(3 * per_language):
        language = ["en", "de", "es"][row % 3]
        picks = torch.randint(len(WORDS[language]), (5,), generator=generator).tolist()
        text = " ".join(WORDS[language][pick] for pick in picks)
        label = labels[int(torch.randint(len(labels), (1,), generator=generator))]
        lines.append(f"{path.stem}-{row}\t{language}\t{text}\t{label}\tg{row // 3}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
