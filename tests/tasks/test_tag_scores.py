"""Scores of tags, against worked examples in the manner of CoNLL's scorer."""

from __future__ import annotations

import pytest

from tracmod.tasks.tag_scores import (
    TagCounts,
    are_entities,
    count_tags,
    entities,
    score_name,
    sentence_class,
    sentence_classes,
    total_counts,
)

NAMES = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def numbers(text):
    return [-100 if tag == "_" else NAMES.index(tag) for tag in text.split()]


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O O", set()),
        ("B-PER I-PER O B-LOC", {("PER", 0, 2), ("LOC", 3, 4)}),
        ("B-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),
        ("I-PER I-PER", {("PER", 0, 2)}),
        ("O I-LOC I-PER", {("LOC", 1, 2), ("PER", 2, 3)}),
        ("B-PER I-LOC", {("PER", 0, 1), ("LOC", 1, 2)}),
        ("B-PER O I-PER", {("PER", 0, 1), ("PER", 2, 3)}),
        ("", set()),
    ],
)
def test_entities(tags, spans):
    assert entities(tags.split()) == spans


@pytest.mark.parametrize(
    ("predicted", "true", "counts"),
    [
        ("B-PER I-PER O", "B-PER I-PER O", (1, 1, 1)),
        ("B-PER O O", "B-PER I-PER O", (0, 1, 1)),  # another border
        ("B-LOC I-LOC O", "B-PER I-PER O", (0, 1, 1)),  # another type
        ("B-PER I-PER B-LOC", "B-PER I-PER O", (1, 2, 1)),
        ("O O O", "O O O", (0, 0, 0)),
        ("_ O B-LOC", "B-PER O B-LOC", (1, 1, 2)),  # cut off
        ("B-PER I-PER B-LOC", "B-PER _ B-LOC", (2, 2, 2)),  # without a tag
    ],
)
def test_counts_of_entities(predicted, true, counts):
    assert count_tags(numbers(predicted), numbers(true), NAMES) == counts


def test_f1_is_over_all_entities_of_all_sentences():
    total = total_counts([TagCounts(1, 2, 1), TagCounts(2, 2, 5), TagCounts(0, 0, 0)])
    precision, recall = 3 / 4, 3 / 6
    assert total.f1 == pytest.approx(2 * precision * recall / (precision + recall))
    assert total_counts([]).f1 == 0


def test_other_tags_are_scored_by_words():
    names = ["NOUN", "VERB"]
    assert count_tags([0, 1, 1, -100], [0, 0, -100, 1], names) == (1, 3, 3)
    assert count_tags([0, 1, 1], [0, 0, 1], names).f1 == pytest.approx(2 / 3)


def test_which_names_are_entities():
    assert are_entities(NAMES)
    assert are_entities(["I-PER", "O"])
    assert not are_entities(["O"])
    assert not are_entities(["O", "S-PER", "B-PER"])
    assert not are_entities(["NOUN", "O"])
    assert score_name(NAMES) == "F1"
    assert score_name(["NOUN", "VERB"]) == "accuracy"


def test_classes_of_sentences():
    assert sentence_classes(NAMES) == ["O", "LOC", "PER"]
    for tags, expected in (("O _", 0), ("B-PER I-PER B-LOC B-PER", 2), ("B-PER B-LOC", 1)):
        assert sentence_class(numbers(tags), NAMES) == expected
    assert sentence_classes(["NOUN", "VERB"]) == ["sentence"]
    assert sentence_class([0, 1], ["NOUN", "VERB"]) == 0
