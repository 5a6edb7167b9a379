"""MARC: Amazon reviews with 1 to 5 stars in 6 languages, not parallel."""

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

LABELS = ["1", "2", "3", "4", "5"]  # stars
LANGUAGES = ("de", "en", "es", "fr", "ja", "zh")
FILES = "dataset_<language>_{train,dev,test}.json"


def load_marc(config: TaskConfig) -> Corpus:
    """Load the published splits; a text is the title, a blank line and the review.

    Source: Keung et al., The Multilingual Amazon Reviews Corpus, EMNLP 2020.
    """
    check_languages(config, LANGUAGES)
    pools = [Pool(pool_from_rows(_examples(config, split)), (split,)) for split in SPLITS]
    return Corpus(LABELS, False, pools)


def _examples(config: TaskConfig, split: str) -> Iterator[dict[str, Any]]:
    read = _from_hub if config.path is None else _from_file
    for language in config.languages_of(split):
        for row in read(config, split, language):
            if not is_left_out(row["text_a"]):
                # The ids of MARC begin with the language, as in `de_0203609`; those of a copy may
                # not.
                has_language = str(row["id"]).startswith(language)
                example_id = row["id"] if has_language else f"{language}-{row['id']}"
                yield row | {"id": example_id, "language": language}


def _from_hub(config: TaskConfig, split: str, language: str) -> Iterator[dict[str, Any]]:
    repository = config.hub_name or "mteb/amazon_reviews_multi"
    columns = {"id": "id", "text_a": "text", "label": "label"}
    numbers = {str(number): number for number in range(len(LABELS))}
    for location, row in read_hub(repository, language, split, columns, FILES):
        yield row | {"label": class_number(row["label"], numbers, location)}


def _from_file(config: TaskConfig, split: str, language: str) -> Iterator[dict[str, Any]]:
    assert config.path is not None
    name = f"dataset_{language}_{split}.json"
    path = find_file(config.path, name, f"{split}/{name}", f"json/{split}/{name}")
    columns = {"id": "review_id", "title": "review_title", "text": "review_body", "label": "stars"}
    numbers = {stars: number for number, stars in enumerate(LABELS)}
    for location, row in read_published(path, columns):
        parts = [row["title"], row["text"]]
        yield {
            "id": row["id"],
            # The copy on the Hub joins title and review in the same way.
            "text_a": "\n\n".join(part for part in parts if part and part.strip()),
            "label": class_number(row["label"], numbers, location),
        }
