"""Options of a parameter group: their names, what they may be, and one value per role."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from steepest.anatomy import ROLES, Role
from steepest.checks import Check, choice, flag, number, optional, pair, refusal, shown
from steepest.geometry import AdaInf, Norm, Spectral
from steepest.geometry.layer import check_norm
from steepest.optim.decay import Decay
from steepest.optim.groups import AVERAGES, plain, settle_averages
from steepest.optim.momentum import Averages
from steepest.optim.momo.model import FURTHER_KEYS, MODEL_KEYS, Momo, StepSize
from steepest.optim.storage import ROUNDING, check_momentum_dtype
from steepest.stages import KNOWN

# What users may write into a group. Everything the optimizer keeps per group is declared here and at construction,
# because a key that appears later is dropped by distributed checkpoints.
GROUP_KEYS = ("params", "name", "role", "norm", "view", "lr", "momentum", "nesterov", "weight_decay", "betas", "beta2")
# Options of norms that a group may set for its own.
NORM_OPTIONS = ("eps", "scale", "coefficients", "polar", "dtype", "p")
CLOSE = 0.8  # likeness from which a key counts as a mistyped option, unless it has more words
HOSTS = ("type", "names")  # keys of others that are that close
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that a step can work on
# torch and its schedulers add these to groups they have seen.
FOREIGN_KEYS = (
    "param_names",
    "initial_lr",
    "max_lr",
    "min_lr",
    "base_momentum",
    "max_momentum",
    "skipped_steps",
    "steps_taken",
    "optimizer",
    "decay_kind",
    AVERAGES,
    "family",
    *(key for kind in KNOWN for key in kind.group_keys),
    *MODEL_KEYS,
    *FURTHER_KEYS,
)
# What other optimizers call their options, and what to write here.
_NO_SWITCH = "Leave it out: parameters are stepped together wherever that is faster."
_COEFFICIENTS = "Write coefficients=: a name such as 'jordan' (five steps), or a list with one (a, b, c) for each step."
_ADAM_LR = "Write adam_lr=, or other_lr= for Scion: the rate of everything that is no matrix."
SORTING = ("use_muon", "algorithm")  # which say something with every value
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
T = TypeVar("T")
METHOD = "optimizer"  # whose state it is, as a text
ADAM_BETAS = (0.9, 0.95)
STEPS_TAKEN = "steps_taken"  # by the optimizer, masked ones included

DEFAULT_NORMS: Mapping[Role, Norm] = {
    "matrix": Spectral(),
    "embedding": AdaInf(),
    "head": AdaInf(),
    "vector": AdaInf(),
}


def check_rate(name: str, value: object) -> float | Tensor:
    """Check of a learning rate: a number, or a tensor with one, which on an accelerator stays unread."""
    if not isinstance(value, Tensor):
        return _AT_LEAST_0(name, value)
    if value.numel() != 1 or not value.is_floating_point():
        what = f"shape {tuple(value.shape)}" if value.numel() != 1 else str(value.dtype)
        raise TypeError(f"{name} as a tensor must be a 0-d real number, got {what}.")
    if value.device.type == "cpu":
        _AT_LEAST_0(name, value.item())
    return value.detach().reshape(())


def check_decay(name: str, value: object) -> float | Decay:
    """Check of a weight decay: a number, or a kind of decay with one."""
    return value if isinstance(value, Decay) and not isinstance(value, type) else _AT_LEAST_0(name, value)


_AT_LEAST_0 = number()
_ABOVE_0 = number(above=True)
_PART = number(high=1.0)
_check_pair = pair(_PART, "two numbers in [0, 1)")


def check_momentum(name: str, value: object) -> float | Averages:
    """Check of a momentum: a number, or several averages."""
    return value if isinstance(value, Averages) else _PART(name, value)


def check_betas(name: str, value: object) -> tuple[float | Averages, float]:
    """Check of Adam's two numbers, the first of which may be several averages."""
    if isinstance(value, tuple | list) and value and isinstance(value[0], Averages):
        _, second = _check_pair(name, (0.0, *value[1:]))
        return value[0], second
    return _check_pair(name, value)


