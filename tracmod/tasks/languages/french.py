"""French: agreement, elision (l', n'), au and du."""

from __future__ import annotations

from tracmod.tasks.languages.base import Language, sentence
from tracmod.tasks.meaning import Deed, Event, Person, Review, State

PEOPLE = {
    "man": ("homme", "m"),
    "woman": ("femme", "f"),
    "boy": ("garçon", "m"),
    "girl": ("fille", "f"),
    "teacher": ("professeur", "m"),
    "doctor": ("médecin", "m"),
    "farmer": ("fermier", "m"),
    "nurse": ("infirmière", "f"),
    "king": ("roi", "m"),
    "queen": ("reine", "f"),
    "singer": ("chanteuse", "f"),
    "neighbour": ("voisin", "m"),
}
# masculine, feminine
QUALITIES = {
    "rich": ("riche", "riche"),
    "poor": ("pauvre", "pauvre"),
    "happy": ("heureux", "heureuse"),
    "sad": ("triste", "triste"),
    "strong": ("fort", "forte"),
    "weak": ("faible", "faible"),
    "tall": ("grand", "grande"),
    "short": ("petit", "petite"),
}
BEFORE_NOUN = {"tall", "short"}
ACTIONS = {
    "eat": "mange",
    "drink": "boit",
    "read": "lit",
    "draw": "dessine",
    "cook": "cuisine",
    "sleep": "dort",
    "work": "travaille",
    "sing": "chante",
    "dance": "danse",
    "wait": "attend",
}
DEEDS = {
    "see": "voit",
    "hear": "entend",
    "greet": "salue",
    "seek": "cherche",
    "meet": "rencontre",
    "photograph": "photographie",
}
THINGS = {
    "apple": ("pomme", "f"),
    "pear": ("poire", "f"),
    "carrot": ("carotte", "f"),
    "onion": ("oignon", "m"),
    "tea": ("thé", "m"),
    "coffee": ("café", "m"),
    "water": ("eau", "f"),
    "milk": ("lait", "m"),
    "book": ("livre", "m"),
    "newspaper": ("journal", "m"),
    "letter": ("lettre", "f"),
    "poem": ("poème", "m"),
    "dog": ("chien", "m"),
    "cat": ("chat", "m"),
    "tree": ("arbre", "m"),
    "flower": ("fleur", "f"),
    "soup": ("soupe", "f"),
    "fish": ("poisson", "m"),
    "rice": ("riz", "m"),
}
PLACES = {
    "park": ("dans", "parc", "m"),
    "kitchen": ("dans", "cuisine", "f"),
    "garden": ("dans", "jardin", "m"),
    "school": ("à", "école", "f"),
    "library": ("à", "bibliothèque", "f"),
    "station": ("à", "gare", "f"),
    "market": ("à", "marché", "m"),
    "hospital": ("à", "hôpital", "m"),
}
TIMES = {"morning": "le matin", "evening": "le soir"}
PRODUCTS = {
    "lamp": ("lampe", "f"),
    "book": ("livre", "m"),
    "bag": ("sac", "m"),
    "phone": ("téléphone", "m"),
    "clock": ("horloge", "f"),
    "chair": ("chaise", "f"),
    "camera": ("caméra", "f"),
    "coat": ("manteau", "m"),
    "table": ("table", "f"),
    "shirt": ("chemise", "f"),
}
ASPECTS = {
    "quality": ("qualité", "f"),
    "price": ("prix", "m"),
    "material": ("matériau", "m"),
    "design": ("design", "m"),
    "colour": ("couleur", "f"),
    "packaging": ("emballage", "m"),
    "delivery": ("livraison", "f"),
    "size": ("taille", "f"),
}
VERDICTS = {
    "terrible": ("terrible", "terrible"),
    "horrible": ("horrible", "horrible"),
    "bad": ("mauvais", "mauvaise"),
    "disappointing": ("décevant", "décevante"),
    "acceptable": ("acceptable", "acceptable"),
    "normal": ("normal", "normale"),
    "good": ("bon", "bonne"),
    "nice": ("agréable", "agréable"),
    "excellent": ("excellent", "excellente"),
    "perfect": ("parfait", "parfaite"),
}
VOWELS = "aeiouhéèêàâîôœ"  # every h in this lexicon is mute
DEFINITE = {"m": "le", "f": "la"}
CONTRACTIONS = {"à": "au", "de": "du"}  # before le


class French(Language):
    """Subject, verb, object, place, time; ne ... pas around the verb."""

    def event(self, event: Event) -> str:
        return sentence(
            _person(event.subject),
            _around(ACTIONS[event.action]) if event.negated else ACTIONS[event.action],
            _definite(*THINGS[event.thing]) if event.thing else None,
            _place(event.place) if event.place else None,
            TIMES[event.time] if event.time else None,
        )

    def state(self, state: State) -> str:
        if state.place:
            predicate = _place(state.place)
        else:
            gender = "m" if state.subject.nephew else PEOPLE[state.subject.noun][1]
            predicate = _agree(QUALITIES[state.quality or ""], gender)
        copula = _around("est") if state.negated else "est"
        time = TIMES[state.time] if state.time else None
        return sentence(_person(state.subject), copula, predicate, time)

    def deed(self, deed: Deed) -> str:
        verb = _around(DEEDS[deed.deed]) if deed.negated else DEEDS[deed.deed]
        clause = f"{_person(deed.subject)} {verb} {_person(deed.other)}"
        time = TIMES[deed.time]
        return sentence(f"{time},", clause) if deed.time_first else sentence(clause, time)

    def review(self, review: Review) -> str:
        noun, gender = PRODUCTS[review.product]
        clauses = []
        for aspect, verdict, strong in review.verdicts:
            name, aspect_gender = ASPECTS[aspect]
            word = _agree(VERDICTS[verdict], aspect_gender)
            very = "très " if strong else ""
            clauses.append(f"{_definite(name, aspect_gender)} est {very}{word}")
        joint = ", mais" if review.contrast else " et"
        bought = sentence("j'ai acheté", "cette" if gender == "f" else "ce", noun)
        return bought + " " + sentence(clauses[0] + joint, clauses[1])


def _agree(forms: tuple[str, str], gender: str) -> str:
    return forms[gender == "f"]


def _definite(phrase: str, gender: str) -> str:
    return f"l'{phrase}" if phrase[0] in VOWELS else f"{DEFINITE[gender]} {phrase}"


def _person(person: Person) -> str:
    noun, gender = PEOPLE[person.noun]
    owner = ""
    if person.nephew:
        owner = " " + _contract("de", _definite(noun, gender))
        noun, gender = "neveu", "m"
    if person.quality is None:
        return _definite(noun, gender) + owner
    quality = _agree(QUALITIES[person.quality], gender)
    before = person.quality in BEFORE_NOUN
    return _definite(f"{quality} {noun}" if before else f"{noun} {quality}", gender) + owner


def _around(verb: str) -> str:
    return f"n'{verb} pas" if verb[0] in VOWELS else f"ne {verb} pas"


def _place(place: str) -> str:
    preposition, noun, gender = PLACES[place]
    return _contract(preposition, _definite(noun, gender))


def _contract(preposition: str, phrase: str) -> str:
    """Join preposition and phrase: à + le = au, de + le = du."""
    if preposition in CONTRACTIONS and phrase.startswith("le "):
        return f"{CONTRACTIONS[preposition]} {phrase.removeprefix('le ')}"
    return f"{preposition} {phrase}"
