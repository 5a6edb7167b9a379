"""What the embedded task can say: concepts, and the facts that every language puts into words."""

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
# Each pair is one scale with two opposite ends.
SCALES = (("rich", "poor"), ("happy", "sad"), ("strong", "weak"), ("tall", "short"))
OPPOSITE = {a: b for low, high in SCALES for a, b in ((low, high), (high, low))}
QUALITIES = tuple(OPPOSITE)
PLACES = ("park", "kitchen", "garden", "school", "library", "station", "market", "hospital")
TIMES = ("morning", "evening")
# What an action is done to; the others are done to nothing.
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
# What one person can do to another.
DEEDS = ("see", "hear", "greet", "seek", "meet", "photograph")

PRODUCTS = ("lamp", "book", "bag", "phone", "clock", "chair", "camera", "coat", "table", "shirt")
ASPECTS = ("quality", "price", "material", "design", "colour", "packaging", "delivery", "size")
# Verdicts from worst to best; two words for each grade.
VERDICTS = (
    ("terrible", "horrible"),
    ("bad", "disappointing"),
    ("acceptable", "normal"),
    ("good", "nice"),
    ("excellent", "perfect"),
)


@dataclass(frozen=True)
class Person:
    """Somebody definite, perhaps with a quality: "the rich king", "the rich nephew of the king"."""

    noun: str
    quality: str | None = None
    nephew: bool = False  # the noun's nephew, and the quality is his


@dataclass(frozen=True)
class Event:
    """Somebody does something, or not: "The rich king is not reading the letter at night"."""

    subject: Person
    action: str
    thing: str | None = None
    place: str | None = None
    time: str | None = None
    negated: bool = False


@dataclass(frozen=True)
class State:
    """Somebody is or is not so, or there: "The king is not rich", "The king is in the park"."""

    subject: Person
    quality: str | None = None
    place: str | None = None
    time: str | None = None
    negated: bool = False


@dataclass(frozen=True)
class Deed:
    """Somebody does something to somebody, or not: "In the morning the king meets the nurse"."""

    subject: Person
    deed: str
    other: Person
    time: str
    time_first: bool
    negated: bool


@dataclass(frozen=True)
class Review:
    """A bought product and two verdicts on aspects of it, each (aspect, verdict, strengthened)."""

    product: str
    verdicts: tuple[tuple[str, str, bool], tuple[str, str, bool]]
    contrast: bool
    buyer_is_woman: bool
