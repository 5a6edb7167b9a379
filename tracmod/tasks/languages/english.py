"""English: a or an, do and be."""

from __future__ import annotations

from tracmod.tasks.languages.base import Language, sentence
from tracmod.tasks.meaning import Deed, Event, Person, Review, State

ACTIONS = {
    "eat": "eats",
    "drink": "drinks",
    "read": "reads",
    "draw": "draws",
    "cook": "cooks",
    "sleep": "sleeps",
    "work": "works",
    "sing": "sings",
    "dance": "dances",
    "wait": "waits",
}
DEEDS = {
    "see": "sees",
    "hear": "hears",
    "greet": "greets",
    "seek": "looks for",
    "meet": "meets",
    "photograph": "photographs",
}
MASS = {"tea", "coffee", "water", "milk", "soup", "fish", "rice", "fruit"}
THINGS = {"vegetable": "vegetables"}  # said in the plural; the others are their own names
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
TIMES = {
    "morning": "in the morning",
    "noon": "at noon",
    "afternoon": "in the afternoon",
    "night": "at night",
}


class English(Language):
    """Subject, verb, object, place, time."""

    def event(self, event: Event) -> str:
        return sentence(
            _person(event.subject),
            ACTIONS[event.action],
            _thing(event.thing) if event.thing else None,
            PLACES[event.place] if event.place else None,
            TIMES[event.time] if event.time else None,
        )

    def state(self, state: State) -> str:
        predicate = PLACES[state.place] if state.place else state.quality
        return sentence(_person(state.subject), "is", "not" if state.negated else None, predicate)

    def deed(self, deed: Deed) -> str:
        clause = f"{_person(deed.subject)} {DEEDS[deed.deed]} {_person(deed.other)}"
        place = PLACES[deed.place]
        return sentence(f"{place},", clause) if deed.place_first else sentence(clause, place)

    def review(self, review: Review) -> str:
        first, second = (
            f"the {aspect} is {'very ' if strong else ''}{verdict}"
            for aspect, verdict, strong in review.verdicts
        )
        joint = ", but" if review.contrast else " and"
        return sentence("I bought this", review.product) + " " + sentence(first + joint, second)


def _person(person: Person) -> str:
    return " ".join(part for part in ("the", person.quality, person.noun) if part)


def _thing(thing: str) -> str:
    if thing in MASS or thing in THINGS:
        return THINGS.get(thing, thing)
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
