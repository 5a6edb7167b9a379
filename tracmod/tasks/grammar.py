"""The embedded task: items drawn as meanings, then said in every language."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from tracmod.config import TaskConfig
from tracmod.tasks.examples import SPLITS, Corpus, Pool, pool_table
from tracmod.tasks.languages import LANGUAGES
from tracmod.tasks.meaning import (
    ACTIONS,
    KIND,
    OBJECTS,
    OPPOSITE,
    PEOPLE,
    PLACES,
    QUALITIES,
    TIMES,
    Deed,
    Event,
    Person,
    Review,
    State,
)

Meaning = Event | State | Deed | Review
Item = tuple[Meaning, Meaning | None]  # what text_a says, and text_b
NLI_LABELS = ["entailment", "neutral", "contradiction"]
ENTAILMENT, NEUTRAL, CONTRADICTION = range(3)
NEGATED_SHARE = 0.25


def load_grammar(config: TaskConfig) -> Corpus:
    """Make as many items as the config asks for; the same seed gives the same items."""
    unknown = [language for language in config.languages if language not in LANGUAGES]
    if unknown:
        raise ValueError(
            f"task grammar has no language {', '.join(unknown)}, only {', '.join(LANGUAGES)}"
        )
    rng = random.Random(config.seed)
    items = _distinct_items(_nli_item, len(NLI_LABELS), _per_class(config, len(NLI_LABELS)), rng)
    rows = [
        (f"{language}-{number}", language, *_texts(item, language), label, str(number))
        for language in config.languages
        for number, (item, label) in enumerate(items)
    ]
    names = ("id", "language", "text_a", "text_b", "label", "group")
    table = pool_table(**{n: list(v) for n, v in zip(names, zip(*rows, strict=True), strict=True)})
    return Corpus(NLI_LABELS, True, [Pool(table, SPLITS)])


def _per_class(config: TaskConfig, num_labels: int) -> int:
    wanted = (config.train_per_language, config.dev_per_language, config.test_per_language)
    return sum(math.ceil(count / num_labels) for count in wanted)


def _distinct_items(
    draw: Callable[[random.Random, int], Item], num_labels: int, per_class: int, rng: random.Random
) -> list[tuple[Item, int]]:
    """Items with labels 0, 1, ... in turn; no two with the same first text."""
    items: dict[Meaning, tuple[Item, int]] = {}
    wanted = num_labels * per_class
    for _ in range(50 * wanted):
        label = len(items) % num_labels
        item = draw(rng, label)
        items.setdefault(item[0], (item, label))
        if len(items) == wanted:
            return list(items.values())
    raise ValueError(
        f"task grammar: too few distinct items: wanted {wanted} for all splits, "
        f"available about {len(items)}"
    )


def _texts(item: Item, language: str) -> tuple[str | None, ...]:
    return tuple(None if meaning is None else _say(meaning, language) for meaning in item)


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
    action = rng.choice(ACTIONS)
    noun = rng.choice(PEOPLE)
    aspects = ["quality", "place", "time"] + (["thing"] if action in OBJECTS else [])
    aspect = rng.choice(aspects)
    others = [other for other in aspects if other != aspect]
    told = rng.sample(others, 2) if label == NEUTRAL else [aspect, rng.choice(others)]
    facts = {name: rng.choice(_values(name, action)) for name in told}
    negated = aspect in ("quality", "place") and rng.random() < NEGATED_SHARE
    if aspect not in facts:
        claim = rng.choice(_claims(aspect, action))
    else:
        claim = _claim(rng, aspect, action, facts[aspect], (label == ENTAILMENT) != negated)
    premise = Event(
        Person(noun, facts.get("quality")),
        action,
        facts.get("thing"),
        facts.get("place"),
        facts.get("time"),
    )
    person = Person(noun)
    match aspect:
        case "quality":
            return premise, State(person, quality=claim, negated=negated)
        case "place":
            return premise, State(person, place=claim, negated=negated)
        case "time":
            return premise, Event(person, action, time=claim)
    return premise, Event(person, action, thing=claim)


def _values(aspect: str, action: str) -> tuple[str, ...]:
    values = {"quality": QUALITIES, "place": PLACES, "time": TIMES}
    return values.get(aspect, OBJECTS.get(action, ()))


def _claims(aspect: str, action: str) -> tuple[str, ...]:
    values = _values(aspect, action)
    if aspect != "thing":
        return values
    return values + tuple(dict.fromkeys(KIND[value] for value in values if value in KIND))


def _claim(rng: random.Random, aspect: str, action: str, fact: str, true: bool) -> str:
    if aspect == "quality":
        return fact if true else OPPOSITE[fact]
    implied = [fact, KIND.get(fact)]
    return rng.choice([c for c in _claims(aspect, action) if (c in implied) == true])
