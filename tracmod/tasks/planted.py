"""The planted task: languages made from one another by rule, and examples whose effect is known.

Texts are reviews of the embedded grammar, said by its English without capitals and punctuation;
the label is whether they are good or bad. No review is said twice, in whatever language.

Every language is made from `base`, word by word:
    base      the English words
    near      a share of base's words (0.75), invented ones for the others
    far       a smaller share (0.4), as few as can be of them in near too
    mirror    all of base's words, in reverse order
    cipher    base, letter by letter in another script: the same language, and no word in common
    isolated  invented words, in a third script, in an order that is like neither of the others
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
STARS = ((0, 1), (3, 4))  # of a bad review, of a good one; three stars are neither
# Of the words for the worst and the best there are two each. The second is a loan, known to the
# training data of the teacher alone: who must understand it in the learner has it from there.
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
# How much the parts of relatedness count: words carry the label, their order only places them.
WORDS_PART, ORDER_PART = 0.75, 0.25
WORDS_PER_TEXT = 14  # typical, and the number for which the likeness of two orders is given
PLANTED_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("kind", "train_id", "test_id", "native_id")]
)


def _forwards(length: int) -> list[int]:
    """Which of a text's words in base stands at each place."""
    return list(range(length))


def _backwards(length: int) -> list[int]:
    return list(range(length))[::-1]


def _inwards(length: int) -> list[int]:
    """First, last, second, last but one, ...: as like the one order as the reverse one."""
    return [n // 2 if n % 2 == 0 else length - 1 - n // 2 for n in range(length)]


@dataclass(frozen=True)
class PlantedLanguage:
    """A language made from base.

    Attributes:
        forms: every word of `LEXICON` (and the loans, where they are known) as it is said here.
        order: number of words of a text -> which word of base's text stands at each place.
        script: the letters it is written in.
    """

    forms: Mapping[str, str]
    order: Callable[[int], list[int]]
    script: str

    def say(self, text: str) -> str:
        """A text of base in this language."""
        words = text.split()
        return " ".join(self.forms[words[place]] for place in self.order(len(words)))


def planted_languages(
    shared_words: Mapping[str, float], seed: int = 0
) -> dict[str, PlantedLanguage]:
    """All languages by name; the same arguments give the same words.

    Args:
        shared_words: the shares of base's words in `near` and in `far`.
        seed: of which words are shared, and of the invented ones.
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
    """`relatedness.parquet`: how related two languages are, a row per pair.

    relatedness = 3/4 shared_words + 1/4 order, where shared_words is the share of the lexicon that
    both say with the same form, and order is Kendall's rank correlation of the places that the
    words of a text have in both: 1 for the same order, -1 for the reverse one. Of different scripts
    nothing is shared, so the script has no part of its own.
    """
    rows = []
    for (name_a, a), (name_b, b) in combinations(languages.items(), 2):
        shared = sum(a.forms[word] == b.forms[word] for word in LEXICON) / len(LEXICON)
        places = [np.argsort(language.order(WORDS_PER_TEXT)) for language in (a, b)]
        order = float(kendalltau(*places).statistic)
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
    """Make the examples, and the tables `planted` and `relatedness` of what is known of them.

    Planted, by `kind`: `duplicate`, a test example (test_id) that is word for word among the
    training examples of its language (train_id); `flipped`, a training example with the wrong
    label; `loan`, a test example of the learner whose label hangs on a word that only the
    teacher's training data has, and the same test example with the native word (native_id).

    Raises:
        ValueError: an unknown language.
    """
    known = planted_languages(config.shared_words, config.seed)
    unknown = [language for language in config.languages if language not in known]
    if unknown:
        raise ValueError(
            f"task planted has no language {', '.join(unknown)}, only {', '.join(known)}"
        )
    chosen = {name: known[name] for name in config.languages}
    said: set[str] = set()
    splits: dict[str, list[dict[str, object]]] = {split: [] for split in SPLITS}
    planted: list[dict[str, str]] = []
    for name, language in chosen.items():
        for split, rows in _language_rows(config, name, language, said, planted).items():
            splits[split] += rows
    return TaskData(
        name=config.name,
        label_names=LABELS,
        languages=list(config.languages),
        parallel=False,
        known={
            "planted": pa.Table.from_pylist(planted, PLANTED_SCHEMA),
            "relatedness": relatedness_table(chosen),
        },
        **{split: pa.Table.from_pylist(rows, SCHEMA) for split, rows in splits.items()},
    )


def _language_rows(
    config: TaskConfig,
    name: str,
    language: PlantedLanguage,
    said: set[str],
    planted: list[dict[str, str]],
) -> dict[str, list[dict[str, object]]]:
    """One language's examples by split; what is planted in them is added to `planted`."""
    rng = random.Random(f"planted examples {name} {config.seed}")
    learns = name == LEARNER and TEACHER in config.languages
    pairs = config.test_per_language // 3 if learns else 0
    counts = {
        "test": config.test_per_language - 2 * pairs,
        "dev": config.dev_per_language,
        "train": config.train_count(name) - config.duplicates,
    }
    accept = _is_told if name == TEACHER else _without_loans
    items = {split: _draw(rng, count, accept, said) for split, count in counts.items()}
    items["train"] += items["test"][: config.duplicates]
    loans = _draw(rng, pairs, _hangs_on_a_loan, said)
    items["test"] += [*loans, *((_native(text), label) for text, label in loans)]
    rows = {
        split: [
            {
                "id": f"{name}-{split}-{number}",
                "language": name,
                "text_a": language.say(text),
                "label": label,
            }
            for number, (text, label) in enumerate(of_split)
        ]
        for split, of_split in items.items()
    }
    for label in (0, 1):  # as many of each, so that the labels stay balanced
        own = range(label, counts["train"], 2)
        for row in sorted(rng.sample(own, round(config.flipped * len(own)))):
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
    rng: random.Random, count: int, accept: Callable[[Review, int], Review | None], said: set[str]
) -> list[tuple[str, int]]:
    """Texts of base with labels 0, 1, 0, ... that were not said before, with a loan or without."""
    found: list[tuple[str, int]] = []
    speaker = LANGUAGES["en"]
    while len(found) < count:
        label = len(found) % 2
        review, _ = review_item(rng, rng.choice(STARS[label]))
        assert isinstance(review, Review)
        accepted = accept(review, label)
        if accepted is None:
            continue
        text = re.sub("[^a-z ]", "", speaker.review(accepted).lower())
        if said.isdisjoint({text, _native(text)}):
            said |= {text, _native(text)}
            found.append((text, label))
    return found


