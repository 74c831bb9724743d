"""The sentence that follows an unknown name: a near miss if there is one, and the list."""

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant.

    Args:
        name: What was given.
        known: Every valid name.

    Returns:
        A sentence such as "did you mean 'gram'? Valid: 'gram', 'svd'."

    Examples:
        >>> closest("grm", ["svd", "gram"])
        "did you mean 'gram'? Valid: 'gram', 'svd'."
        >>> closest("x", ["svd", "gram"])
        "valid: 'gram', 'svd'."
    """
    options = sorted(known)
    listing = ", ".join(repr(option) for option in options)
    near = difflib.get_close_matches(name, options, n=1)
    return f"did you mean {near[0]!r}? Valid: {listing}." if near else f"valid: {listing}."
