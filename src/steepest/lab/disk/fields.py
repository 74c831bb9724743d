"""JSON from outside, decoded into typed records: a value has the type and range that is declared, or is refused.

The types below say more than a bare `int` or `str`; a record is any class that `msgspec` decodes. What one field cannot
say of another stands in the `__post_init__` of the record, which raises what `wrong` returns.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec
from msgspec import Meta, inspect

from steepest.lab.disk.files import RecordError, read_text

__all__ = ["HIGHEST_RATE", "HUGE", "LARGEST", "LOWEST_RATE", "RecordError", "decode", "parse_object", "read_text"]

LOWEST_RATE, HIGHEST_RATE = 1e-30, 1e9  # a learning rate beyond is a mistake
LARGEST = 2**63  # no step, seed, token or byte count is larger, and all smaller ones convert to float
HUGE = 1e100  # float64 holds larger numbers, but not their sums; a loss above it has diverged

Count = Annotated[int, Meta(ge=0, le=LARGEST - 1)]
Positive = Annotated[int, Meta(ge=1, le=LARGEST - 1)]
Text = Annotated[str, Meta(min_length=1)]
Texts = Annotated[tuple[Text, ...], Meta(min_length=1)]
Counts = Annotated[tuple[Count, ...], Meta(min_length=1)]
Seconds = Annotated[float, Meta(ge=0, le=HUGE)]
Rate = Annotated[float, Meta(ge=LOWEST_RATE, lt=HIGHEST_RATE)]
NAME = re.compile(r"^[0-9a-f]{16}\Z")  # of a run; it becomes a path
RunName = Annotated[str, Meta(pattern=NAME.pattern)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]

T = TypeVar("T")
_WORDS = {
    "int": "a whole number",
    "float": "a finite number",
    "str": "a string",
    "bool": "true or false",
    "object": "an object",
    "array": "a list",
    "null": "null",
}


class Versioned(msgspec.Struct):
    """What every record says first: a later format may mean other things by the same keys."""

    format: Literal[1]


def decode(kind: type[T], text: str, path: Path, *, remedy: str, where: str = "") -> T:
    """A record from its JSON text; keys that it does not declare are left out.

    Args:
        kind: Of the record.
        text: JSON, without NaN and infinity.
        path: The file, for error messages.
        remedy: What to do about it; ends every error message.
        where: Place of the record inside the file, such as "line 3: "; empty for the whole file.

    Raises:
        RecordError: If the text is anything else; it names file, key, what was expected, and what there is.
    """
    try:
        return cast(T, _decoder(kind).decode(text))
    except msgspec.ValidationError as problem:
        raise RecordError(path, f"{where}{_told(kind, text, str(problem))}", remedy) from None
    except (msgspec.DecodeError, ValueError, RecursionError) as problem:
        raise RecordError(path, f"{where}not valid JSON ({problem})", remedy) from None


def parse_object(text: str, path: Path, *, remedy: str, where: str = "") -> dict[str, Any]:
    """A JSON object of which nothing is known; arguments and errors as of `decode`."""
    return decode(dict[str, Any], text, path, remedy=remedy, where=where)


def wrong(key: str, expected: str, got: object) -> ValueError:
    """What a record raises that contradicts itself: "KEY must be EXPECTED, got GOT"."""
    return ValueError(f"{key} must be {expected}, got {repr(got)[:80]}")


def check_distinct(key: str, values: Iterable[object]) -> None:
    """Refuse a list in which something occurs twice.

    Raises:
        ValueError: As of `wrong`.
    """
    if len(set(found := list(values))) < len(found):
        raise wrong(key, "a list of different values", found)


@functools.cache
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def _told(kind: Any, text: str, problem: str) -> str:
    """What the library says, in the words of this house: by name of the key, and with what there is."""
    found = re.search(r" - at (`key` in )?`\$([^`]*)`$", problem)
    what, place = (problem[: found.start()], found[2]) if found else (problem, "")
    document, keys = _document(text), list[str]()
    whole = isinstance(document, dict) and place[1:] in document  # as "result.json" is one key
    for name in [place[1:]] if whole else re.findall(r"[^.\[\]]+|(?<=\[)\.\.\.", place):
        keys.append(_culprit(kind, document, keys, problem) if name == "..." else name)
    value = _value(document, keys)
    if other := re.match("Object (missing required|contains unknown) field `(.*)`", what):
        return f"{'.'.join([*keys, other[2]])} {'is missing' if other[1].startswith('missing') else 'must be absent'}"
    if found and found[1]:
        bad = next((key for key in value if not NAME.match(key)), "?") if isinstance(value, dict) else "?"
        return f"{'.'.join([*keys, bad])} must be named by 16 hexadecimal digits"
    if (expected := _expected(kind, keys, what)) is None:
        return what
    got = "" if value is ... else f", got {repr(value)[:80]}"
    return f"{'.'.join(keys) or 'the content'} must be {expected}{got}"


def _document(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):  # damaged further on, too
        return ...


def _value(document: Any, keys: list[str]) -> Any:
    """What stands there, or `...`: of a key that is there twice, it is the last, and another may be meant."""
    value = document
    for key in keys:
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (LookupError, TypeError, ValueError):
            return ...
    return value


def _expected(kind: Any, keys: list[str], what: str) -> str | None:
    """What a field must be; None if the record itself has said it."""
    if what == "Number out of range":
        return _WORDS["float"]
    if what.startswith("Invalid RFC3339"):
        return "a time such as 2025-01-31T12:00:00+00:00"
    if what.startswith("Invalid "):
        return _listed([repr(choice) for choice in _choices(inspect.type_info(kind), keys)])
    match = re.match(r"Expected `([^`]*)`(?:, got `[^`]*`)?(.*)$", what, flags=re.DOTALL)
    if match is None:
        return None
    names, limit = match[1].split(" | "), match[2]
    types = _listed([_WORDS.get(name, name) for name in names if name != "int" or "float" not in names])
    if digits := re.search(r"\{(\d+)\}\\+Z'$", limit):
        return f"{digits[1]} hexadecimal digits"
    if limit == " of length >= 1":
        return types.replace("a ", "a non-empty ", 1)
    return types + limit.replace(" >= ", " of at least ").replace(" <= ", " of at most ").replace(" < ", " below ")


def _listed(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _choices(info: inspect.Type, keys: list[str]) -> list[object]:
    """The values of a field that may have some only; of a key that tells kinds of records apart, these."""
    options = info.types if isinstance(info, inspect.UnionType) else (info,)
    if not keys:
        return [value for one in options if isinstance(one, inspect.LiteralType) for value in one.values]
    records = [one for one in options if isinstance(one, inspect.StructType | inspect.DataclassType)]
    for record in records:
        for field in record.fields:
            if field.encode_name == keys[0]:
                return _choices(field.type, keys[1:])
    return [record.tag for record in records if isinstance(record, inspect.StructType)]


def _culprit(kind: Any, document: Any, keys: list[str], problem: str) -> str:
    """Which entry of an object is meant, of which the library says only that it is one of them; "?" if none can be."""

    def with_only(value: Any, keys: list[str], entry: str) -> Any:
        if not keys:
            return {entry: value[entry]}
        return {**value, keys[0]: with_only(value[keys[0]], keys[1:], entry)}

    inner = _value(document, keys)
    for entry in inner if isinstance(inner, dict) else ():
        try:
            msgspec.convert(with_only(document, keys, entry), kind)
        except msgspec.ValidationError as again:
            if str(again) == problem:
                return str(entry)
    return "?"
