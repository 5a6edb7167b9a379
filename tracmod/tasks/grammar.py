"""The built-in grammar task: items are drawn as meanings, then expressed in every language."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from tracmod.config import TaskConfig
from tracmod.tasks.examples import SPLITS, Corpus, Pool, pool_from_rows
from tracmod.tasks.languages import LANGUAGES
from tracmod.tasks.meaning import (
    ACTIONS,
    ASPECTS,
    DEEDS,
    OBJECTS,
    OPPOSITE,
    PEOPLE,
    PLACES,
    PRODUCTS,
    QUALITIES,
    TIMES,
    VERDICTS,
    Deed,
    Event,
    Person,
    Review,
    State,
)

Meaning = Event | State | Deed | Review
Item = tuple[Meaning, Meaning | None]  # the meanings of text_a and text_b
MAX_REPEATS = 1000  # draws of known items in a row after which the items count as exhausted
NLI_LABELS = ["entailment", "neutral", "contradiction"]
ENTAILMENT, NEUTRAL, CONTRADICTION = range(3)
HYPOTHESIS_WEIGHTS = (88, 12)  # hypotheses about a fact, about a quality
NEUTRAL_WEIGHTS = (75, 10, 15)  # neutral by another person, another time, another fact
PARAPHRASE_LABELS = ["different", "paraphrase"]
DIFFERENCE_WEIGHTS = (60, 20, 20)  # negation, exchanged roles, exchanged qualities
REVIEW_LABELS = ["1", "2", "3", "4", "5"]  # stars
GRADE_PAIRS = [(a, b) for a in range(-2, 3) for b in range(-2, 3)]


@dataclass(frozen=True)
class _Shape:
    """A kind of task.

    Attributes:
        label_names: the classes.
        parallel: whether all languages express the same items.
        draw: draws an item of a class.
    """

    label_names: list[str]
    parallel: bool
    draw: Callable[[random.Random, int], Item]


def load_grammar(config: TaskConfig) -> Corpus:
    """Generate as many items as the config needs; the same config gives the same items.

    Parallel shapes express the same items in every language, the others draw items per language.

    Raises:
        ValueError: an unknown language, or more examples than there are distinct items.
    """
    unknown = [language for language in config.languages if language not in LANGUAGES]
    if unknown:
        raise ValueError(
            f"task grammar: languages: expected some of {', '.join(LANGUAGES)}, "
            f"got {', '.join(unknown)}"
        )
    shape = _SHAPES[config.shape]
    table = pool_from_rows(
        {
            "id": f"{language}-{number}",
            "language": language,
            "text_a": _express(item[0], language),
            "text_b": None if item[1] is None else _express(item[1], language),
            "label": label,
            "group": str(number) if shape.parallel else None,
        }
        for language in config.languages
        for number, (item, label) in enumerate(_items(config, shape, language))
    )
    return Corpus(shape.label_names, shape.parallel, [Pool(table, SPLITS)])


def _items(config: TaskConfig, shape: _Shape, language: str) -> list[tuple[Item, int]]:
    """Return items with labels 0, 1, ... in turn, no two with the same first text."""
    num_labels = len(shape.label_names)
    most_train = max(map(config.train_count, config.languages))
    counts = (most_train, config.dev_per_language, config.test_per_language)
    needed = num_labels * sum(math.ceil(count / num_labels) for count in counts)
    source = "items" if shape.parallel else language
    rng = random.Random(f"{config.shape} {source} {config.seed}")
    items: dict[Meaning, tuple[Item, int]] = {}
    repeats = 0
    while len(items) < needed:
        label = len(items) % num_labels
        item = shape.draw(rng, label)
        repeats = repeats + 1 if item[0] in items else 0
        items.setdefault(item[0], (item, label))
        if repeats == MAX_REPEATS:
            raise ValueError(
                f"task grammar, shape {config.shape}: expected at most about {len(items)} items "
                f"per language for all splits, got {needed}: there are too few distinct items"
            )
    return list(items.values())


def _express(meaning: Meaning, language: str) -> str:
    """Return the text that expresses a meaning in a language."""
    grammar = LANGUAGES[language]
    match meaning:
        case Event():
            return grammar.event(meaning)
        case State():
            return grammar.state(meaning)
        case Deed():
            return grammar.deed(meaning)
        case Review():
            return grammar.review(meaning)


def _nli_item(rng: random.Random, label: int) -> Item:
    """Draw a premise about a person, and a hypothesis about a fact or a quality of that person.

    Neither text alone tells the label: given the premise alone, or the hypothesis alone, every
    label is equally likely.
    """
    person = Person(rng.choice(PEOPLE), rng.choice(QUALITIES), nephew=rng.random() < 0.5)
    draw = rng.choices((_item_about_fact, _item_about_quality), HYPOTHESIS_WEIGHTS)[0]
    return draw(rng, person, label)


def _item_about_fact(rng: random.Random, person: Person, label: int) -> Item:
    """Draw an item about a fact.

    If the hypothesis is about the fact of the premise, negation decides between entailment and
    contradiction. If it is about another person, time or fact, the label is neutral.
    """
    time = rng.choice(TIMES)
    premise = replace(_fact(rng), subject=person, time=time, negated=rng.random() < 0.5)
    claim = replace(premise, subject=replace(person, quality=None))
    if label != NEUTRAL:
        return premise, replace(claim, negated=premise.negated != (label == CONTRADICTION))
    match rng.choices(("person", "time", "fact"), NEUTRAL_WEIGHTS)[0]:
        case "person":
            claim = replace(claim, subject=Person(person.noun, nephew=not person.nephew))
        case "time":
            claim = replace(claim, time=TIMES[1 - TIMES.index(time)])
        case "fact":
            claim = replace(_fact(rng, unlike=premise), subject=claim.subject, time=time)
    return premise, replace(claim, negated=rng.random() < 0.5)


def _item_about_quality(rng: random.Random, person: Person, label: int) -> Item:
    """Draw an item about a quality: that of the premise, an unrelated one, or its opposite."""
    assert person.quality is not None
    opposite = OPPOSITE[person.quality]
    others = [quality for quality in QUALITIES if quality not in (person.quality, opposite)]
    claim = (person.quality, rng.choice(others), opposite)[label]
    premise = replace(_fact(rng), subject=person, negated=rng.random() < 0.5)
    return premise, State(replace(person, quality=None), quality=claim)


def _fact(rng: random.Random, unlike: Event | State | None = None) -> Event | State:
    """Draw what somebody does or where somebody is, or the kind of the two that `unlike` is not.

    The caller replaces the subject.
    """
    anybody = Person(PEOPLE[0])
    if isinstance(unlike, Event) or (unlike is None and rng.random() < 0.5):
        return State(anybody, place=rng.choice(PLACES))
    action = rng.choice(ACTIONS)
    return Event(anybody, action, rng.choice(OBJECTS[action]) if action in OBJECTS else None)


def _paraphrase_item(rng: random.Random, label: int) -> Item:
    """Draw two texts with or without the same meaning.

    In either case the time comes first in one text and last in the other.
    """
    subject, other = rng.sample(PEOPLE, 2)
    quality = rng.choice(QUALITIES)
    qualities = rng.choice([(quality, None), (None, quality)])
    deed = Deed(
        Person(subject, qualities[0]),
        rng.choice(DEEDS),
        Person(other, qualities[1]),
        rng.choice(TIMES),
        time_first=rng.random() < 0.5,
        negated=rng.random() < 0.5,
    )
    again = replace(deed, time_first=not deed.time_first)
    if PARAPHRASE_LABELS[label] == "paraphrase":
        return deed, again
    match rng.choices(("negation", "roles", "qualities"), DIFFERENCE_WEIGHTS)[0]:
        case "negation":
            again = replace(again, negated=not deed.negated)
        case "roles":
            again = replace(again, subject=deed.other, other=deed.subject)
        case "qualities":
            again = replace(
                again, subject=Person(subject, qualities[1]), other=Person(other, qualities[0])
            )
    return deed, again


def review_item(rng: random.Random, label: int) -> Item:
    """Draw a review with `label` + 1 stars, which follow from two verdicts, each from -2 to 2."""
    grades = rng.choice([pair for pair in GRADE_PAIRS if _stars(sum(pair)) == label])
    first, second = rng.sample(ASPECTS, 2)
    verdicts = (_verdict(rng, first, grades[0]), _verdict(rng, second, grades[1]))
    contrast = grades[0] * grades[1] < 0
    return Review(rng.choice(PRODUCTS), verdicts, contrast, rng.random() < 0.5), None


def _stars(total: int) -> int:
    """Return the label of a review from the sum of its verdicts."""
    return 2 + (total > 0) + (total > 2) - (total < 0) - (total < -2)


def _verdict(rng: random.Random, aspect: str, grade: int) -> tuple[str, str, bool]:
    """Return (aspect, verdict, strengthened) of a grade; "very good" is as good as "excellent"."""
    strengthened = abs(grade) == 2 and rng.random() < 0.5
    step = (1 if grade > 0 else -1) if strengthened else grade
    return aspect, rng.choice(VERDICTS[step + 2]), strengthened


_SHAPES = {
    "nli": _Shape(NLI_LABELS, True, _nli_item),
    "paraphrase": _Shape(PARAPHRASE_LABELS, True, _paraphrase_item),
    "reviews": _Shape(REVIEW_LABELS, False, review_item),
}
