"""The interface of the languages of the grammar task: a text for each kind of meaning."""

from __future__ import annotations

from abc import ABC, abstractmethod

from tracmod.tasks.meaning import Deed, Event, Review, State


class Language(ABC):
    """The lexicon and grammar of a language; each method returns a finished, punctuated text."""

    @abstractmethod
    def event(self, event: Event) -> str:
        """Return a sentence on who does what, where and when."""

    @abstractmethod
    def state(self, state: State) -> str:
        """Return a sentence on what someone is like, or where someone is."""

    @abstractmethod
    def deed(self, deed: Deed) -> str:
        """Return a sentence on what a person does to another, with the time first or last."""

    @abstractmethod
    def review(self, review: Review) -> str:
        """Return a sentence on what was bought, and one on two of its aspects."""


def sentence(*parts: str | None, end: str = ".") -> str:
    """Join the parts that are not empty by spaces, with a capital letter and a full stop."""
    text = " ".join(part for part in parts if part)
    return text[0].upper() + text[1:] + end
