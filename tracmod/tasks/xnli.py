"""XNLI: natural language inference in 15 languages, parallel item by item."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tracmod.config import TaskConfig
from tracmod.tasks.examples import SPLITS, Corpus, Pool, pool_from_rows
from tracmod.tasks.published import (
    check_languages,
    class_number,
    find_file,
    is_left_out,
    read_hub,
    read_published,
)

LABELS = ["entailment", "neutral", "contradiction"]
# fmt: off
LANGUAGES = (
    "ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh",
)
# fmt: on
FILES = "XNLI-1.0/xnli.{dev,test}.tsv and XNLI-MT-1.0/multinli/multinli.train.<language>.tsv"
# By name, by the translated training files' other spelling, and by number as on the Hub.
_NUMBERS = {
    "entailment": 0,
    "neutral": 1,
    "contradiction": 2,
    "contradictory": 2,
    "0": 0,
    "1": 1,
    "2": 2,
}


def load_xnli(config: TaskConfig) -> Corpus:
    """Load the published splits; `group` is the item, the same in every language.

    An item is a premise with one hypothesis. No premise is in two of the published splits, so its
    three hypotheses stay together.

    Source: Conneau et al., XNLI: Evaluating Cross-lingual Sentence Representations, EMNLP 2018.
    """
    check_languages(config, LANGUAGES)
    pools = [Pool(pool_from_rows(_examples(config, split)), (split,)) for split in SPLITS]
    return Corpus(LABELS, True, pools)


def _examples(config: TaskConfig, split: str) -> Iterator[dict[str, Any]]:
    for language in config.languages_of(split):
        for place, row in _rows(config, split, language):
            if not is_left_out(row["text_a"], row["text_b"]):
                yield row | {
                    "id": f"{language}-{row['group']}",
                    "language": language,
                    "label": class_number(row["label"], _NUMBERS, place),
                }


def _rows(config: TaskConfig, split: str, language: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if config.path is not None and split != "train":
        path = find_file(config.path, f"XNLI-1.0/xnli.{split}.tsv", f"xnli.{split}.tsv")
        columns = {
            "language": "language",
            "text_a": "sentence1",
            "text_b": "sentence2",
            "label": "gold_label",
            "group": "pairID",
        }
        yield from (
            (place, row)
            for place, row in read_published(path, columns)
            if row["language"] == language
        )
        return
    if config.path is not None:
        name = f"multinli/multinli.train.{language}.tsv"
        path = find_file(config.path, f"XNLI-MT-1.0/{name}", name)
        columns = {"text_a": "premise", "text_b": "hypo", "label": "label"}
        rows = read_published(path, columns)
    else:
        columns = {"text_a": "premise", "text_b": "hypothesis", "label": "label"}
        rows = read_hub(config.hub_name or "facebook/xnli", language, split, columns, FILES)
    # These are parallel row by row.
    for number, (place, row) in enumerate(rows):
        yield place, row | {"group": str(number)}
