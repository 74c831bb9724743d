"""What to answer when a name is not known: the valid ones, and the one that was probably meant."""

import difflib
from collections.abc import Iterable, Sequence


def unknown_name(kind: str, name: object, valid: Iterable[str]) -> str:
    """One sentence for an error.

    Args:
        kind: What the name stands for.
        name: What was given.
        valid: All names that would have worked.

    Returns:
        The sentence.

    Examples:
        >>> unknown_name("task", "txet", ["text", "digits"])
        "Unknown task 'txet': did you mean 'text'? Valid: digits, text."
        >>> unknown_name("task", "x", ["text", "digits"])
        "Unknown task 'x'. Valid: digits, text."
    """
    names = sorted(valid)
    close = difflib.get_close_matches(str(name), names, n=1)
    guess = f": did you mean {close[0]!r}?" if close else "."
    return f"Unknown {kind} {name!r}{guess} Valid: {', '.join(names)}."


def near_miss(word: str, valid: Sequence[str]) -> str:
    """A suggestion to append to an error.

    Args:
        word: What was typed.
        valid: What could have been typed.

    Returns:
        " Did you mean 'x'?", or nothing if no candidate is close.
    """
    close = difflib.get_close_matches(word, valid, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
