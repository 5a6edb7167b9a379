"""Russian: no articles, no present copula, genitive and animate accusative."""

from __future__ import annotations

from tracmod.tasks.languages.base import Language, sentence
from tracmod.tasks.meaning import Deed, Event, Person, Review, State

# noun, gender for agreement
PEOPLE = {
    "man": ("мужчина", "m"),
    "woman": ("женщина", "f"),
    "boy": ("мальчик", "m"),
    "girl": ("девочка", "f"),
    "teacher": ("учитель", "m"),
    "doctor": ("врач", "m"),
    "farmer": ("фермер", "m"),
    "nurse": ("медсестра", "f"),
    "king": ("король", "m"),
    "queen": ("королева", "f"),
    "singer": ("певица", "f"),
    "neighbour": ("сосед", "m"),
}
# stem and masculine ending
QUALITIES = {
    "rich": ("богат", "ый"),
    "poor": ("бедн", "ый"),
    "happy": ("счастлив", "ый"),
    "sad": ("грустн", "ый"),
    "strong": ("сильн", "ый"),
    "weak": ("слаб", "ый"),
    "tall": ("высок", "ий"),
    "short": ("маленьк", "ий"),
}
ACTIONS = {
    "eat": "ест",
    "drink": "пьёт",
    "read": "читает",
    "draw": "рисует",
    "cook": "готовит",
    "sleep": "спит",
    "work": "работает",
    "sing": "поёт",
    "dance": "танцует",
    "wait": "ждёт",
}
DEEDS = {
    "see": "видит",
    "hear": "слышит",
    "greet": "приветствует",
    "seek": "ищет",
    "meet": "встречает",
    "photograph": "фотографирует",
}
# noun and gender
THINGS = {
    "apple": ("яблоко", "n"),
    "pear": ("груша", "f"),
    "carrot": ("морковь", "f"),
    "onion": ("луковица", "f"),
    "tea": ("чай", "m"),
    "coffee": ("кофе", "m"),
    "water": ("вода", "f"),
    "milk": ("молоко", "n"),
    "book": ("книга", "f"),
    "newspaper": ("газета", "f"),
    "letter": ("письмо", "n"),
    "poem": ("стихотворение", "n"),
    "dog": ("собака", "f"),
    "cat": ("кошка", "f"),
    "tree": ("дерево", "n"),
    "flower": ("цветок", "m"),
    "soup": ("суп", "m"),
    "fish": ("рыба", "f"),
    "rice": ("рис", "m"),
}
# with the noun in the prepositional case
PLACES = {
    "park": "в парке",
    "kitchen": "на кухне",
    "garden": "в саду",
    "school": "в школе",
    "library": "в библиотеке",
    "station": "на вокзале",
    "market": "на рынке",
    "hospital": "в больнице",
}
TIMES = {"morning": "утром", "evening": "вечером"}
PRODUCTS = {
    "lamp": ("лампа", "f"),
    "book": ("книга", "f"),
    "bag": ("сумка", "f"),
    "phone": ("телефон", "m"),
    "clock": ("будильник", "m"),
    "chair": ("стул", "m"),
    "camera": ("камера", "f"),
    "coat": ("куртка", "f"),
    "table": ("стол", "m"),
    "shirt": ("рубашка", "f"),
}
ASPECTS = {
    "quality": ("качество", "n"),
    "price": ("цена", "f"),
    "material": ("материал", "m"),
    "design": ("дизайн", "m"),
    "colour": ("цвет", "m"),
    "packaging": ("упаковка", "f"),
    "delivery": ("доставка", "f"),
    "size": ("размер", "m"),
}
VERDICTS = {
    "terrible": ("ужасн", "ый"),
    "horrible": ("кошмарн", "ый"),
    "bad": ("плох", "ой"),
    "disappointing": ("неудачн", "ый"),
    "acceptable": ("приемлем", "ый"),
    "normal": ("нормальн", "ый"),
    "good": ("хорош", "ий"),
    "nice": ("приятн", "ый"),
    "excellent": ("отличн", "ый"),
    "perfect": ("прекрасн", "ый"),
}
VERY = "очень"
VELARS = "гкхжчшщ"  # and sibilants; they are followed by -и instead of -ы


class Russian(Language):
    """Time, subject, verb, object, place."""

    def event(self, event: Event) -> str:
        return sentence(
            TIMES[event.time] if event.time else None,
            _person(event.subject),
            "не" if event.negated else None,
            ACTIONS[event.action],
            _accusative(*THINGS[event.thing], animate=False) if event.thing else None,
            PLACES[event.place] if event.place else None,
        )

    def state(self, state: State) -> str:
        if state.place:
            predicate = PLACES[state.place]
        else:
            gender = "m" if state.subject.nephew else PEOPLE[state.subject.noun][1]
            predicate = _nominative_adjective(QUALITIES[state.quality or ""], gender)
        negation = "не" if state.negated else None
        time = TIMES[state.time] if state.time else None
        return sentence(time, _person(state.subject), negation, predicate)

    def deed(self, deed: Deed) -> str:
        verb = f"не {DEEDS[deed.deed]}" if deed.negated else DEEDS[deed.deed]
        clause = f"{_person(deed.subject)} {verb} {_person_accusative(deed.other)}"
        time = TIMES[deed.time]
        return sentence(time, clause) if deed.time_first else sentence(clause, time)

    def review(self, review: Review) -> str:
        noun, gender = PRODUCTS[review.product]
        this = "эту" if gender == "f" else "этот"
        bought = sentence(
            "я купила" if review.buyer_is_woman else "я купил",
            this,
            _accusative(noun, gender, animate=False),
        )
        clauses = []
        for aspect, verdict, strong in review.verdicts:
            name, aspect_gender = ASPECTS[aspect]
            word = _nominative_adjective(VERDICTS[verdict], aspect_gender)
            clauses.append(" ".join([name, VERY, word] if strong else [name, word]))
        joint = ", но" if review.contrast else " и"
        return bought + " " + sentence(clauses[0] + joint, clauses[1])


def _nominative_adjective(word: tuple[str, str], gender: str) -> str:
    stem, masculine = word
    neuter = "ее" if stem.endswith("ш") else "ое"
    return stem + {"m": masculine, "f": "ая", "n": neuter}[gender]


def _accusative(noun: str, gender: str, animate: bool) -> str:
    if noun.endswith("а"):
        return noun[:-1] + "у"
    if gender == "m" and animate:
        soft = noun[-1] in "йь"
        return noun[:-1] + "я" if soft else noun + "а"
    return noun


def _person(person: Person) -> str:
    noun, gender = PEOPLE[person.noun]
    if person.nephew:
        noun, gender = f"племянник {_genitive(noun, gender)}", "m"
    if person.quality is None:
        return noun
    return f"{_nominative_adjective(QUALITIES[person.quality], gender)} {noun}"


def _genitive(noun: str, gender: str) -> str:
    """Return the genitive of a person; that of animate masculines equals their accusative."""
    if noun.endswith("а"):
        return noun[:-1] + ("и" if noun[-2] in VELARS else "ы")
    return _accusative(noun, gender, animate=True)


def _person_accusative(person: Person) -> str:
    assert not person.nephew
    noun, gender = PEOPLE[person.noun]
    form = _accusative(noun, gender, animate=True)
    if person.quality is None:
        return form
    return f"{QUALITIES[person.quality][0]}{'ую' if gender == 'f' else 'ого'} {form}"
