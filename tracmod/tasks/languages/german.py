"""German: verb second, four cases, three genders, contractions such as im."""

from __future__ import annotations

from tracmod.tasks.languages.base import Language, sentence
from tracmod.tasks.meaning import Deed, Event, Person, Review, State

# noun, gender, and for weak masculines the form with -n or -en of the accusative
PEOPLE = {
    "man": ("Mann", "m"),
    "woman": ("Frau", "f"),
    "boy": ("Junge", "m", "Jungen"),
    "girl": ("Mädchen", "n"),
    "teacher": ("Lehrer", "m"),
    "doctor": ("Arzt", "m"),
    "farmer": ("Bauer", "m", "Bauern"),
    "nurse": ("Krankenschwester", "f"),
    "king": ("König", "m"),
    "queen": ("Königin", "f"),
    "singer": ("Sängerin", "f"),
    "neighbour": ("Nachbar", "m", "Nachbarn"),
}
QUALITIES = {
    "rich": "reich",
    "poor": "arm",
    "happy": "glücklich",
    "sad": "traurig",
    "strong": "stark",
    "weak": "schwach",
    "tall": "groß",
    "short": "klein",
}
ACTIONS = {
    "eat": "isst",
    "drink": "trinkt",
    "read": "liest",
    "draw": "zeichnet",
    "cook": "kocht",
    "sleep": "schläft",
    "work": "arbeitet",
    "sing": "singt",
    "dance": "tanzt",
    "wait": "wartet",
}
DEEDS = {
    "see": "sieht",
    "hear": "hört",
    "greet": "grüßt",
    "seek": "sucht",
    "meet": "trifft",
    "photograph": "fotografiert",
}
THINGS = {
    "apple": ("Apfel", "m"),
    "pear": ("Birne", "f"),
    "carrot": ("Karotte", "f"),
    "onion": ("Zwiebel", "f"),
    "tea": ("Tee", "m"),
    "coffee": ("Kaffee", "m"),
    "water": ("Wasser", "n"),
    "milk": ("Milch", "f"),
    "book": ("Buch", "n"),
    "newspaper": ("Zeitung", "f"),
    "letter": ("Brief", "m"),
    "poem": ("Gedicht", "n"),
    "dog": ("Hund", "m"),
    "cat": ("Katze", "f"),
    "tree": ("Baum", "m"),
    "flower": ("Blume", "f"),
    "soup": ("Suppe", "f"),
    "fish": ("Fisch", "m"),
    "rice": ("Reis", "m"),
}
# preposition with the dative, noun, gender
PLACES = {
    "park": ("in", "Park", "m"),
    "kitchen": ("in", "Küche", "f"),
    "garden": ("in", "Garten", "m"),
    "school": ("in", "Schule", "f"),
    "library": ("in", "Bibliothek", "f"),
    "station": ("an", "Bahnhof", "m"),
    "market": ("auf", "Markt", "m"),
    "hospital": ("in", "Krankenhaus", "n"),
}
TIMES = {"morning": "am Morgen", "evening": "am Abend"}
PRODUCTS = {
    "lamp": ("Lampe", "f"),
    "book": ("Buch", "n"),
    "bag": ("Tasche", "f"),
    "phone": ("Telefon", "n"),
    "clock": ("Uhr", "f"),
    "chair": ("Stuhl", "m"),
    "camera": ("Kamera", "f"),
    "coat": ("Mantel", "m"),
    "table": ("Tisch", "m"),
    "shirt": ("Hemd", "n"),
}
ASPECTS = {
    "quality": "die Qualität",
    "price": "der Preis",
    "material": "das Material",
    "design": "das Design",
    "colour": "die Farbe",
    "packaging": "die Verpackung",
    "delivery": "die Lieferung",
    "size": "die Größe",
}
VERDICTS = {
    "terrible": "schrecklich",
    "horrible": "furchtbar",
    "bad": "schlecht",
    "disappointing": "enttäuschend",
    "acceptable": "akzeptabel",
    "normal": "normal",
    "good": "gut",
    "nice": "schön",
    "excellent": "ausgezeichnet",
    "perfect": "perfekt",
}
DEFINITE = {"m": "der", "f": "die", "n": "das"}
ACCUSATIVE = {"m": "den", "f": "die", "n": "das"}
DATIVE = {"m": "dem", "f": "der", "n": "dem"}
THIS_ACCUSATIVE = {"m": "diesen", "f": "diese", "n": "dieses"}
LONG_GENITIVES = {"Mann", "Arzt"}
CONTRACTIONS = {"in dem": "im", "an dem": "am"}


class German(Language):
    """Finite verb in second position, then time, object, nicht and place."""

    def event(self, event: Event) -> str:
        return sentence(
            _nominative(event.subject),
            ACTIONS[event.action],
            TIMES[event.time] if event.time else None,
            _thing(event.thing) if event.thing else None,
            "nicht" if event.negated else None,
            _place(event.place) if event.place else None,
        )

    def state(self, state: State) -> str:
        predicate = _place(state.place) if state.place else QUALITIES[state.quality or ""]
        negation = "nicht" if state.negated else None
        time = TIMES[state.time] if state.time else None
        return sentence(_nominative(state.subject), "ist", time, negation, predicate)

    def deed(self, deed: Deed) -> str:
        subject, other = _nominative(deed.subject), _accusative(deed.other)
        verb, time = DEEDS[deed.deed], TIMES[deed.time]
        negation = "nicht" if deed.negated else None
        if deed.time_first:
            return sentence(time, verb, subject, other, negation)
        return sentence(subject, verb, time, other, negation)

    def review(self, review: Review) -> str:
        noun, gender = PRODUCTS[review.product]
        first, second = (
            f"{ASPECTS[aspect]} ist {'sehr ' if strong else ''}{VERDICTS[verdict]}"
            for aspect, verdict, strong in review.verdicts
        )
        joint = ", aber" if review.contrast else " und"
        bought = sentence("ich habe", THIS_ACCUSATIVE[gender], noun, "gekauft")
        return bought + " " + sentence(first + joint, second)


def _nominative(person: Person) -> str:
    noun, gender = PEOPLE[person.noun][:2]
    if person.nephew:
        noun, gender = f"Neffe {_genitive(person.noun)}", "m"
    quality = f"{QUALITIES[person.quality]}e" if person.quality else ""
    return " ".join(part for part in (DEFINITE[gender], quality, noun) if part)


def _genitive(person: str) -> str:
    noun, gender, *weak = PEOPLE[person]
    if gender == "f":
        return f"der {noun}"
    if weak:
        return f"des {weak[0]}"
    return f"des {noun}{'es' if noun in LONG_GENITIVES else 's'}"


def _accusative(person: Person) -> str:
    assert not person.nephew
    nominative, gender, *weak = PEOPLE[person.noun]
    ending = "en" if gender == "m" else "e"
    quality = QUALITIES[person.quality] + ending if person.quality else ""
    noun = weak[0] if weak else nominative
    return " ".join(part for part in (ACCUSATIVE[gender], quality, noun) if part)


def _thing(thing: str) -> str:
    noun, gender = THINGS[thing]
    return f"{ACCUSATIVE[gender]} {noun}"


def _place(place: str) -> str:
    preposition, noun, gender = PLACES[place]
    head = f"{preposition} {DATIVE[gender]}"
    return f"{CONTRACTIONS.get(head, head)} {noun}"
