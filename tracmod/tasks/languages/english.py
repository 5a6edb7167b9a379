"""English: progressive forms, negation with do."""

from __future__ import annotations

from tracmod.tasks.languages.base import Language, sentence
from tracmod.tasks.meaning import Deed, Event, Person, Review, State

ACTIONS = {
    "eat": "eating",
    "drink": "drinking",
    "read": "reading",
    "draw": "drawing",
    "cook": "cooking",
    "sleep": "sleeping",
    "work": "working",
    "sing": "singing",
    "dance": "dancing",
    "wait": "waiting",
}
DEEDS = {
    "see": ("sees", "see"),
    "hear": ("hears", "hear"),
    "greet": ("greets", "greet"),
    "seek": ("looks for", "look for"),
    "meet": ("meets", "meet"),
    "photograph": ("photographs", "photograph"),
}
PLACES = {
    "park": "in the park",
    "kitchen": "in the kitchen",
    "garden": "in the garden",
    "school": "at school",
    "library": "in the library",
    "station": "at the station",
    "market": "at the market",
    "hospital": "in the hospital",
}
TIMES = {"morning": "in the morning", "evening": "in the evening"}


class English(Language):
    """Subject, verb, object, place, time."""

    def event(self, event: Event) -> str:
        return sentence(
            _person(event.subject),
            "is",
            "not" if event.negated else None,
            ACTIONS[event.action],
            f"the {event.thing}" if event.thing else None,
            PLACES[event.place] if event.place else None,
            TIMES[event.time] if event.time else None,
        )

    def state(self, state: State) -> str:
        predicate = PLACES[state.place] if state.place else state.quality
        negation = "not" if state.negated else None
        time = TIMES[state.time] if state.time else None
        return sentence(_person(state.subject), "is", negation, predicate, time)

    def deed(self, deed: Deed) -> str:
        finite, base = DEEDS[deed.deed]
        verb = f"does not {base}" if deed.negated else finite
        clause = f"{_person(deed.subject)} {verb} {_person(deed.other)}"
        time = TIMES[deed.time]
        return sentence(f"{time},", clause) if deed.time_first else sentence(clause, time)

    def review(self, review: Review) -> str:
        first, second = (
            f"the {aspect} is {'very ' if strong else ''}{verdict}"
            for aspect, verdict, strong in review.verdicts
        )
        joint = ", but" if review.contrast else " and"
        return sentence("I bought this", review.product) + " " + sentence(first + joint, second)


def _person(person: Person) -> str:
    head = f"nephew of the {person.noun}" if person.nephew else person.noun
    return " ".join(part for part in ("the", person.quality, head) if part)
