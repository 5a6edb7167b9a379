"""What every language of the embedded task can do: put each kind of meaning into one text."""

from __future__ import annotations

from abc import ABC, abstractmethod

from tracmod.tasks.meaning import Deed, Event, Review, State


class Language(ABC):
    """One language's lexicon and grammar; each method returns finished, punctuated text."""

    @abstractmethod
    def event(self, event: Event) -> str:
        """Say who does what, where and when."""

    @abstractmethod
    def state(self, state: State) -> str:
        """Say that somebody is, or is not, so or there."""

    @abstractmethod
    def deed(self, deed: Deed) -> str:
        """Say what one person does to another, the time before or after it."""

    @abstractmethod
    def review(self, review: Review) -> str:
        """Say what was bought and how two of its aspects are."""


def sentence(*parts: str | None, end: str = ".") -> str:
    """Join the parts that are there by spaces, with a capital letter and a full stop."""
    text = " ".join(part for part in parts if part)
    return text[0].upper() + text[1:] + end
