"""The section `task`: which examples a run has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from tracmod.choices import Unit
from tracmod.config.section import Section, repeated


class TaskConfig(Section):
    """The examples: the task, its languages, and the number of examples per language and split."""

    name: Literal[
        "grammar", "planted", "entities", "xnli", "pawsx", "marc", "wikiann", "ud", "xquad",
        "tagged-files", "question-files", "files"] = Field(
        "grammar",
        description="Task: built-in (grammar, planted, entities), public (xnli, pawsx, marc, "
        "wikiann, ud, xquad), or your own files (files; tagged-files for words with tags, "
        "question-files for questions). In entities, wikiann (named entities), ud (parts of "
        "speech; languages are treebanks, such as en_ewt) and tagged-files, words are classified; "
        "in xquad and question-files, questions are answered.",
    )  # fmt: skip
    shape: Literal["nli", "paraphrase", "reviews"] = Field(
        "nli", description="grammar only: the kind of task that the sentences make up."
    )
    languages: list[str] = Field(min_length=1, description="Languages, each once.")
    path: Path | None = Field(
        None,
        description="xnli, pawsx, marc, wikiann, ud, xquad only: folder with the published files. "
        "Default: the Hub.",
    )
    hub_name: str | None = Field(
        None,
        description="xnli, pawsx, marc, wikiann, ud, xquad only: another Hub data set of the same "
        "format.",
    )
    train_file: str | None = Field(
        None,
        description="files, tagged-files, question-files only: path of the training examples "
        "(.tsv, .csv, .jsonl, .parquet; with tags .jsonl, .parquet, .conllu, .conll, .bio; "
        "questions .json of SQuAD's form, .jsonl, .parquet; each also .gz). It may contain "
        "{language}.",
    )
    dev_file: str | None = Field(
        None,
        description="files, tagged-files, question-files only: path of the dev examples. Default: "
        "drawn from train_file.",
    )
    test_file: str | None = Field(
        None,
        description="files, tagged-files, question-files only: path of the test examples. Default: "
        "drawn from train_file.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="files, tagged-files, question-files only: name of a column here -> its name "
        "in the files. The columns are id, language, text_a, text_b, label, group, and "
        "split_group, which names examples that must stay in one split (default: group); of "
        "tagged-files, id, language, tokens, tags and group; of question-files, id, language, "
        "question, context, answers and group.",
    )
    parallel: bool = Field(
        False,
        description="files only: `group` identifies an item that every language has exactly once.",
    )
    train_per_language: int = Field(ge=1, description="Number of training examples per language.")
    dev_per_language: int = Field(ge=1, description="Number of dev examples per language.")
    test_per_language: int = Field(ge=1, description="Number of test examples per language.")
    train_languages: list[str] | None = Field(
        None,
        min_length=1,
        description="Languages with training data. Default: all. The others are pruned and tested "
        "without training data of their own (zero-shot, leave-one-out).",
    )
    train_counts: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="Language -> number of training examples, in place of train_per_language.",
    )
    test_from_train: bool = Field(
        False,
        description="Parallel tasks only: every test item is a training item of all languages but "
        "its own. Each language has different test items.",
    )
    shared_words: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=lambda: {"near": 0.75, "far": 0.4},
        description="planted only: share of the words of the language base that the languages near "
        "and far have in common with it.",
    )
    duplicates: int = Field(
        6, ge=0, description="planted only: test examples per language that are also trained on."
    )
    flipped: float = Field(
        0.1,
        ge=0,
        lt=0.5,
        description="planted only: share of training examples with a wrong label.",
    )
    seed: int = Field(0, ge=0, description="Seed of the examples that are drawn.")

    def languages_of(self, split: str) -> list[str]:
        """Return the languages that a split is drawn from, in the order of `languages`."""
        if split != "train" or self.test_from_train:
            return self.languages
        return self.trained_languages

    @property
    def unit(self) -> Unit:
        """The kind of thing that a model classifies: texts, words, or the answers in texts."""
        if self.name in ("xquad", "question-files"):
            return "span"
        of_words = self.name in ("entities", "wikiann", "ud", "tagged-files")
        return "token" if of_words else "text"

    @property
    def trained_languages(self) -> list[str]:
        """The languages with training data, in the order of `languages`."""
        trained = self.languages if self.train_languages is None else self.train_languages
        return [language for language in self.languages if language in trained]

    def train_count(self, language: str) -> int:
        """Return the number of training examples of a language."""
        return self.train_counts.get(language, self.train_per_language)

    @field_validator("languages", "train_languages")
    @classmethod
    def _check_distinct(cls, languages: list[str] | None) -> list[str] | None:
        repeated_names = repeated(languages or [])
        if repeated_names:
            raise ValueError(f"expected each language once, got {repeated_names} more than once")
        return languages

    @model_validator(mode="after")
    def _check_files(self) -> TaskConfig:
        if self.name in ("files", "tagged-files", "question-files") and self.train_file is None:
            raise ValueError(f"train_file: expected a path for the task {self.name}, got none")
        return self

    @model_validator(mode="after")
    def _check_planted(self) -> TaskConfig:
        if self.name != "planted":
            return self
        if set(self.shared_words) != {"near", "far"}:
            raise ValueError(
                "shared_words: expected the keys near and far, got "
                f"{', '.join(self.shared_words) or 'none'}"
            )
        if self.train_languages is not None or self.test_from_train:
            raise ValueError(
                "train_languages, test_from_train: expected neither for the task planted, which "
                "has training data in every language and makes its own duplicates"
            )
        # Up to two thirds of the test examples of a language are planted loan pairs instead.
        most = self.test_per_language - 2 * (self.test_per_language // 3)
        fewest = min(map(self.train_count, self.languages))
        if self.duplicates > most or self.duplicates >= fewest:
            raise ValueError(
                f"duplicates: expected at most a third of test_per_language ({most}) and fewer "
                f"than the training examples of each language ({fewest}), got {self.duplicates}"
            )
        return self

    @model_validator(mode="after")
    def _check_training_languages(self) -> TaskConfig:
        unknown = sorted(set(self.train_languages or []) - set(self.languages))
        if unknown:
            raise ValueError(
                f"train_languages: expected some of {', '.join(self.languages)}, "
                f"got {', '.join(unknown)}"
            )
        untrained = sorted(set(self.train_counts) - set(self.trained_languages))
        if untrained:
            raise ValueError(
                f"train_counts: expected languages with training data "
                f"({', '.join(self.trained_languages)}), got {', '.join(untrained)}"
            )
        return self

    @model_validator(mode="after")
    def _check_test_from_train(self) -> TaskConfig:
        if not self.test_from_train:
            return self
        if self.train_counts:
            raise ValueError(
                "train_counts: expected none with test_from_train, which needs the same training "
                f"items in all languages, got {', '.join(self.train_counts)}"
            )
        if len(self.trained_languages) < 2:
            raise ValueError(
                "test_from_train: expected at least two languages with training data, so that each "
                f"item is trained on in another language, got {', '.join(self.trained_languages)}"
            )
        # The test items of different languages differ, and all come from these items.
        items = self.train_per_language + self.test_per_language
        needed = len(self.languages) * self.test_per_language
        if needed > items:
            raise ValueError(
                "test_from_train: expected train_per_language + test_per_language of at least "
                f"{len(self.languages)} languages x {self.test_per_language} test items, {needed}, "
                f"got {items}"
            )
        return self
