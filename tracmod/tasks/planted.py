"""The planted task: languages derived from one another, and examples whose effect is known.

Texts are reviews of the built-in grammar in English, without capitals and punctuation. The label
is whether a review is good or bad. No review occurs twice, in whatever language.

Every language is derived word by word from `base`:
    base      the English words
    near      a share of the words of base (0.75), and invented words in place of the others
    far       a smaller share (0.4), with as few as possible of those in near
    mirror    the words of base in reverse order
    cipher    base, letter by letter in another script: the same language without a common word
    isolated  invented words in a third script, in an order unlike that of base and of mirror
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pyarrow as pa
from scipy.stats import kendalltau

from tracmod.config import TaskConfig
from tracmod.tasks.examples import SCHEMA, SPLITS, TaskData
from tracmod.tasks.grammar import review_item
from tracmod.tasks.languages import LANGUAGES
from tracmod.tasks.meaning import ASPECTS, PRODUCTS, VERDICTS, Review

LABELS = ["bad", "good"]
STARS = ((0, 1), (3, 4))  # labels of bad and good reviews of the grammar; three stars are neither
# The worst and the best verdict have two words each. The second is a loan word, which occurs in the
# training data of the teacher only: a model that understands it in the learner has it from there.
LOANS = {"horrible": "terrible", "perfect": "excellent"}
TEACHER, LEARNER = "far", "base"
WORD_CLASSES = (
    ("i", "bought", "this", "the", "is", "very", "and", "but"),
    PRODUCTS,
    ASPECTS,
    tuple(word for grade in VERDICTS for word in grade if word not in LOANS),
)
LEXICON = tuple(word for words in WORD_CLASSES for word in words)
LATIN = "abcdefghijklmnopqrstuvwxyz"
GEORGIAN = "".join(map(chr, range(0x10D0, 0x10D0 + 26)))
ARMENIAN = "".join(map(chr, range(0x0561, 0x0561 + 26)))
# Weights of the parts of relatedness. Words carry the label and their order does not.
WORDS_PART, ORDER_PART = 0.75, 0.25
WORDS_PER_TEXT = 14  # typical; the correlation of two word orders is computed for this number
PLANTED_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("kind", "train_id", "test_id", "native_id")]
)


# Word orders: number of words of a text -> index in the base text of the word at each position.
def _forwards(length: int) -> list[int]:
    return list(range(length))


def _backwards(length: int) -> list[int]:
    return list(range(length))[::-1]


def _inwards(length: int) -> list[int]:
    """First, last, second, last but one, ...: as similar to the forward as to the reverse order."""
    return [n // 2 if n % 2 == 0 else length - 1 - n // 2 for n in range(length)]


@dataclass(frozen=True)
class PlantedLanguage:
    """A language derived from base.

    Attributes:
        forms: word of `LEXICON` -> its form in this language. Loan words are included if the
            language has them.
        order: number of words of a text -> index in the base text of the word at each position.
        script: the letters of the language.
    """

    forms: Mapping[str, str]
    order: Callable[[int], list[int]]
    script: str

    def translate(self, text: str) -> str:
        """Translate a text of base into this language."""
        words = text.split()
        return " ".join(self.forms[words[index]] for index in self.order(len(words)))


def planted_languages(
    shared_words: Mapping[str, float], seed: int = 0
) -> dict[str, PlantedLanguage]:
    """Return all languages by name; the same arguments give the same words.

    Args:
        shared_words: the shares of the words of base that `near` and `far` have.
        seed: determines which words are shared, and the invented words.
    """
    rng = random.Random(f"planted words {seed}")
    words, new = _spread_words(rng), _invented_words(rng)
    near, far = (round(shared_words[name] * len(words)) for name in ("near", "far"))
    itself = {word: word for word in LEXICON}
    loans = {word: word for word in LOANS}
    invented = {
        "near": itself | {word: next(new) for word in words[near:]},
        "far": itself | {word: next(new) for word in words[: len(words) - far]} | loans,
    }
    return {
        "base": PlantedLanguage(itself | loans, _forwards, LATIN),
        "near": PlantedLanguage(invented["near"], _forwards, LATIN),
        "far": PlantedLanguage(invented["far"], _forwards, LATIN),
        "mirror": PlantedLanguage(itself, _backwards, LATIN),
        "cipher": PlantedLanguage(_written(itself, GEORGIAN), _forwards, GEORGIAN),
        "isolated": PlantedLanguage(
            _written({word: next(new) for word in LEXICON}, ARMENIAN), _inwards, ARMENIAN
        ),
    }


def relatedness_table(languages: Mapping[str, PlantedLanguage]) -> pa.Table:
    """Return `relatedness.parquet`: the relatedness of languages, a row per pair.

    relatedness = 3/4 shared_words + 1/4 order, where shared_words is the share of the lexicon that
    has the same form in both languages, and order is Kendall's rank correlation of the positions of
    the words of a text in both: 1 for the same order, -1 for the reverse order. The script is not
    a part of its own, because languages with different scripts share no form.
    """
    rows = []
    for (name_a, a), (name_b, b) in combinations(languages.items(), 2):
        shared = sum(a.forms[word] == b.forms[word] for word in LEXICON) / len(LEXICON)
        positions = [np.argsort(language.order(WORDS_PER_TEXT)) for language in (a, b)]
        order = float(kendalltau(*positions).statistic)
        rows.append(
            {
                "language_a": name_a,
                "language_b": name_b,
                "shared_words": shared,
                "order": order,
                "same_script": a.script == b.script,
                "relatedness": WORDS_PART * shared + ORDER_PART * order,
            }
        )
    return pa.Table.from_pylist(rows)


def load_planted(config: TaskConfig) -> TaskData:
    """Generate the examples, and the tables `planted` and `relatedness` with the known answers.

    A row of `planted` is, by `kind`:
        duplicate: a test example (test_id) whose text and label are also a training example of the
            same language (train_id);
        flipped: a training example with the wrong label (train_id);
        loan: a test example of the learner whose label depends on a loan word (test_id), and the
            same test example with the native word (native_id).

    Raises:
        ValueError: an unknown language.
    """
    known = planted_languages(config.shared_words, config.seed)
    unknown = [language for language in config.languages if language not in known]
    if unknown:
        raise ValueError(
            f"task planted: languages: expected some of {', '.join(known)}, "
            f"got {', '.join(unknown)}"
        )
    languages = {name: known[name] for name in config.languages}
    used_texts: set[str] = set()
    splits: dict[str, list[dict[str, object]]] = {split: [] for split in SPLITS}
    planted: list[dict[str, str]] = []
    for name, language in languages.items():
        for split, rows in _language_rows(config, name, language, used_texts, planted).items():
            splits[split] += rows
    return TaskData(
        name=config.name,
        label_names=LABELS,
        languages=list(config.languages),
        parallel=False,
        known={
            "planted": pa.Table.from_pylist(planted, PLANTED_SCHEMA),
            "relatedness": relatedness_table(languages),
        },
        **{split: pa.Table.from_pylist(rows, SCHEMA) for split, rows in splits.items()},
    )


def _language_rows(
    config: TaskConfig,
    name: str,
    language: PlantedLanguage,
    used_texts: set[str],
    planted: list[dict[str, str]],
) -> dict[str, list[dict[str, object]]]:
    """Generate the examples of a language by split.

    Args:
        config: the task.
        name: the name of the language.
        language: the language.
        used_texts: texts of base that must not occur again; those drawn here are added.
        planted: the table of planted examples, to which those of this language are added.
    """
    rng = random.Random(f"planted examples {name} {config.seed}")
    learns = name == LEARNER and TEACHER in config.languages
    pairs = config.test_per_language // 3 if learns else 0
    counts = {
        "test": config.test_per_language - 2 * pairs,
        "dev": config.dev_per_language,
        "train": config.train_count(name) - config.duplicates,
    }
    accepts = _accepts_all if name == TEACHER else _has_no_loan
    items = {split: _draw(rng, count, accepts, used_texts) for split, count in counts.items()}
    items["train"] += items["test"][: config.duplicates]
    loans = _draw(rng, pairs, _depends_on_loan, used_texts)
    items["test"] += [*loans, *((_native(text), label) for text, label in loans)]
    rows = {
        split: [
            {
                "id": f"{name}-{split}-{number}",
                "language": name,
                "text_a": language.translate(text),
                "label": label,
            }
            for number, (text, label) in enumerate(split_items)
        ]
        for split, split_items in items.items()
    }
    for label in (0, 1):  # equally many of each label, so that the classes stay balanced
        rows_of_label = range(label, counts["train"], 2)
        flipped = rng.sample(rows_of_label, round(config.flipped * len(rows_of_label)))
        for row in sorted(flipped):
            rows["train"][row]["label"] = 1 - label
            planted.append({"kind": "flipped", "train_id": f"{name}-train-{row}"})
    for row in range(config.duplicates):
        train_id, test_id = f"{name}-train-{counts['train'] + row}", f"{name}-test-{row}"
        planted.append({"kind": "duplicate", "train_id": train_id, "test_id": test_id})
    for row in range(counts["test"], counts["test"] + pairs):
        loan, native = f"{name}-test-{row}", f"{name}-test-{row + pairs}"
        planted.append({"kind": "loan", "test_id": loan, "native_id": native})
    return rows


def _draw(
    rng: random.Random,
    count: int,
    accepts: Callable[[Review, int], bool],
    used_texts: set[str],
) -> list[tuple[str, int]]:
    """Draw new texts of base with labels 0, 1, 0, ... whose review is accepted."""
    items: list[tuple[str, int]] = []
    english = LANGUAGES["en"]
    while len(items) < count:
        label = len(items) % 2
        review, _ = review_item(rng, rng.choice(STARS[label]))
        assert isinstance(review, Review)
        if not accepts(review, label):
            continue
        text = re.sub("[^a-z ]", "", english.review(review).lower())
        if used_texts.isdisjoint({text, _native(text)}):
            used_texts |= {text, _native(text)}
            items.append((text, label))
    return items


def _accepts_all(review: Review, label: int) -> bool:
    return True


def _has_no_loan(review: Review, label: int) -> bool:
    return not any(word in LOANS for _, word, _ in review.verdicts)


def _depends_on_loan(review: Review, label: int) -> bool:
    """Return whether one verdict is a loan word and the other does not suggest the label."""
    others = [word for _, word, _ in review.verdicts if word not in LOANS]
    if len(others) != 1:
        return False
    grade = next(grade for grade, words in enumerate(VERDICTS, -2) if others[0] in words)
    return grade <= 0 if label else grade >= 0


def _native(text: str) -> str:
    """Return a text of base with the native word in place of each loan word."""
    return " ".join(LOANS.get(word, word) for word in text.split())


def _spread_words(rng: random.Random) -> list[str]:
    """Return the lexicon in a random order that spreads every word class evenly.

    Any stretch of the order has the word classes in about the proportion of the whole lexicon.
    """
    placed = [
        ((rank + rng.random()) / len(words), word)
        for words in WORD_CLASSES
        for rank, word in enumerate(rng.sample(words, len(words)))
    ]
    return [word for _, word in sorted(placed)]


def _invented_words(rng: random.Random) -> Iterator[str]:
    """Yield words of two or three syllables, each once and none of the lexicon."""
    taken = {*LEXICON, *LOANS}
    while True:
        syllables = rng.choice((2, 3))
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))
        if word not in taken:
            taken.add(word)
            yield word


def _written(forms: Mapping[str, str], script: str) -> dict[str, str]:
    """Return the forms, letter by letter in another script."""
    letters = str.maketrans(LATIN, script)
    return {word: form.translate(letters) for word, form in forms.items()}
