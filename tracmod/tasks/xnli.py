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
_CLASSES = {
    "entailment": 0,
    "neutral": 1,
    "contradiction": 2,
    "contradictory": 2,  # in the translated training files
    "0": 0,  # on the Hub
    "1": 1,
    "2": 2,
}


def load_xnli(config: TaskConfig) -> Corpus:
    """Load the published splits; `group` is the item, the same in every language.

    An item is a premise with one hypothesis. No premise occurs in two of the published splits, so
    the three hypotheses of a premise stay in one split.

    Source: Conneau et al., XNLI: Evaluating Cross-lingual Sentence Representations, EMNLP 2018.
    """
    check_languages(config, LANGUAGES)
    pools = [Pool(pool_from_rows(_examples(config, split)), (split,)) for split in SPLITS]
    return Corpus(LABELS, True, pools)


def _examples(config: TaskConfig, split: str) -> Iterator[dict[str, Any]]:
    for language in config.languages_of(split):
        for location, row in _rows(config, split, language):
            if not is_left_out(row["text_a"], row["text_b"]):
                yield row | {
                    "id": f"{language}-{row['group']}",
                    "language": language,
                    "label": class_number(row["label"], _CLASSES, location),
                }


def _rows(config: TaskConfig, split: str, language: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if config.path is not None and split != "train":  # one file for all languages
        path = find_file(config.path, f"XNLI-1.0/xnli.{split}.tsv", f"xnli.{split}.tsv")
        columns = {
            "language": "language",
            "text_a": "sentence1",
            "text_b": "sentence2",
            "label": "gold_label",
            "group": "pairID",
        }
        yield from (
            (location, row)
            for location, row in read_published(path, columns)
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
    # Row n is the same item in the files of all languages.
    for number, (location, row) in enumerate(rows):
        yield location, row | {"group": str(number)}