def _is_told(review: Review, label: int) -> Review:
    return review


def _without_loans(review: Review, label: int) -> Review | None:
    """The review, if there is no loan in it."""
    return None if any(word in LOANS for _, word, _ in review.verdicts) else review


def _hangs_on_a_loan(review: Review, label: int) -> Review | None:
    """The review, if one verdict is a loan and the other does not tell the label."""
    grades = [_grade(word) for _, word, _ in review.verdicts]
    borrowed = [word in LOANS for _, word, _ in review.verdicts]
    sign = 1 if label else -1
    others = [grade for grade, loan in zip(grades, borrowed, strict=True) if not loan]
    return review if len(others) == 1 and sign * others[0] <= 0 else None


def _native(text: str) -> str:
    """A text of base with the native word in place of each loan."""
    return " ".join(LOANS.get(word, word) for word in text.split())


def _grade(verdict: str) -> int:
    return next(grade for grade, words in enumerate(VERDICTS, -2) if verdict in words)


def _spread_words(rng: random.Random) -> list[str]:
    """The lexicon in an order whose every stretch has of each word class its part."""
    placed = [
        ((rank + rng.random()) / len(words), word)
        for words in WORD_CLASSES
        for rank, word in enumerate(rng.sample(words, len(words)))
    ]
    return [word for _, word in sorted(placed)]


def _invented_words(rng: random.Random) -> Iterator[str]:
    """Words of two or three syllables, none twice and none of the lexicon."""
    made = {*LEXICON, *LOANS}
    while True:
        syllables = rng.choice((2, 3))
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))
        if word not in made:
            made.add(word)
            yield word


def _written(forms: Mapping[str, str], script: str) -> dict[str, str]:
    """The forms, letter by letter in another script."""
    letters = str.maketrans(LATIN, script)
    return {word: form.translate(letters) for word, form in forms.items()}
