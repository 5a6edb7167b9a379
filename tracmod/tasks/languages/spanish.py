"""Spanish: agreement in gender, ser and estar, the personal a, a + el = al."""

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
# noun, gender; "-" is a mass noun, said without an article.
THINGS = {
    "apple": ("manzana", "f"),
    "pear": ("pera", "f"),
    "carrot": ("zanahoria", "f"),
    "onion": ("cebolla", "f"),
    "fruit": ("fruta", "-"),
    "vegetable": ("verdura", "-"),
    "tea": ("té", "-"),
    "coffee": ("café", "-"),
    "water": ("agua", "-"),
    "milk": ("leche", "-"),
    "book": ("libro", "m"),
    "newspaper": ("periódico", "m"),
    "letter": ("carta", "f"),
    "poem": ("poema", "m"),
    "dog": ("perro", "m"),
    "cat": ("gato", "m"),
    "tree": ("árbol", "m"),
    "flower": ("flor", "f"),
    "animal": ("animal", "m"),
    "plant": ("planta", "f"),
    "soup": ("sopa", "-"),
    "fish": ("pescado", "-"),
    "rice": ("arroz", "-"),
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
TIMES = {
    "morning": "por la mañana",
    "noon": "al mediodía",
    "afternoon": "por la tarde",
    "night": "por la noche",
}
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
INDEFINITE = {"m": "un ", "f": "una ", "-": ""}
THIS = {"m": "este", "f": "esta"}


class Spanish(Language):
    """Subject, verb, object, place, time; qualities follow their noun."""

    def event(self, event: Event) -> str:
        return sentence(
            _person(event.subject),
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
            predicate = _agree(masculine, PEOPLE[state.subject.noun][1])
        return sentence(_person(state.subject), "no" if state.negated else None, copula, predicate)

    def deed(self, deed: Deed) -> str:
        subject, verb, place = _person(deed.subject), DEEDS[deed.deed], _place(deed.place)
        other = "a " + _person(deed.other)
        other = "al " + other.removeprefix("a el ") if other.startswith("a el ") else other
        if deed.place_first:
            return sentence(f"{place},", subject, verb, other)
        return sentence(subject, verb, other, place)

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


def _agree(masculine: str, gender: str) -> str:
    return masculine[:-1] + "a" if gender == "f" and masculine.endswith("o") else masculine


def _person(person: Person) -> str:
    noun, gender = PEOPLE[person.noun]
    quality = _agree(QUALITIES[person.quality][0], gender) if person.quality else ""
    return " ".join(part for part in (DEFINITE[gender], noun, quality) if part)


def _thing(thing: str) -> str:
    noun, gender = THINGS[thing]
    return INDEFINITE[gender] + noun


def _place(place: str) -> str:
    noun, gender = PLACES[place]
    return f"en {DEFINITE[gender]} {noun}"
