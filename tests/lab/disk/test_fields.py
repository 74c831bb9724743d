"""JSON from outside: what is wrong is told by key, or as far as it can be, and never as another kind of error."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from steepest.lab.disk.fields import RecordError, RunName, decode, wrong
from tests.cases import cases

PATH = Path("it.json")


class Inner(msgspec.Struct):
    count: Annotated[int, Meta(ge=1)]


class Outer(msgspec.Struct):
    runs: Mapping[RunName, Inner] = {}
    lists: Mapping[str, tuple[float, ...]] = {}
    kind: Literal["a", "b", "c"] = "a"
    mixed: int | float | str | None = None


def told(text: str) -> str:
    with pytest.raises(RecordError, match=r"^it\.json: here: .*\. Mend it\.$") as caught:
        decode(Outer, text, PATH, remedy="Mend it.", where="here: ")
    return caught.value.problem.removeprefix("here: ")


@cases(
    "text, message",
    [
        (
            '{"runs": {"0000000000000000": {"count": 0}}}',
            "runs.0000000000000000.count must be a whole number of",
        ),
        ('{"runs": {"0000000000000000": {}}}', "runs.0000000000000000.count is missing"),
        ('{"runs": {"../x": {"count": 1}}}', "runs.../x must be named by 16 hexadecimal digits"),
        ('{"lists": {"a": [1], "b": [1, true]}}', "lists.b.1 must be a finite number, got True"),
        ('{"kind": "d"}', "kind must be 'a', 'b' or 'c', got 'd'"),
        ('{"mixed": []}', "mixed must be a finite number, a string or null, got []"),
    ],
)
def test_the_key_is_named(text: str, message: str) -> None:
    assert told(text).startswith(message)


@cases(
    "text, message",
    [
        ('{"lists": {"a": [1, "x"]}, "lists": {}}', "lists.?.1 must be a finite number"),
        ('{"lists": {"a": [1, "x"]}, "lists": 3}', "lists.?.1 must be a finite number"),
        ('{"runs": {"x": 1}, "runs": []}', "runs.? must be named by 16 hexadecimal digits"),
        ('{"lists": {"a": [1, "x"]}, "kind": ', "lists.?.1 must be a finite number"),
        ('{"runs": {"0000000000000000": 3}, "deep": ' + "[" * 5000, "runs.? must be an object"),
        ('{"kind": "d", ', "kind must be 'a', 'b' or 'c'"),
    ],
)
def test_what_is_damaged_twice_is_told_as_far_as_it_is_known(text: str, message: str) -> None:
    assert told(text) == message


KEYS = st.sampled_from(["runs", "lists", "kind", "mixed", "count", "0" * 16, "- at `$.kind`", ""])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | KEYS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=3),
)


@given(JSON, st.integers(0, 3))
def test_nothing_gets_through_as_another_kind_of_error(value: object, cut: int) -> None:
    text = msgspec.json.encode(value).decode()
    for damaged in (text, text[: len(text) - cut], text[:-1] + "," + text[1:]):
        with contextlib.suppress(RecordError):
            decode(Outer, damaged, PATH, remedy="Mend it.")


def test_long_values_are_cut_in_errors() -> None:
    assert len(str(wrong("key", "short", "x" * 500))) < 150