def check_group_of_ranks(name: str, value: object) -> Any:
    """A process group, or None.

    Raises:
        TypeError: If it is something else.
    """
    kind = torch.distributed.ProcessGroup if torch.distributed.is_available() else type(None)
    if value is None or isinstance(value, kind):
        return value
    told = "a process group, such as torch.distributed.group.WORLD or mesh.get_group()"
    raise TypeError(refusal(name, told, value))


def check_wire(name: str, value: object) -> torch.dtype | None:
    """A type of real floating point with the range of float32, or None.

    Raises:
        TypeError: If it is something else.
    """
    if value is None or (isinstance(value, torch.dtype) and value in (torch.bfloat16, torch.float32, torch.float64)):
        return value
    raise TypeError(refusal(name, "torch.bfloat16, torch.float32, torch.float64 or None", value))


# Options of the optimizers that are numbers, flags and of ranks. Those of norms, step sizes and preconditioning are
# checked by the objects that have them.
OPTIONS: Mapping[str, Check] = {
    "process_group": check_group_of_ranks,
    "exchange_dtype": check_wire,
    "rounding": choice(ROUNDING),
    "momentum_dtype": check_momentum_dtype,
    "lr": check_rate,
    "adam_lr": check_rate,
    "other_lr": check_rate,
    "momentum": check_momentum,
    "nesterov": flag,
    "weight_decay": check_decay,
    "betas": optional(check_betas),
    "beta2": _PART,
    "eps": _AT_LEAST_0,
    "radius": _ABOVE_0,
    "head_radius": _ABOVE_0,
    "constrained": flag,
    "regularized": flag,
}
BELOW = {"lr": math.inf, "momentum": 1.0, "weight_decay": math.inf, "beta2": 1.0}  # bounds of what schedulers may write
NUMBERS = ("lr", "momentum", "nesterov", "weight_decay", "beta2")  # and flags, in every group
PER_ROLE = ("lr", "momentum", "nesterov", "weight_decay", "betas")  # what may be a mapping from roles


def for_role(option: str, value: object, role: Role) -> object:
    """An option's value for one role: the value itself, or its entry if it is a mapping from roles.

    Args:
        option: Name, for the message.
        value: A value, or a mapping from role to value.
        role: Which.

    Returns:
        The value.

    Raises:
        ValueError: If the mapping has no entry for the role, or an entry for something that is no role.
    """
    if not isinstance(value, Mapping):
        return value
    for key in cast(Mapping[object, object], value):
        check_role(key, where=option)
    if role not in value:
        raise ValueError(f"{option}={dict(value)} has no entry for the role {role!r}, which this model has; add one.")
    return value[role]


def per_role(matrix: T, others: T, vector: T | None = None) -> dict[Role, T]:
    """A value for matrices, and one for everything else.

    Args:
        matrix: Of matrices.
        others: Of embeddings, heads and vectors.
        vector: Of vectors, if these have one of their own.
    """
    return {"matrix": matrix, "embedding": others, "head": others, "vector": others if vector is None else vector}


def chosen_step_size(momo: bool, step_size: StepSize | None) -> StepSize | None:
    """What a recipe's two ways of asking for Momo come to.

    Raises:
        ValueError: If both are used.
        TypeError: If `momo` is no boolean.
    """
    if not isinstance(cast(object, momo), bool):
        raise TypeError(refusal("momo", "True or False", momo, "Options of Momo go into step_size=Momo(...)."))
    if momo and step_size is not None:
        raise ValueError(f"momo=True and step_size={step_size!r} are two answers to one question; give one of them.")
    return Momo() if momo else step_size


