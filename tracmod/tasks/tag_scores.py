"""How well predicted tags of words agree with the true ones: F1 of entities, or accuracy.

Tags of named entities are in the form BIO: B-PER begins an entity of the type PER, I-PER continues
it, O is outside. Their score is F1 over entities, of which both borders and the type have to be
right. Other tags, such as parts of speech, are scored by the share of words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

UNTAGGED, OUTSIDE = -100, "O"


class TagCounts(NamedTuple):
    """Entities, or words, by which tags are scored.

    Attributes:
        right: number that is predicted and true.
        predicted: number that is predicted.
        true: number that is true.
    """

    right: int
    predicted: int
    true: int

    @property
    def f1(self) -> float:
        """2 right / (predicted + true), the accuracy if both are all words; 0 if there are none."""
        return 2 * self.right / max(1, self.predicted + self.true)


def are_entities(names: Sequence[str]) -> bool:
    """Return whether tags have the form BIO: all are O, B-X or I-X, and an entity can begin."""
    forms = [re.fullmatch(r"O|[BI]-.+", name) for name in names]
    return all(forms) and any(name != OUTSIDE for name in names)


def score_name(names: Sequence[str]) -> str:
    """Return the name of the score of tags with these names."""
    return "F1" if are_entities(names) else "accuracy"


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return the entities of a sentence: type, first word, and the word behind the last one.

    I-X begins an entity if no X is before it, as in the form IOB1 and in the scorer of CoNLL.

    Args:
        tags: O, B-X or I-X for each word.
    """
    spans, kind, start = set(), "", 0
    for position, tag in enumerate([*tags, OUTSIDE]):
        prefix, _, own_kind = tag.partition("-")
        if kind and (prefix != "I" or own_kind != kind):
            spans.add((kind, start, position))
            kind = ""
        if own_kind and not kind:
            kind, start = own_kind, position
    return spans


def count_tags(predicted: Sequence[int], true: Sequence[int], names: Sequence[str]) -> TagCounts:
    """Count what is predicted and true in a sentence.

    Words without a true tag are left out. A word without a prediction (it was cut off) counts as
    outside of entities, or as wrong.

    Args:
        predicted, true: the number of each word's tag, -100 for none.
        names: the names of the tags.
    """
    pairs = [(a, b) for a, b in zip(predicted, true, strict=True) if b != UNTAGGED]
    if not are_entities(names):
        right = sum(a == b for a, b in pairs)
        return TagCounts(right, len(pairs), len(pairs))
    found = entities([OUTSIDE if a == UNTAGGED else names[a] for a, _ in pairs])
    wanted = entities([names[b] for _, b in pairs])
    return TagCounts(len(found & wanted), len(found), len(wanted))


def total_counts(counts: Iterable[TagCounts]) -> TagCounts:
    """Return the sums over sentences."""
    columns = list(zip(*counts, strict=True)) or [(), (), ()]
    return TagCounts(*map(sum, columns))


def sentence_classes(names: Sequence[str]) -> list[str]:
    """Return the names of the classes of whole sentences: O and the types of entities.

    Sentences of tags that are no entities have one class.
    """
    if not are_entities(names):
        return ["sentence"]
    return [OUTSIDE, *sorted({name.partition("-")[2] for name in names if name != OUTSIDE})]


def sentence_class(tags: Sequence[int], names: Sequence[str]) -> int:
    """Return the class of a sentence: the type that most of its entities have, or O.

    Of types with equally many, it is the first in the order of the alphabet.

    Args:
        tags: the number of each word's tag, -100 for none.
        names: the names of the tags.
    """
    classes = sentence_classes(names)
    if not are_entities(names):
        return 0
    known = [OUTSIDE if tag == UNTAGGED else names[tag] for tag in tags]
    counts = Counter(kind for kind, _, _ in entities(known))
    if not counts:
        return 0
    return classes.index(min(counts, key=lambda kind: (-counts[kind], kind)))
