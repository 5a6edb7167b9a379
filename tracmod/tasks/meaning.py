"""Meanings of the grammar task: its concepts, and the facts that languages express."""

from __future__ import annotations

from dataclasses import dataclass

PEOPLE = (
    "man",
    "woman",
    "boy",
    "girl",
    "teacher",
    "doctor",
    "farmer",
    "nurse",
    "king",
    "queen",
    "singer",
    "neighbour",
)
# Pairs of opposite qualities.
SCALES = (("rich", "poor"), ("happy", "sad"), ("strong", "weak"), ("tall", "short"))
OPPOSITE = {a: b for low, high in SCALES for a, b in ((low, high), (high, low))}
QUALITIES = tuple(OPPOSITE)
PLACES = ("park", "kitchen", "garden", "school", "library", "station", "market", "hospital")
TIMES = ("morning", "evening")
# Objects of each transitive action.
OBJECTS = {
    "eat": ("apple", "pear", "carrot", "onion"),
    "drink": ("tea", "coffee", "water", "milk"),
    "read": ("book", "newspaper", "letter", "poem"),
    "draw": ("dog", "cat", "tree", "flower"),
    "cook": ("soup", "fish", "rice"),
}
THINGS = tuple(dict.fromkeys([thing for things in OBJECTS.values() for thing in things]))
INTRANSITIVE = ("sleep", "work", "sing", "dance", "wait")
ACTIONS = (*OBJECTS, *INTRANSITIVE)
# What a person can do to another person.
DEEDS = ("see", "hear", "greet", "seek", "meet", "photograph")

PRODUCTS = ("lamp", "book", "bag", "phone", "clock", "chair", "camera", "coat", "table", "shirt")
ASPECTS = ("quality", "price", "material", "design", "colour", "packaging", "delivery", "size")
# Verdicts from worst to best, two words for each grade.
VERDICTS = (
    ("terrible", "horrible"),
    ("bad", "disappointing"),
    ("acceptable", "normal"),
    ("good", "nice"),
    ("excellent", "perfect"),
)


@dataclass(frozen=True)
class Person:
    """A definite person, with or without a quality: "the rich king", "the nephew of the king"."""

    noun: str
    quality: str | None = None
    nephew: bool = False  # the nephew of that person, who then has the quality


@dataclass(frozen=True)
class Event:
    """Someone does something, or not: "The king is not reading the letter in the evening"."""

    subject: Person
    action: str
    thing: str | None = None
    place: str | None = None
    time: str | None = None
    negated: bool = False


@dataclass(frozen=True)
class State:
    """Someone has a quality or is in a place, or not: "The king is in the park"."""

    subject: Person
    quality: str | None = None
    place: str | None = None
    time: str | None = None
    negated: bool = False


@dataclass(frozen=True)
class Deed:
    """Someone does something to someone, or not: "In the morning the king meets the nurse"."""

    subject: Person
    deed: str
    other: Person
    time: str
    time_first: bool
    negated: bool


@dataclass(frozen=True)
class Review:
    """A product that was bought, and two verdicts: (aspect, verdict, strengthened by "very")."""

    product: str
    verdicts: tuple[tuple[str, str, bool], tuple[str, str, bool]]
    contrast: bool
    buyer_is_woman: bool
