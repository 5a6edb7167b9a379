"""The base of all sections of a configuration: strict keys, and numbers that are numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationInfo,
    field_validator,
)

from tracmod.choices import (
    LARGEST_INT,
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse booleans and text for numbers, which pydantic would convert."""
        assert info.field_name is not None
        if _is_numeric(cls.model_fields[info.field_name].annotation):
            values = value.values() if isinstance(value, dict) else value
            for number in values if isinstance(values, Iterable) else [values]:
                if isinstance(value, str) or isinstance(number, bool | str):
                    raise ValueError(f"expected a number, got {value!r}")
                if isinstance(number, int) and abs(number) > LARGEST_INT:
                    raise ValueError(f"expected at most {LARGEST_INT}, got {number}")
        return value


def _is_numeric(annotation: Any) -> bool:
    """Return whether a field holds numbers, or lists or dicts of numbers, and nothing else."""
    if annotation in (int, float):
        return True
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _is_numeric(arguments[0])
    if origin in (list, dict):
        return _is_numeric(arguments[-1])
    if origin in (Union, UnionType):
        return all(part is NoneType or _is_numeric(part) for part in arguments)
    return False


def repeated(names: Sequence[str]) -> str:
    """Return the names that occur more than once, joined by commas."""
    return ", ".join(sorted({name for name in names if names.count(name) > 1}))
