"""The embedded task: items drawn as meanings, then said in every language."""

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
Item = tuple[Meaning, Meaning | None]  # what text_a says, and text_b
MISSES = 1000  # draws in a row that bring nothing new, and the items count as used up
NLI_LABELS = ["entailment", "neutral", "contradiction"]
ENTAILMENT, NEUTRAL, CONTRADICTION = range(3)
NLI_WEIGHTS = (88, 12)  # of hypotheses about a fact, about a quality
OTHER_WEIGHTS = (75, 10, 15)  # of another person, time or fact among what is neutral
PARAPHRASE_LABELS = ["different", "paraphrase"]
DIFFERENCE_WEIGHTS = (60, 20, 20)  # of negation, exchanged roles, exchanged qualities
REVIEW_LABELS = ["1", "2", "3", "4", "5"]  # stars
GRADE_PAIRS = [(a, b) for a in range(-2, 3) for b in range(-2, 3)]


@dataclass(frozen=True)
class _Shape:
    """One kind of task: its classes, and how an item with a given class is drawn."""

    label_names: list[str]
    parallel: bool
    draw: Callable[[random.Random, int], Item]


def load_grammar(config: TaskConfig) -> Corpus:
    """Make as many items as the config asks for; the same config gives the same items.

    Parallel shapes say the same items in every language, the others draw items for each.

    Raises:
        ValueError: an unknown language, or more examples than there are distinct items.
    """
    unknown = [language for language in config.languages if language not in LANGUAGES]
    if unknown:
        raise ValueError(
            f"task grammar has no language {', '.join(unknown)}, only {', '.join(LANGUAGES)}"
        )
    shape = _SHAPES[config.shape]
    table = pool_from_rows(
        {
            "id": f"{language}-{number}",
            "language": language,
            "text_a": _say(item[0], language),
            "text_b": None if item[1] is None else _say(item[1], language),
            "label": label,
            "group": str(number) if shape.parallel else None,
        }
        for language in config.languages
        for number, (item, label) in enumerate(_items(config, shape, language))
    )
    return Corpus(shape.label_names, shape.parallel, [Pool(table, SPLITS)])


def _items(config: TaskConfig, shape: _Shape, language: str) -> list[tuple[Item, int]]:
    """Items with labels 0, 1, ... in turn; no two with the same first text."""
    num_labels = len(shape.label_names)
    most_train = max(map(config.train_count, config.languages))
    counts = (most_train, config.dev_per_language, config.test_per_language)
    wanted = num_labels * sum(math.ceil(count / num_labels) for count in counts)
    source = "items" if shape.parallel else language
    rng = random.Random(f"{config.shape} {source} {config.seed}")
    items: dict[Meaning, tuple[Item, int]] = {}
    misses = 0
    while len(items) < wanted:
        label = len(items) % num_labels
        item = shape.draw(rng, label)
        misses = misses + 1 if item[0] in items else 0
        items.setdefault(item[0], (item, label))
        if misses == MISSES:
            raise ValueError(
                f"task grammar, shape {config.shape}: too few distinct items per language: "
                f"wanted {wanted} for all splits, available about {len(items)}"
            )
    return list(items.values())


def _say(meaning: Meaning, language: str) -> str:
    speaker = LANGUAGES[language]
    match meaning:
        case Event():
            return speaker.event(meaning)
        case State():
            return speaker.state(meaning)
        case Deed():
            return speaker.deed(meaning)
        case Review():
            return speaker.review(meaning)


def _nli_item(rng: random.Random, label: int) -> Item:
    """A premise on one person, and a hypothesis on what it says, or does not say.

    Every label is as likely given the hypothesis alone, and given the premise alone.
    """
    person = Person(rng.choice(PEOPLE), rng.choice(QUALITIES), nephew=rng.random() < 0.5)
    about = rng.choices((_about_fact, _about_quality), NLI_WEIGHTS)[0]
    return about(rng, person, label)


