"""JSON from outside, read field by field: each value is checked for type and range, or an error says what to do."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from steepest.lab.disk.files import RecordError, read_text

__all__ = ["HIGHEST_RATE", "LARGEST", "LOWEST_RATE", "Fields", "RecordError", "parse_object", "read_text"]

LOWEST_RATE, HIGHEST_RATE = 1e-30, 1e9  # a learning rate beyond is a mistake
LARGEST = 2**63  # no step, seed, token or byte count is larger, and all smaller ones convert to float


@dataclass(frozen=True)
class Fields:
    """One JSON object of a file.

    Args:
        path: The file, for error messages.
        values: The object.
        remedy: What to do when a field is wrong; ends every error message.
        where: Place of the object inside the file, such as "line 3: " or "data."; empty at the top.
    """

    path: Path
    values: Mapping[str, object]
    remedy: str
    where: str = ""

    def error(self, key: str, expected: str) -> RecordError:
        """The error to raise when `key` is not `expected`."""
        got = repr(self.values[key])[:80] if key in self.values else "nothing"
        return RecordError(self.path, f"{self.where}{key} must be {expected}, got {got}", self.remedy)

    def expect(self, key: str, value: object) -> None:
        """Check that a field has exactly this value."""
        if self.values.get(key) != value:
            raise self.error(key, repr(value))

    def text(self, key: str) -> str:
        """A string that is not empty."""
        value = self.values.get(key)
        if not isinstance(value, str) or not value:
            raise self.error(key, "a non-empty string")
        return value

    def line(self, key: str) -> str:
        """A string that is not empty, and whose characters all show."""
        if not self.text(key).isprintable():
            raise self.error(key, "a string without control characters")
        return self.text(key)

    def count(self, key: str, *, least: int = 0) -> int:
        """A whole number of at least `least`."""
        value = self.values.get(key)
        if not _is_count(value, least):
            raise self.error(key, f"a whole number of at least {least}")
        return cast(int, value)

    def real(self, key: str) -> float:
        """A finite number."""
        value = self.values.get(key)
        if isinstance(value, float) and math.isfinite(value):
            return value
        if isinstance(value, int) and _is_count(value, -LARGEST):
            return float(value)
        raise self.error(key, "a finite number")

    def seconds(self, key: str) -> float:
        """A finite number of at least 0."""
        value = self.real(key)
        if value < 0:
            raise self.error(key, "a number of seconds of at least 0")
        return value

    def real_or_none(self, key: str) -> float | None:
        """A finite number, or null; the key must be there."""
        return None if self._null(key) else self.real(key)

    def count_or_none(self, key: str) -> int | None:
        """A whole number, or null; the key must be there."""
        return None if self._null(key) else self.count(key)

    def text_or_none(self, key: str) -> str | None:
        """A string that is not empty, or null; the key must be there."""
        return None if self._null(key) else self.text(key)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of different, non-empty strings, at least one."""
        value = self.values.get(key)
        items = cast(list[object], value) if isinstance(value, list) else []
        if not items or not all(isinstance(item, str) and item for item in items) or len(set(items)) < len(items):
            raise self.error(key, "a list of different, non-empty strings")
        return tuple(cast(list[str], items))

    def counts(self, key: str) -> tuple[int, ...]:
        """A list of different whole numbers of at least 0, at least one."""
        value = self.values.get(key)
        items = cast(list[object], value) if isinstance(value, list) else []
        if not items or not all(_is_count(item, 0) for item in items) or len(set(items)) < len(items):
            raise self.error(key, "a list of different whole numbers of at least 0")
        return tuple(cast(list[int], items))

    def inner(self, key: str) -> Fields:
        """A nested object."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return Fields(self.path, cast(dict[str, object], value), self.remedy, f"{self.where}{key}.")

    def inner_or_none(self, key: str) -> Fields | None:
        """A nested object, or null; the key must be there."""
        return None if self._null(key) else self.inner(key)

    def _null(self, key: str) -> bool:
        return key in self.values and self.values[key] is None


def parse_object(text: str, path: Path, *, remedy: str, where: str = "") -> Fields:
    """One JSON object; NaN and infinity are not JSON.

    Raises:
        RecordError: If the text is anything else.
    """
    try:
        value: object = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as problem:
        raise RecordError(path, f"{where}not valid JSON ({problem})", remedy) from None
    if not isinstance(value, dict):
        raise RecordError(path, f"{where}expected a JSON object, got {type(value).__name__}", remedy)
    return Fields(path, cast(dict[str, object], value), remedy, where)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < LARGEST


def _finite(literal: str) -> float:
    value = float(literal)
    return value if math.isfinite(value) else _refuse_constant(literal)


def _refuse_constant(literal: str) -> float:
    raise ValueError(f"{literal} is not a number that JSON knows")
