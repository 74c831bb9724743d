"""Arguments of the constructors: each is checked before anything is computed with it, and peers' names are answered."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Concatenate, ParamSpec, TypeVar, cast

from steepest.checks import check_keywords, refusal
from steepest.optim.elsewhere import ELSEWHERE
from steepest.optim.options import OPTIONS, check_role

S = TypeVar("S")
P = ParamSpec("P")


def checked_options(
    *, by_role: Collection[str] = ()
) -> Callable[[Callable[Concatenate[S, P], None]], Callable[Concatenate[S, P], None]]:
    """A decorator for constructors: every option in `OPTIONS` is checked before anything is computed with it.

    A value that is the option's default is not looked at: None, mostly.

    Args:
        by_role: Options that may be a mapping from roles to values.
    """

    def decorate(init: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
        _, *declared = inspect.signature(init).parameters.values()
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
            init(self, *args, **kwargs)

        return checking

    return decorate


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