def _about_fact(rng: random.Random, person: Person, label: int) -> Item:
    """Of one fact, negation decides; of another person, time or fact, nothing is told."""
    time = rng.choice(TIMES)
    premise = replace(_fact(rng), subject=person, time=time, negated=rng.random() < 0.5)
    claim = replace(premise, subject=replace(person, quality=None))
    if label != NEUTRAL:
        return premise, replace(claim, negated=premise.negated != (label == CONTRADICTION))
    match rng.choices(("person", "time", "fact"), OTHER_WEIGHTS)[0]:
        case "person":
            claim = replace(claim, subject=Person(person.noun, nephew=not person.nephew))
        case "time":
            claim = replace(claim, time=TIMES[1 - TIMES.index(time)])
        case "fact":
            claim = replace(_fact(rng, but=premise), subject=claim.subject, time=time)
    return premise, replace(claim, negated=rng.random() < 0.5)


def _about_quality(rng: random.Random, person: Person, label: int) -> Item:
    """The same quality, its opposite, or one of which nothing is told."""
    assert person.quality is not None
    opposite = OPPOSITE[person.quality]
    others = [quality for quality in QUALITIES if quality not in (person.quality, opposite)]
    claim = (person.quality, rng.choice(others), opposite)[label]
    premise = replace(_fact(rng), subject=person, negated=rng.random() < 0.5)
    return premise, State(replace(person, quality=None), quality=claim)


def _fact(rng: random.Random, but: Event | State | None = None) -> Event | State:
    """What somebody does or where somebody is, as likely; if `but` is one, then the other."""
    nobody = Person(PEOPLE[0])
    if isinstance(but, Event) or (but is None and rng.random() < 0.5):
        return State(nobody, place=rng.choice(PLACES))
    action = rng.choice(ACTIONS)
    return Event(nobody, action, rng.choice(OBJECTS[action]) if action in OBJECTS else None)


def _paraphrase_item(rng: random.Random, label: int) -> Item:
    """The time stands first in one text and last in the other, whether or not they say the same."""
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
    change = rng.choices((_other_truth, _other_roles, _other_qualities), DIFFERENCE_WEIGHTS)[0]
    return deed, change(again)


def _other_truth(deed: Deed) -> Deed:
    return replace(deed, negated=not deed.negated)


def _other_roles(deed: Deed) -> Deed:
    return replace(deed, subject=deed.other, other=deed.subject)


def _other_qualities(deed: Deed) -> Deed:
    subject, other = deed.subject, deed.other
    return replace(
        deed,
        subject=Person(subject.noun, other.quality),
        other=Person(other.noun, subject.quality),
    )


def review_item(rng: random.Random, label: int) -> Item:
    """The stars follow from the sum of two verdicts, each from -2 to 2."""
    grades = rng.choice([pair for pair in GRADE_PAIRS if _stars(sum(pair)) == label])
    first, second = rng.sample(ASPECTS, 2)
    verdicts = (_verdict(rng, first, grades[0]), _verdict(rng, second, grades[1]))
    contrast = grades[0] * grades[1] < 0
    return Review(rng.choice(PRODUCTS), verdicts, contrast, rng.random() < 0.5), None


def _stars(total: int) -> int:
    return 2 + (total > 0) + (total > 2) - (total < 0) - (total < -2)


def _verdict(rng: random.Random, aspect: str, grade: int) -> tuple[str, str, bool]:
    """(aspect, verdict, strengthened): "very good" is as good as "excellent"."""
    strengthened = abs(grade) == 2 and rng.random() < 0.5
    step = (1 if grade > 0 else -1) if strengthened else grade
    return aspect, rng.choice(VERDICTS[step + 2]), strengthened


_SHAPES = {
    "nli": _Shape(NLI_LABELS, True, _nli_item),
    "paraphrase": _Shape(PARAPHRASE_LABELS, True, _paraphrase_item),
    "reviews": _Shape(REVIEW_LABELS, False, review_item),
}
