"""Arguments of the constructors: each is checked before anything is computed with it, and peers' names are answered."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Concatenate, ParamSpec, TypeVar, cast

from steepest.checks import check_keywords, refusal
from steepest.optim.options import OPTIONS, check_role

S = TypeVar("S")
P = ParamSpec("P")

_NO_SWITCH = "Leave it out: parameters are stepped together wherever that is faster."
_COEFFICIENTS = "Write coefficients=: a name such as 'jordan' (five steps), or a list with one (a, b, c) for each step."
_ADAM_LR = "Write adam_lr=, or other_lr= for Scion: the rate of everything that is no matrix."
# What others call it, and what to do here.
ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("fused", "foreach"), _NO_SWITCH),
    **dict.fromkeys(("ns_steps", "backend_steps", "num_ns_steps", "newton_schulz_steps"), _COEFFICIENTS),
    **dict.fromkeys(("ns_coefficients", "ns_coeffs", "coefficient_type", "polar_express"), _COEFFICIENTS),
    **dict.fromkeys(("adjust_lr_fn", "adjust_lr", "scale_mode"), "Write scale='original' or 'match_rms_adamw'."),
    **dict.fromkeys(("momentum_beta", "mu", "beta"), "Write momentum=."),
    **dict.fromkeys(("beta1", "beta2"), "Write betas=(beta1, beta2)."),
    **dict.fromkeys(("adamw_betas", "adam_betas"), "Write betas=."),
    **dict.fromkeys(("adamw_eps", "adam_eps", "epsilon"), "Write eps=."),
    **dict.fromkeys(("adamw_lr", "scalar_lr", "aux_lr", "embed_lr", "head_lr"), _ADAM_LR),
    **dict.fromkeys(("wd", "decay", "adamw_wd", "weight_decay_rate"), "Write weight_decay=."),
    **dict.fromkeys(("learning_rate", "alpha", "muon_lr"), "Write lr=."),
    **dict.fromkeys(
        ("adamw_params", "adam_params", "muon_params", "scalar_params"),
        "Pass the model as the first argument, which sorts its parameters, or groups with a role= each.",
    ),
    **dict.fromkeys(("rank", "world_size"), "Leave it out: every rank takes the whole step."),
    "capturable": "Leave it out: a step never waits for the device. Give lr as a 0-d tensor to change it in a graph.",
    "differentiable": "Leave it out: no gradient flows through a step.",
    "maximize": "Leave it out, and negate the loss.",
    "amsgrad": "Leave it out: there is no such variant; torch.optim.AdamW has it.",
    "use_muon": "Write role='matrix' for True, and role='embedding', 'head' or 'vector' for False.",
    "algorithm": "Write role='matrix' for Muon, and role='embedding', 'head' or 'vector' for the others.",
    "dampening": "Leave it out: averages weigh a new gradient with 1 - momentum.",
    "lower_bound": "Write step_size=Momo(lower_bound=...).",
}


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
