"""Spanish: agreement in gender, ser and estar, the personal a, al and del."""

from __future__ import annotations

from tracmod.tasks.languages.base import Language, sentence
from tracmod.tasks.meaning import Deed, Event, Person, Review, State

PEOPLE = {
    "man": ("hombre", "m"),
    "woman": ("mujer", "f"),
    "boy": ("niño", "m"),
    "girl": ("niña", "f"),
    "teacher": ("profesor", "m"),
    "doctor": ("médico", "m"),
    "farmer": ("granjero", "m"),
    "nurse": ("enfermera", "f"),
    "king": ("rey", "m"),
    "queen": ("reina", "f"),
    "singer": ("cantante", "f"),
    "neighbour": ("vecino", "m"),
}
# masculine form, and which verb "to be" it takes; -o becomes -a in the feminine
QUALITIES = {
    "rich": ("rico", "es"),
    "poor": ("pobre", "es"),
    "happy": ("contento", "está"),
    "sad": ("triste", "está"),
    "strong": ("fuerte", "es"),
    "weak": ("débil", "es"),
    "tall": ("alto", "es"),
    "short": ("bajo", "es"),
}
ACTIONS = {
    "eat": "come",
    "drink": "bebe",
    "read": "lee",
    "draw": "dibuja",
    "cook": "cocina",
    "sleep": "duerme",
    "work": "trabaja",
    "sing": "canta",
    "dance": "baila",
    "wait": "espera",
}
DEEDS = {
    "see": "ve",
    "hear": "oye",
    "greet": "saluda",
    "seek": "busca",
    "meet": "encuentra",
    "photograph": "fotografía",
}
THINGS = {
    "apple": ("manzana", "f"),
    "pear": ("pera", "f"),
    "carrot": ("zanahoria", "f"),
    "onion": ("cebolla", "f"),
    "tea": ("té", "m"),
    "coffee": ("café", "m"),
    "water": ("agua", "f"),
    "milk": ("leche", "f"),
    "book": ("libro", "m"),
    "newspaper": ("periódico", "m"),
    "letter": ("carta", "f"),
    "poem": ("poema", "m"),
    "dog": ("perro", "m"),
    "cat": ("gato", "m"),
    "tree": ("árbol", "m"),
    "flower": ("flor", "f"),
    "soup": ("sopa", "f"),
    "fish": ("pescado", "m"),
    "rice": ("arroz", "m"),
}
PLACES = {
    "park": ("parque", "m"),
    "kitchen": ("cocina", "f"),
    "garden": ("jardín", "m"),
    "school": ("escuela", "f"),
    "library": ("biblioteca", "f"),
    "station": ("estación", "f"),
    "market": ("mercado", "m"),
    "hospital": ("hospital", "m"),
}
TIMES = {"morning": "por la mañana", "evening": "por la noche"}
PRODUCTS = {
    "lamp": ("lámpara", "f"),
    "book": ("libro", "m"),
    "bag": ("bolsa", "f"),
    "phone": ("teléfono", "m"),
    "clock": ("reloj", "m"),
    "chair": ("silla", "f"),
    "camera": ("cámara", "f"),
    "coat": ("abrigo", "m"),
    "table": ("mesa", "f"),
    "shirt": ("camisa", "f"),
}
ASPECTS = {
    "quality": ("calidad", "f"),
    "price": ("precio", "m"),
    "material": ("material", "m"),
    "design": ("diseño", "m"),
    "colour": ("color", "m"),
    "packaging": ("embalaje", "m"),
    "delivery": ("entrega", "f"),
    "size": ("tamaño", "m"),
}
VERDICTS = {
    "terrible": "terrible",
    "horrible": "horrible",
    "bad": "malo",
    "disappointing": "decepcionante",
    "acceptable": "aceptable",
    "normal": "normal",
    "good": "bueno",
    "nice": "bonito",
    "excellent": "excelente",
    "perfect": "perfecto",
}
DEFINITE = {"m": "el", "f": "la"}
THIS = {"m": "este", "f": "esta"}


class Spanish(Language):
    """Subject, verb, object, place, time; qualities follow their noun."""

    def event(self, event: Event) -> str:
        return sentence(
            _person(event.subject),
            "no" if event.negated else None,
            ACTIONS[event.action],
            _thing(event.thing) if event.thing else None,
            _place(event.place) if event.place else None,
            TIMES[event.time] if event.time else None,
        )

    def state(self, state: State) -> str:
        if state.place:
            copula, predicate = "está", _place(state.place)
        else:
            masculine, copula = QUALITIES[state.quality or ""]
            predicate = _agree(masculine, _gender(state.subject))
        negation = "no" if state.negated else None
        time = TIMES[state.time] if state.time else None
        return sentence(_person(state.subject), negation, copula, predicate, time)

    def deed(self, deed: Deed) -> str:
        other = _contract("a", _person(deed.other))
        verb = f"no {DEEDS[deed.deed]}" if deed.negated else DEEDS[deed.deed]
        clause = f"{_person(deed.subject)} {verb} {other}"
        time = TIMES[deed.time]
        return sentence(f"{time},", clause) if deed.time_first else sentence(clause, time)

    def review(self, review: Review) -> str:
        noun, gender = PRODUCTS[review.product]
        clauses = []
        for aspect, verdict, strong in review.verdicts:
            name, aspect_gender = ASPECTS[aspect]
            word = _agree(VERDICTS[verdict], aspect_gender)
            very = "muy " if strong else ""
            clauses.append(f"{DEFINITE[aspect_gender]} {name} es {very}{word}")
        joint = ", pero" if review.contrast else " y"
        bought = sentence("compré", THIS[gender], noun)
        return bought + " " + sentence(clauses[0] + joint, clauses[1])


def _gender(person: Person) -> str:
    return "m" if person.nephew else PEOPLE[person.noun][1]


def _agree(masculine: str, gender: str) -> str:
    return masculine[:-1] + "a" if gender == "f" and masculine.endswith("o") else masculine


def _person(person: Person) -> str:
    noun, gender = PEOPLE[person.noun]
    owner = ""
    if person.nephew:
        owner = _contract("de", f"{DEFINITE[gender]} {noun}")
        noun, gender = "sobrino", "m"
    quality = _agree(QUALITIES[person.quality][0], gender) if person.quality else ""
    return " ".join(part for part in (DEFINITE[gender], noun, quality, owner) if part)


def _contract(preposition: str, phrase: str) -> str:
    """Join preposition and phrase: a + el = al, de + el = del."""
    if phrase.startswith("el "):
        return f"{preposition}l {phrase.removeprefix('el ')}"
    return f"{preposition} {phrase}"


def _thing(thing: str) -> str:
    noun, gender = THINGS[thing]
    # Feminine nouns that begin with a stressed a- take el: el agua.
    return f"{'el' if noun == 'agua' else DEFINITE[gender]} {noun}"


def _place(place: str) -> str:
    noun, gender = PLACES[place]
    return f"en {DEFINITE[gender]} {noun}"
