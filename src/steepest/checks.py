"""One check for every option: it knows the option's name, what came, what was expected, and what to write instead.

A check is a function of a name and a value. It returns the value to use, in plain Python numbers, or raises. Tables
from option to check stand where the options are declared, and `check_fields` goes through such a table.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, cast

from torch import Tensor

from steepest.names import near_miss, unknown_name

Check = Callable[[str, object], Any]
LONGEST = 120  # characters of a value in a message
WIDEST = 256  # bits of an integer that is written out


def shown(value: object) -> str:
    """A value for a message, on one line and of bounded length.

    Args:
        value: Anything.

    Examples:
        >>> shown("1e-3"), shown(10**400)
        ("'1e-3'", 'an integer of 1329 bits')
    """
    if isinstance(value, Tensor) and (value.numel() != 1 or value.ndim):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, int) and value.bit_length() > WIDEST:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, list | tuple) and any(isinstance(entry, int) for entry in cast(Sequence[object], value)):
        members = cast(Sequence[object], value)
        entries = ", ".join(map(shown, members[:LONGEST]))
        text = f"[{entries}]" if isinstance(value, list) else f"({entries}{',' * (len(members) == 1)})"
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}... (of type {type(value).__name__})"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 - a value that cannot even be printed is still to be refused by name
        text = f"an object of type {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... (of type {type(value).__name__})"


def refusal(name: str, expected: str, value: object, remedy: str = "") -> str:
    """The text of an error about an option.

    Args:
        name: Of the option, with who has it.
        expected: What it must be.
        value: What came.
        remedy: What to write instead.
    """
    return f"{name} must be {expected}, got {shown(value)}.{' ' * bool(remedy)}{remedy}"


def number(
    low: float = 0.0, high: float = math.inf, *, above: bool = False, up_to: bool = False, infinite: bool = False
) -> Check:
    """A check for real numbers of any kind, NumPy's too.

    Args:
        low: Least value.
        high: Bound, not reached.
        above: Whether `low` itself is refused.
        up_to: Whether `high` itself is allowed.
        infinite: Whether minus infinity is allowed where `low` is.
    """
    expected = _interval(low, high, above, up_to)

    def check(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(refusal(name, "a number", value, _number_instead(name, value)))
        try:
            given = float(value)
        except OverflowError:
            given = math.inf
        inside = (low < given if above else low <= given) and (given <= high if up_to else given < high)
        if not inside or (math.isinf(given) and not infinite):
            raise ValueError(refusal(name, expected, value))
        return given

    return check


def whole(least: int) -> Check:
    """A check for whole numbers.

    Args:
        least: Least value.
    """

    def check(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(refusal(name, "a whole number", value, _whole_instead(name, value)))
        if value < least:
            raise ValueError(refusal(name, f"at least {least}", value))
        return int(value)

    return check


def flag(name: str, value: object) -> bool:
    """Check for True and False."""
    if not isinstance(value, bool):
        raise TypeError(refusal(name, "True or False", value))
    return value


def choice(valid: Iterable[str]) -> Check:
    """A check for one of several words.

    Args:
        valid: The words.
    """
    words = tuple(valid)

    def check(name: str, value: object) -> str:
        if not isinstance(value, str):
            raise TypeError(refusal(name, f"one of {', '.join(map(repr, sorted(words)))}", value))
        if value not in words:
            who, _, option = name.rpartition(": ")
            raise ValueError(f"{who}{': ' * bool(who)}{unknown_name(option, value, words)}")
        return value

    return check


def pair(each: Check, expected: str) -> Check:
    """A check for two values in a tuple or list.

    Args:
        each: Check of both.
        expected: What they must be together.
    """

    def check(name: str, value: object) -> tuple[Any, Any]:
        if not isinstance(value, tuple | list) or len(cast(Sequence[object], value)) != 2:
            raise TypeError(refusal(name, expected, value))
        first, second = cast(Sequence[object], value)
        try:
            return each(name, first), each(name, second)
        except (TypeError, ValueError) as error:
            raise type(error)(refusal(name, expected, value)) from error

    return check


def instance(kinds: type | tuple[type, ...], expected: str) -> Check:
    """A check for objects of a kind.

    Args:
        kinds: The classes.
        expected: What they are, in words.
    """

    def check(name: str, value: object) -> Any:
        if not isinstance(value, kinds):
            raise TypeError(refusal(name, expected, value))
        return value

    return check


def optional(check: Check) -> Check:
    """The same check, or None.

    Args:
        check: For everything else.
    """
    return lambda name, value: None if value is None else check(name, value)


def check_fields(owner: object, checks: Mapping[str, Check]) -> None:
    """Put the fields of a frozen dataclass through their checks, and keep what these return.

    Args:
        owner: The object; its class is named in messages.
        checks: From field to check.

    Raises:
        ValueError: If a value is out of range or unknown.
        TypeError: If one is of the wrong type.
    """
    for field, check in checks.items():
        object.__setattr__(owner, field, check(f"{type(owner).__name__}: {field}", getattr(owner, field)))


def check_keywords(who: str, given: Iterable[str], valid: Sequence[str], elsewhere: Mapping[str, str]) -> None:
    """Refuse keyword arguments that are none, and say what to write here.

    Args:
        who: Whose arguments.
        given: Their names.
        valid: Names that there are.
        elsewhere: From a name that others have to what to do here.

    Raises:
        TypeError: If one is not valid.
    """
    for name in given:
        if name not in valid:
            remedy = elsewhere[name] if name in elsewhere else near_miss(name, valid).strip()
            listed = f"Options are {', '.join(valid)}."
            raise TypeError(f"{who} has no option {name!r}. {remedy or listed}")


def _interval(low: float, high: float, above: bool, up_to: bool) -> str:
    if math.isfinite(high):
        return f"in {'(' if above else '['}{low:g}, {high:g}{']' if up_to else ')'}"
    if math.isinf(low):
        return "a number below infinity"
    return f"finite and {'above' if above else 'at least'} {low:g}"


def _number_instead(name: str, value: object) -> str:
    option = name.rpartition(": ")[-1]
    if value is None:
        return "Leave it out for the default."
    if isinstance(value, str):
        try:
            return f"Write {option}={float(value)!r}, without quotes; YAML reads 1e-3 as text, 1.0e-3 as a number."
        except ValueError:
            return ""
    if isinstance(value, Tensor):
        return "Write .item() of it." if value.numel() == 1 else ""
    return ""


def _whole_instead(name: str, value: object) -> str:
    option = name.rpartition(": ")[-1]
    if isinstance(value, float) and value.is_integer():
        return f"Write {option}={int(value)}."
    return "Leave it out for the default." if value is None else ""