def complete_group(group: dict[str, Any], where: str, defaults: Mapping[str, Any], *, momo: bool) -> None:
    """Fill in what a group leaves open; `momentum` is the weight of the old average of gradients in every group.

    Args:
        group: With a "role"; written to.
        where: Which group, for messages.
        defaults: Option to value, or to a mapping from role to value.
        momo: Whether steps are Momo's, for which all groups need one momentum.

    Raises:
        ValueError: If the role is none, or betas are given to a norm that does not adapt.
        TypeError: If betas are not two numbers.
    """
    check_role(group["role"], where=where)
    role = cast(Role, group["role"])

    def default(option: str) -> Any:
        return for_role(option, defaults[option], role)

    given = group["norm"] if "norm" in group else default("norm")
    norm = group["norm"] = _with_options(check_norm(f"{where}: norm", given), group, where)
    if norm.adapts:
        given = "betas" in group
        betas = group.pop("betas") if given else default("betas")
        if betas is None:
            betas = (default("momentum") if momo else ADAM_BETAS[0], ADAM_BETAS[1])
        betas = check_betas(f"{where}: betas", betas)
        group["momentum"] = betas[0] if given else group.get("momentum", betas[0])
        group["beta2"] = betas[1] if given else group.get("beta2", betas[1])
    elif "betas" in group:
        raise ValueError(
            f"{where}: betas are for norms that adapt, and {norm} does not; give momentum instead of "
            f"betas={shown(group['betas'])}."
        )
    for option in ("lr", "momentum", "nesterov", "weight_decay"):
        if option not in group:
            group[option] = default(option)
    group.setdefault("beta2", 0.0)
    settle_averages(group, where, made=False)
    for option in NUMBERS:
        group[option] = OPTIONS[option](f"{where}: {option}", group[option])
    if isinstance(group["lr"], Tensor):  # schedulers write into it: one per group
        group["lr"] = group["lr"].clone()
    group.setdefault("view", None)
    group.setdefault("name", None)
    group["skipped_steps"] = 0
    group[STEPS_TAKEN] = 0


def check_group(group: Mapping[str, object], *, where: str) -> None:
    """Refuse a group with an option that is unknown or out of range.

    Args:
        group: With every key of `GROUP_KEYS`.
        where: Which group, for the message.

    Raises:
        ValueError: If a key is not known, or a number is out of range.
        TypeError: If a value is of the wrong type.
    """
    for key, value in group.items():
        if key not in GROUP_KEYS and key not in FOREIGN_KEYS:
            _check_foreign(where, key, value)
    for option in NUMBERS:
        OPTIONS[option](f"{where}: {option}", group[option])
    name = group.get("name")
    if name is not None and not isinstance(name, str):
        expected = "a text, by which a product norm can call the group"
        raise TypeError(refusal(f"{where}: name", expected, name))
    if name in ROLES and name != group["role"]:
        raise ValueError(
            f"{where}: name {name!r} is a role, but the group's role is {group['role']!r}; choose another."
        )


def check_numbers(groups: Sequence[tuple[int, dict[str, Any]]]) -> list[Tensor]:
    """Refuse numbers with which weights would not stay numbers, and flags that are none.

    Args:
        groups: Those that move in this step, and their places; a whole number becomes a float, as torch takes no larger
            ones than 2^63.

    Returns:
        For each number that is a tensor on an accelerator, and so stays unread, whether it is in its range: 0-d.

    Raises:
        ValueError: If a number is out of its range, or not finite.
        TypeError: If it is no number, or the flag is none.
    """
    unread: list[Tensor] = []
    for place, group in groups:
        if type(ahead := group.get("nesterov", False)) is not bool:
            flag(f"{_who(place, group)}: nesterov", ahead)
        for option, below in BELOW.items():
            value = group[option]
            if type(value) is float and 0.0 <= value < below:
                continue
            name = f"{_who(place, group)}: {option}"
            if isinstance(value, Tensor):
                if value.ndim:
                    raise TypeError(
                        f"{name} as a tensor must be 0-d, got shape {tuple(value.shape)}; write .squeeze()."
                    )
                OPTIONS["lr"](name, value)  # type, and what is here is finite and at least 0
                if value.device.type != "cpu":
                    unread.append((value >= 0) & (value < below))
                    continue
                value = float(value)
            checked = OPTIONS[option](name, value)
            if type(value) is int:
                group[option] = checked
    return unread


def _who(place: int, group: dict[str, Any]) -> str:
    return f"parameter group {place} (role {group['role']!r}), as this step finds it"


def check_norms(norms: object) -> Mapping[Role, Norm | str]:
    """Refuse what is no mapping from roles to norms, or an empty one.

    Args:
        norms: What was given; None for none.

    Returns:
        The mapping.

    Raises:
        TypeError: If it is no mapping.
        ValueError: If it is empty, or has something that is no role.
    """
    if norms is None:
        return {}
    if not isinstance(norms, Mapping):
        example = "a mapping from roles to norms, such as {'matrix': Spectral(), 'vector': 'sign'}"
        raise TypeError(refusal("norms", example, norms))
    if not norms:
        raise ValueError(refusal("norms", f"a mapping from at least one of the roles {', '.join(ROLES)}", norms))
    for role, norm in cast(Mapping[object, object], norms).items():
        check_role(role, where="norms")
        check_norm(f"norms[{role!r}]: norm", norm)
    return cast(Mapping[Role, Norm | str], norms)


