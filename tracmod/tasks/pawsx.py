"""PAWS-X: paraphrase identification in 7 languages, parallel by id."""

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

LABELS = ["different", "paraphrase"]
LANGUAGES = ("de", "en", "es", "fr", "ja", "ko", "zh")
FILES = "x-final/<language>/{translated_train,train,dev_2k,test_2k}.tsv"
_COLUMNS = {"group": "id", "text_a": "sentence1", "text_b": "sentence2", "label": "label"}
_FILE_NAMES = {
    "train": ("translated_train.tsv", "train.tsv"),
    "dev": ("dev_2k.tsv",),
    "test": ("test_2k.tsv",),
}


def load_pawsx(config: TaskConfig) -> Corpus:
    """Load the published splits, without the rows that lack a translation ("NS").

    Source: Yang et al., PAWS-X: A Cross-lingual Adversarial Dataset for Paraphrase
    Identification, EMNLP-IJCNLP 2019.
    """
    check_languages(config, LANGUAGES)
    pools = [Pool(pool_from_rows(_examples(config, split)), (split,)) for split in SPLITS]
    return Corpus(LABELS, True, pools)


def _examples(config: TaskConfig, split: str) -> Iterator[dict[str, Any]]:
    for language in config.languages_of(split):
        for location, row in _rows(config, split, language):
            if not is_left_out(row["text_a"], row["text_b"]):
                yield {
                    **row,
                    "id": f"{language}-{row['group']}",
                    "group": str(row["group"]),
                    "language": language,
                    "label": class_number(row["label"], {"0": 0, "1": 1}, location),
                }


def _rows(config: TaskConfig, split: str, language: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if config.path is None:
        repository = config.hub_name or "google-research-datasets/paws-x"
        return read_hub(repository, language, split, _COLUMNS, FILES)
    folders = (f"x-final/{language}", language)
    names = [f"{folder}/{name}" for folder in folders for name in _FILE_NAMES[split]]
    return read_published(find_file(config.path, *names), _COLUMNS)
