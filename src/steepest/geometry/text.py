"""Objects as the text that builds them, `Spectral(scale='none')`, and back: read as data, never run."""

import ast
from collections.abc import Mapping
from typing import Any

import torch

NUMBERS = {"inf": float("inf"), "nan": float("nan")}  # which print without quotes


class Textual:
    """Options as data: equal to what has the same type and options, and to the text that builds it.

    Groups of an optimizer hold the text, so that any checkpoint of them can be read; code that compares it with an
    object goes on.
    """

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            return str.__eq__(other, text_of(self))
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash(text_of(self))


def text_of(thing: object) -> str:
    """The text that stands for an object: the same in every process, whatever its class prints.

    Args:
        thing: A norm, a view or the like.

    Returns:
        "Name(options)", or "Name(...)" where these are not known.
    """
    kind, text = type(thing), repr(thing)
    for name in (kind.__qualname__, kind.__name__):
        if text.startswith(f"{name}("):
            return kind.__name__ + text.removeprefix(name)
    return f"{kind.__name__}(...)"


def built(text: str, kinds: Mapping[str, type]) -> Any:
    """The object that a text builds.

    Args:
        text: "Name(option=value, ...)", where a value is a literal, a torch dtype, or such a text itself.
        kinds: The classes that may be named.

    Returns:
        The object.

    Raises:
        ValueError: If the text is not of this form, or names something else.
        TypeError: If the class does not take the options.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    if not isinstance(tree, ast.Call):
        raise ValueError(f"{text!r} is not of the form Name(option=value); known are {', '.join(sorted(kinds))}.")
    return _value(tree, text, kinds)


def _value(node: ast.expr, text: str, kinds: Mapping[str, type]) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds:
        options = {option.arg: _value(option.value, text, kinds) for option in node.keywords if option.arg}
        if not node.args and len(options) == len(node.keywords):
            return kinds[node.func.id](**options)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        found = getattr(torch, node.attr, None)
        if isinstance(found, torch.dtype):
            return found
    if isinstance(node, ast.Name) and node.id in NUMBERS:
        return NUMBERS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        items = [_value(item, text, kinds) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError) as problem:
        word = ast.unparse(node)
        raise ValueError(f"{text!r} has {word!r}; known are {', '.join(sorted(kinds))}, and literals.") from problem