def has_option(norm: Norm, option: str) -> bool:
    """Whether a group with this norm may set an option that not all norms have.

    Args:
        norm: Of the group.
        option: One of `NORM_OPTIONS`, or "betas".
    """
    if option == "betas":
        return norm.adapts
    return is_dataclass(norm) and option in (field.name for field in fields(norm))


def _with_options(norm: Norm, group: dict[str, Any], where: str) -> Norm:
    """The norm with those of its options that the group sets, which are taken out of the group."""
    own = {option: group.pop(option) for option in NORM_OPTIONS if option in group}
    for option, value in own.items():
        if not has_option(norm, option):
            has = ", ".join(other for other in NORM_OPTIONS if has_option(norm, other)) or "none"
            raise ValueError(
                f"{where}: {option}={shown(value)} is no option of the group's norm, {norm}, whose options are {has}. "
                "Leave it out, or give the group another norm= or role=."
            )
    try:
        return replace(norm, **own) if own else norm  # pyright: ignore[reportArgumentType, reportCallIssue] - a dataclass
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from error


def _check_foreign(where: str, key: object, value: object) -> None:
    """Refuse a key that was meant for an option of here; what others keep in their groups stays, if it is plain."""
    if not isinstance(key, str):
        raise TypeError(f"{where}: options must be named by text, got {shown(key)}.")
    remedy = ELSEWHERE.get(key, "")
    if remedy and ((value is not None and value is not False) or key in SORTING):
        raise ValueError(f"{where}: Unknown option {key!r} with the value {shown(value)}. {remedy}")
    options = (*GROUP_KEYS, *NORM_OPTIONS)
    spelt = key.lower().replace("-", "_").strip("_")
    alike = [option for option in options if spelt.count("_") <= option.count("_")]
    meant = difflib.get_close_matches(spelt, alike, n=1, cutoff=CLOSE)
    if not remedy and meant and key not in HOSTS:
        raise ValueError(
            f"{where}: Unknown option {key!r}: did you mean {meant[0]!r}? Valid: {', '.join(options)}. A key of your "
            "own needs a name that is farther from these."
        )
    try:
        plain(value, where)
    except TypeError as error:
        raise TypeError(
            f"{where}: {key!r} is none of the options {', '.join(options)}, and is kept for others only if a "
            f"checkpoint can hold it: numbers, text, tensors, and collections of these; got {shown(value)}."
        ) from error


def check_role(role: object, *, where: str) -> None:
    """Refuse what is no role.

    Args:
        role: What was given.
        where: Which group, for the message.

    Raises:
        ValueError: If it is none.
        TypeError: If it is no text.
    """
    choice(ROLES)(f"{where}: role", role)


def check_parameter(name: str, parameter: object) -> Tensor:
    """Refuse what cannot be optimised here.

    Args:
        name: For the message.
        parameter: Anything.

    Returns:
        The parameter.

    Raises:
        TypeError: If it is not a tensor, or not of real floating point.
        ValueError: If it is sparse, or the result of an operation.
    """
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name!r} must be a tensor, got {type(parameter).__name__}.")
    if is_lazy(parameter):
        raise ValueError(
            f"{name!r} has no shape yet; run one batch through the lazy module before building the optimizer."
        )
    if not parameter.is_floating_point():
        remedy = "Optimise torch.view_as_real of it." if parameter.is_complex() else "Leave it out of the optimizer."
        raise TypeError(f"{name!r} must be of real floating point, got {parameter.dtype}. {remedy}")
    if parameter.dtype not in DTYPES:
        raise TypeError(
            f"{name!r} must be of {', '.join(map(str, DTYPES))}, got {parameter.dtype}, on which a step cannot work. "
            "Optimise a copy of it in a wider type, or freeze it."
        )
    if parameter.layout != torch.strided:
        raise ValueError(f"{name!r} must be dense, got layout {parameter.layout}.")
    if not parameter.is_leaf:
        raise ValueError(f"{name!r} is the result of an operation, not a leaf tensor; pass the tensor it came from.")
    return parameter
