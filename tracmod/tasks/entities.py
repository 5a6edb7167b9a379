"""The built-in task of named entities: people, places and organizations in short sentences.

Sentences are made of a pattern and names for its slots. Some names are those of people and of
places (Florence, Jordan), so that only the words around them tell which; patterns, and most names,
are a language's own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from tracmod.config import TaskConfig
from tracmod.tasks.examples import SPLITS, Corpus, Pool
from tracmod.tasks.tag_scores import sentence_classes
from tracmod.tasks.token_files import TokenFile, pool_of_sentences

TAGS = ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]
AMBIGUOUS = ["Florence", "Jordan", "Austin", "Victoria"]

# Language -> patterns; a slot stands for a name and is a word of the pattern.
PATTERNS = {
    "en": [
        "{PER} lives in {LOC} .",
        "Yesterday {PER} met {PER} .",
        "{ORG} opens an office in {LOC} .",
        "The train to {LOC} is late again .",
        "{PER} works for {ORG} in {LOC} .",
        "Our friend {PER} wrote a long letter .",
        "Many people visit {LOC} and {LOC} in summer .",
        "The workers of {ORG} are waiting .",
        "It was raining all day .",
        "The old bridge has been closed since May .",
    ],
    "de": [
        "{PER} wohnt in {LOC} .",
        "Gestern traf {PER} die Malerin {PER} .",
        "{ORG} baut ein Werk in {LOC} .",
        "Der Zug nach {LOC} kommt zu spät .",
        "{PER} arbeitet bei {ORG} in {LOC} .",
        "Unser Nachbar {PER} schrieb einen Brief .",
        "Im Sommer fahren viele nach {LOC} oder {LOC} .",
        "Die Arbeiter von {ORG} warten .",
        "Es regnete den ganzen Tag .",
        "Die alte Brücke ist seit Mai gesperrt .",
    ],
    "es": [
        "{PER} vive en {LOC} .",
        "Ayer {PER} saludó a {PER} .",
        "{ORG} abre una oficina en {LOC} .",
        "El tren a {LOC} llega tarde .",
        "{PER} trabaja para {ORG} en {LOC} .",
        "Nuestra vecina {PER} escribió una carta .",
        "En verano muchos viajan a {LOC} y a {LOC} .",
        "Los obreros de {ORG} esperan .",
        "Llovió todo el día .",
        "El puente viejo está cerrado desde mayo .",
    ],
    "fr": [
        "{PER} habite à {LOC} .",
        "Hier {PER} a rencontré {PER} .",
        "{ORG} ouvre un bureau à {LOC} .",
        "Le train pour {LOC} est en retard .",
        "{PER} travaille chez {ORG} à {LOC} .",
        "Notre voisin {PER} a écrit une lettre .",
        "En été beaucoup de gens visitent {LOC} et {LOC} .",
        "Les ouvriers de {ORG} attendent .",
        "Il a plu toute la journée .",
        "Le vieux pont est fermé depuis mai .",
    ],
}
FIRST_NAMES = {
    "en": ["Mary", "John", "Emily", "Peter", "Alice", "Henry"],
    "de": ["Greta", "Jürgen", "Anke", "Uwe", "Heike", "Lutz"],
    "es": ["Lucía", "Pablo", "Carmen", "Javier", "Inés", "Diego"],
    "fr": ["Élodie", "Gérard", "Manon", "Thierry", "Odile", "Rémi"],
}
LAST_NAMES = {
    "en": ["Baker", "Walker", "Hughes", "Turner", "Bennett", "Clarke"],
    "de": ["Krüger", "Vogel", "Schuster", "Lindner", "Brandt", "Seidel"],
    "es": ["Navarro", "Ortega", "Molina", "Serrano", "Ibáñez", "Vargas"],
    "fr": ["Lefèvre", "Moreau", "Girard", "Fontaine", "Chevalier", "Roux"],
}
LOCATIONS = {
    "en": [
        "Leeds",
        "Bristol",
        "York",
        "Dover",
        "Bath",
        "New Haven",
        "Long Beach",
        "Salt Lake City",
    ],
    "de": ["Kassel", "Bremen", "Lübeck", "Ulm", "Jena", "Bad Tölz", "Halle an der Saale", "Köln"],
    "es": ["Sevilla", "Burgos", "Málaga", "Lugo", "Cádiz", "San Sebastián", "La Coruña", "Toledo"],
    "fr": ["Lyon", "Nantes", "Lille", "Dijon", "Rouen", "Le Havre", "La Rochelle", "Saint Malo"],
}
ORGANIZATIONS = {
    "en": ["Harbour Bank", "Northern Rail", "Oakwood", "Summit Press", "Bluebird Airways"],
    "de": ["Nordbank", "Bäckerei Vogel", "Stadtwerke Ulm", "Druckhaus Mitte", "Solartec"],
    "es": ["Banco del Sur", "Editorial Luna", "Autobuses Toledo", "Aceites Molina", "Telmar"],
    "fr": ["Banque du Nord", "Éditions Girard", "Ateliers Roux", "Voyages Fontaine", "Solvia"],
}
MOST_REPEATS = 1000  # draws of known sentences in a row after which they count as exhausted


def load_entities(config: TaskConfig) -> Corpus:
    """Make as many sentences as the config needs; the same config gives the same ones.

    Raises:
        ValueError: an unknown language, or more sentences than there are.
    """
    unknown = [language for language in config.languages if language not in PATTERNS]
    if unknown:
        raise ValueError(
            f"task entities: languages: expected some of {', '.join(PATTERNS)}, "
            f"got {', '.join(unknown)}"
        )
    files = [
        TokenFile.of_rows("task entities", enumerate(_sentences(config, language)), {}, None)
        for language in config.languages
    ]
    pool = Pool(pool_of_sentences(files, TAGS), SPLITS)
    return Corpus(sentence_classes(TAGS), False, [pool], TAGS)


def _sentences(config: TaskConfig, language: str) -> Iterator[dict[str, Any]]:
    """Yield the sentences of a language, no two with the same words."""
    counts = (config.train_count(language), config.dev_per_language, config.test_per_language)
    needed, rng = sum(counts), random.Random(f"entities {language} {config.seed}")
    known: set[tuple[str, ...]] = set()
    repeats = 0
    while len(known) < needed:
        tokens, tags = _sentence(rng, language)
        if tuple(tokens) in known and repeats < MOST_REPEATS:
            repeats += 1
            continue
        if repeats >= MOST_REPEATS:
            raise ValueError(
                f"task entities: expected at most {len(known)} sentences of language {language!r}, "
                f"got {needed}"
            )
        repeats = 0
        known.add(tuple(tokens))
        number = len(known) - 1
        yield {
            "id": f"{language}-{number}", "language": language, "tokens": tokens, "tags": tags
        }  # fmt: skip


def _sentence(rng: random.Random, language: str) -> tuple[list[str], list[str]]:
    """Draw a pattern and names for its slots; return the words and their tags."""
    # Sentences without a name are few, so that most have something to be found.
    patterns = PATTERNS[language]
    weights = [4 if "{" in pattern else 1 for pattern in patterns]
    tokens: list[str] = []
    tags: list[str] = []
    for word in rng.choices(patterns, weights)[0].split():
        if not word.startswith("{"):
            tokens.append(word)
            tags.append("O")
            continue
        kind = word.strip("{}")
        name = _name(rng, language, kind).split()
        tokens += name
        tags += [f"B-{kind}"] + [f"I-{kind}"] * (len(name) - 1)
    return tokens, tags


def _name(rng: random.Random, language: str, kind: str) -> str:
    if kind == "ORG":
        return rng.choice(ORGANIZATIONS[language])
    if kind == "LOC":
        return rng.choice(LOCATIONS[language] + AMBIGUOUS)
    first = rng.choice(FIRST_NAMES[language] + AMBIGUOUS)
    return first if rng.random() < 0.4 else f"{first} {rng.choice(LAST_NAMES[language])}"
