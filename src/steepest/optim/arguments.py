"""Arguments of the constructors: each is checked before anything is computed with it, and peers' names are answered."""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from steepest.checks import check_keywords, refusal
from steepest.optim.options import ELSEWHERE, OPTIONS, check_role, chosen_step_size

S = TypeVar("S")
P = ParamSpec("P")


def checked_options(
    *, by_role: Collection[str] = (), signature: inspect.Signature | None = None
) -> Callable[[Callable[Concatenate[S, P], None]], Callable[Concatenate[S, P], None]]:
    """A decorator for constructors: every option in `OPTIONS` is checked before anything is computed with it.

    A value that is the option's default is not looked at: None, mostly. Where `momo` is an option, it is answered here.

    Args:
        by_role: Options that may be a mapping from roles to values.
        signature: Of the constructor, if it shows more than is written there.
    """

    def decorate(init: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
        _, *declared = (signature or inspect.signature(init)).parameters.values()
        defaults = {parameter.name: parameter.default for parameter in declared}
        positional = [p.name for p in declared if p.kind is p.POSITIONAL_OR_KEYWORD]

        @functools.wraps(init)
        def checking(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
            who = type(self).__name__
            check_keywords(who, kwargs, list(defaults), ELSEWHERE)
            if len(args) > len(positional):
                raise TypeError(
                    f"{who} takes {' and '.join(positional)} by position, got {len(args)} values; write the others by "
                    "name, such as momentum=0.9."
                )
            for option, value in {**dict(zip(positional, args, strict=False)), **kwargs}.items():
                if option in OPTIONS and value is not defaults[option]:
                    _check_option(who, option, value, several=option in by_role)
            if "momo" in kwargs:
                kwargs["step_size"] = chosen_step_size(
                    cast(Any, kwargs.pop("momo")), cast(Any, kwargs.get("step_size"))
                )
            init(self, *args, **kwargs)

        if signature is not None:
            cast(Any, checking).__signature__ = signature
        return checking

    return decorate


def with_shared(signature: inspect.Signature, defaults: Mapping[str, object]) -> inspect.Signature:
    """A signature whose `**options: Unpack[...]` is written out as keywords.

    Args:
        signature: The last parameter may be such a one.
        defaults: Of all keys of the typed dictionary.
    """
    *declared, last = signature.parameters.values()
    if last.kind is not last.VAR_KEYWORD:
        return signature
    (shared,) = last.annotation.__args__
    written = [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=defaults[key], annotation=kind)
        for key, kind in shared.__annotations__.items()
    ]
    return signature.replace(parameters=[*declared, *written])


def texts_of_keys(source: str) -> dict[str, str]:
    """What stands under the keys of the typed dictionaries of a file, where editors look for it too.

    Args:
        source: Of the file.
    """
    found: dict[str, str] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            for key, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name) and isinstance(text, ast.Expr):
                    found[key.target.id] = " ".join(str(cast(ast.Constant, text.value).value).split())
    return found


ENTRY = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
SECTION = re.compile(r"\n\nArgs:\n(?P<entries>(?: {4}.*\n?)+)")
RAISES = """Raises:
    ValueError: If an option or parameter does not fit.
    TypeError: If an option or parameter is of the wrong type."""


def texts_of(doc: str | None) -> dict[str, str]:
    """The entries of a docstring's "Args"."""
    section = SECTION.search(inspect.cleandoc(doc or ""))
    return {name: " ".join(text.split()) for name, text in ENTRY.findall(section["entries"])} if section else {}


def with_all_texts(doc: str, options: Iterable[str], texts: Iterable[Mapping[str, str]]) -> str:
    """A docstring in which every option has its text.

    Args:
        doc: What it says of some.
        options: All, in order.
        texts: What is said of options elsewhere; the first that knows one counts.
    """
    doc = inspect.cleandoc(doc)
    known = [texts_of(doc), *texts]
    entries = [next((f"{option}: {own[option]}" for own in known if option in own), option) for option in options]
    lines = [textwrap.fill(entry, 116, initial_indent=" " * 4, subsequent_indent=" " * 8) for entry in entries]
    section = SECTION.search(doc)
    before, after = (doc[: section.start()], doc[section.end() :].lstrip("\n")) if section else (doc, "")
    return "\n\n".join(part for part in (before, "\n".join(["Args:", *lines]), RAISES, after.rstrip()) if part) + "\n"


def _check_option(who: str, option: str, value: object, *, several: bool) -> None:
    name = f"{who}: {option}"
    if not isinstance(value, Mapping):
        OPTIONS[option](name, value)
    elif several:
        for role, own in cast(Mapping[object, object], value).items():
            check_role(role, where=name)
            OPTIONS[option](f"{name}[{role!r}]", own)
    else:
        other = "; everything else has adam_lr= or other_lr=" if option == "lr" else ""
        remedy = f"A mapping from roles is for SteepestDescent{other}."
        raise TypeError(refusal(name, "one value", value, remedy))
