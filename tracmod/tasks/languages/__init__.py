"""The languages of the grammar task by their codes."""

from __future__ import annotations

from tracmod.tasks.languages.base import Language
from tracmod.tasks.languages.chinese import Chinese
from tracmod.tasks.languages.english import English
from tracmod.tasks.languages.french import French
from tracmod.tasks.languages.german import German
from tracmod.tasks.languages.russian import Russian
from tracmod.tasks.languages.spanish import Spanish

LANGUAGES: dict[str, Language] = {
    "de": German(),
    "en": English(),
    "es": Spanish(),
    "fr": French(),
    "ru": Russian(),
    "zh": Chinese(),
}
