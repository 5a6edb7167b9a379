"""X-MOD's language adapters: which of them an example goes through.

Every layer of X-MOD has an adapter for each language, and an example goes through that of its own.
A model whose config has a `default_language` takes that one for all examples.

Source: Pfeiffer et al. 2022, "Lifting the curse of multilinguality" (arXiv 2205.06266).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LANGUAGE_COLUMN = "lang_ids"  # as transformers names the input


def has_language_adapters(config: Any) -> bool:
    """Return whether a model takes the number of each example's language."""
    return getattr(config, "model_type", None) == "xmod"


def with_language_ids(
    config: Any, examples: Sequence[Mapping[str, Any]], languages: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Give every example the number of its language's adapter, if the model needs one.

    Args:
        config: The model's config.
        examples: Encoded examples.
        languages: The language of each, as in the config (`de_DE`) or without the part after the
            underscore (`de`), where only one language of the config begins so; None if unknown.

    Raises:
        ValueError: The model needs the languages of examples, and has no adapter for one of them,
            several, or they are unknown.
    """
    if not has_language_adapters(config) or config.default_language is not None:
        return [dict(example) for example in examples]
    if languages is None:
        raise ValueError(
            "language: expected that of the text (--text-language) for X-MOD without a "
            "default_language in its config, got none"
        )
    number_of = {language: _adapter(config.languages, language) for language in set(languages)}
    return [
        {**example, LANGUAGE_COLUMN: number_of[language]}
        for example, language in zip(examples, languages, strict=True)
    ]


def _adapter(own: Sequence[str], language: str) -> int:
    """Return the number of a language's adapter."""
    if language in own:
        return list(own).index(language)
    matching = [number for number, name in enumerate(own) if name.partition("_")[0] == language]
    if len(matching) != 1:
        raise ValueError(
            f"language {language}: expected one of the languages of the model's adapters, "
            f"{', '.join(own)}, got {len(matching)} that match"
        )
    return matching[0]
