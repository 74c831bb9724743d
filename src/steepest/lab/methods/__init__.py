"""Methods by name: each builds an optimizer from a model and plain options.

The options of a method are the keywords of its builder, their defaults are chosen by hand; `tuned.py` holds the ones
that a search found for a task and preset.
"""

import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steepest.anatomy import PlanRow, Role, route
from steepest.geometry import ScaleRule
from steepest.lab.methods.tuned import TUNED, OptionValue, Tuned, Tuning
from steepest.lab.tasks.task import Task
from steepest.linalg import COEFFICIENTS
from steepest.names import unknown_name
from steepest.optim import (
    Adam,
    Averages,
    Cautious,
    Decay,
    Momo,
    Muon,
    MuonAdam,
    MuonMax,
    NewtonMuon,
    PolarGrad,
    Scion,
    ShampooMuon,
    Sphere,
)
from steepest.optim.recipes import RECIPES
from steepest.stages import (
    DiagonalMetric,
    Eigenbasis,
    InputMoment,
    RadialBrake,
    RowFloor,
    RowScaling,
    ShampooPowers,
    Stage,
)


def adamw(
    model: nn.Module,
    *,
    lr: float = 0.004,
    other_lr: float = 0.016,
    beta1: float = 0.9,
    beta2: float = 0.95,
    weight_decay: float = 0.0,
    table_lr: float = 0.0,
    vector_ratio: float = 1.0,
) -> Optimizer:
    """torch.optim.AdamW, with `lr` for the matrices inside the model and `other_lr` for the rest.

    Two rates, because all other methods here have two: with one, AdamW would be the only one held back by the rates
    that its embedding and its matrices must share. Tables of embeddings have a third one if `table_lr` is not 0, and
    vectors `vector_ratio` times `other_lr`.

    Raises:
        ValueError: If `table_lr` or `vector_ratio` is negative or not finite.
    """
    _check_rates(table_lr, vector_ratio)
    families: dict[Role, float] = {"embedding": table_lr} if table_lr else {}
    families |= {"vector": vector_ratio * other_lr} if vector_ratio != 1 else {}
    own = {role: route(model).parameters(role) for role in families}
    known = {id(parameter) for parameters in own.values() for parameter in parameters}
    matrices, rest = _matrices_and_rest(model)
    groups = [{"params": matrices, "lr": lr}, {"params": [p for p in rest if id(p) not in known], "lr": other_lr}]
    groups += [{"params": own[role], "lr": rate} for role, rate in families.items()]
    return torch.optim.AdamW(groups, betas=(beta1, beta2), weight_decay=weight_decay)


def sgd(model: nn.Module, *, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 0.0) -> Optimizer:
    """torch.optim.SGD on all parameters, with Nesterov momentum."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=True)


def torch_muon(
    model: nn.Module,
    *,
    lr: float = 0.04,
    other_lr: float = 0.01,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.95,
) -> Optimizer:
    """torch.optim.Muon on the matrices inside the model, torch.optim.AdamW on the rest.

    Raises:
        ValueError: If a matrix is stored in a tensor that is not 2-D, which torch's Muon does not take.
    """
    for row in route(model):
        if row.trainable and row.role == "matrix" and len(row.shape) != 2:
            raise ValueError(f"'torch-muon' takes 2-D matrices only, {row.name} is {row.shape}. Use 'muon' instead.")
    matrices, rest = _matrices_and_rest(model)
    return CombinedOptimizer(
        torch.optim.Muon(matrices, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay),
        torch.optim.AdamW(rest, lr=other_lr, betas=(beta1, beta2), weight_decay=0.0),
    )


def _matrices_and_rest(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    plan = route(model)
    matrices = plan.parameters("matrix")
    return matrices, [row.parameter for row in plan if row.trainable and row.role != "matrix"]


def muon(
    model: nn.Module,
    *,
    lr: float = 0.04,
    other_lr: float = 0.01,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.95,
    coefficients: str = "auto",
    scale: str = "original",
    table_lr: float = 0.0,
    rest: str = "",
    vector_ratio: float = 1.0,
) -> Optimizer:
    """steepest.Muon; a `table_lr` of 0 is `other_lr`, and matrices named in `rest` move like vectors.

    These are names or patterns with * and ?, with commas between them. Vectors have the rate `vector_ratio` times
    `other_lr`.
    """
    optimizer = Muon(
        route(model, overrides=dict.fromkeys(rest.split(","), "vector")) if rest else model,
        lr,
        adam_lr=other_lr,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        betas=(beta1, beta2),
        coefficients=_polynomials(coefficients),
        scale=cast("ScaleRule", scale),
    )
    return _with_rates(optimizer, table_lr, vector_ratio)


DECAYS: Mapping[str, Callable[[float], float | Decay]] = {
    "decoupled": lambda rate: rate,
    "cautious": Cautious,
    "sphere": lambda rate: Sphere(),
}


def parts(
    model: nn.Module,
    *,
    lr: float = 0.04,
    other_lr: float = 0.02,
    table_lr: float = 0.0,
    momentum: float = 0.85,
    slow: float = 0.0,
    share: float = 0.5,
    slow_from: int = 0,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    decay: str = "decoupled",
    beta1: float = 0.85,
    beta2: float = 0.95,
    inputs: str = "none",
    metric: str = "none",
    metric_beta: float = 0.95,
    powers: float = 0.0,
    powers_beta: float = 0.95,
    powers_every: int = 10,
    basis_every: int = 0,
    basis_beta: float = 0.95,
    basis_beta2: float = 0.95,
    rows: bool = False,
    floor: float = 0.0,
    brake: float = 1.0,
    momo: bool = False,
    lower_bound: float = 0.0,
    powers_ridge: float = 1e-3,
    powers_split: bool = False,
    powers_prior: float = 0.0,
    powers_block: int = 8192,
    vector_ratio: float = 1.0,
) -> Optimizer:
    """steepest.Muon with any of the parts around it; as it stands, with none of them.

    `slow` is the second average's weight of the old one, which counts `share` from gradient `slow_from` on; `inputs`
    the structure of Newton-Muon's moments; `metric` the source of a diagonal metric; `powers` their exponent, with
    `powers_` before other options of `ShampooPowers`; vectors have the rate `vector_ratio` times `other_lr`;
    `basis_every` the interval of an eigenbasis; `floor` and `brake` those of the radial part. 0, 1 for the brake, or
    "none" leave each out. With Momo, which needs one momentum, `beta1` is `momentum`, and the slow average is
    everything's.

    Raises:
        ValueError: If a kind of decay is unknown, or a number out of range.
    """
    if decay not in DECAYS:
        raise ValueError(unknown_name("kind of decay", decay, DECAYS))
    stages: list[Stage] = []
    if metric != "none":
        stages.append(DiagonalMetric(source=cast("Any", metric), beta2=metric_beta))
    if powers:
        stages.append(
            ShampooPowers(
                exponent=powers,
                beta=powers_beta,
                every=powers_every,
                ridge=powers_ridge,
                block_size=powers_block,
                split=powers_split,
                prior=powers_prior,
            )
        )
    if basis_every:
        stages.append(Eigenbasis(every=basis_every, beta=basis_beta, beta2=basis_beta2))
    if rows:
        stages.append(RowScaling())
    if floor:
        stages.append(RowFloor(floor))
    if brake < 1:
        stages.append(RadialBrake(brake))
    followed = Averages.two(momentum, slow, share, slow_from) if slow else momentum
    optimizer = Muon(
        model,
        lr,
        adam_lr=other_lr,
        momentum=followed,
        nesterov=nesterov,
        weight_decay=DECAYS[decay](weight_decay) if weight_decay or decay == "sphere" else 0.0,
        betas=(followed if momo else beta1, beta2),
        stages=stages,
        precondition=None if inputs == "none" else InputMoment(every=8, structure=cast("Any", inputs)),
        step_size=Momo(lower_bound) if momo else None,
    )
    return _with_rates(optimizer, table_lr, vector_ratio)


def newton_muon(
    model: nn.Module,
    *,
    lr: float = 0.04,
    other_lr: float = 0.01,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.95,
    momo: bool = False,
    preset: str = "default",
    every: int = 8,
    decay: float = 0.95,
    ridge: float = 0.2,
    exponent_in: float = 1.0,
    exponent_out: float = 0.0,
    structure: str = "none",
    wide: str = "diagonal",
    on: str = "momentum",
    normalize: bool = True,
    first: int = 7,
    blend: float = 1.0,
    anneal_from: int = 0,
    anneal_to: int = 0,
    coefficients: str = "auto",
    scale: str = "original",
    table_lr: float = 0.0,
) -> Optimizer:
    """steepest.NewtonMuon; `wide` is the structure of maps that read twice as many features as they write, or more, and
    `structure` that of the others.

    With a preset other than "default", only `every` is taken of the options of the moments. Both `anneal` options at 0
    mean none, and a `table_lr` of 0 is `other_lr`. With Momo, which needs one momentum, `beta1` is `momentum`. `every`
    is lower than steepest's own 32, which is for longer runs than the lab's.
    """
    options: dict[str, Any] = {"every": every}
    if preset == "default":
        kinds = {"*": structure, **{row.name: wide for row in route(model) if _is_wide(row)}}
        options |= {"decay": decay, "ridge": ridge, "exponents": (exponent_in, exponent_out), "structure": kinds}
        options |= {"on": on, "normalize": normalize, "first": first, "blend": blend}
        options["anneal"] = (anneal_from, anneal_to) if anneal_to else None
    moment = InputMoment.preset(preset, **options)
    optimizer = NewtonMuon(
        model,
        lr,
        adam_lr=other_lr,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        betas=(momentum if momo else beta1, beta2),
        momo=momo,
        precondition=moment,
        coefficients=_polynomials(coefficients),
        scale=cast("ScaleRule", scale),
    )
    return _with_rates(optimizer, table_lr)


def _polynomials(name: str) -> str | Sequence[Sequence[float]]:
    """Coefficients by name; of "jordan:3" the first three steps."""
    known, colon, count = name.partition(":")
    if not colon:
        return name
    steps = COEFFICIENTS[known].steps if known in COEFFICIENTS else ()
    if not count.isascii() or not count.isdecimal() or not 1 <= int(count) <= len(steps):
        raise ValueError(
            f"The option 'coefficients' takes a name, or NAME:N for its first N steps, as in jordan:3; got {name!r}. "
            f"Names: {', '.join(COEFFICIENTS)}."
        )
    return steps[: int(count)]


def _with_rates(optimizer: Optimizer, table_lr: float, vector_ratio: float = 1.0) -> Optimizer:
    """The optimizer, with a rate of their own for tables of embeddings unless that is 0, and for vectors."""
    _check_rates(table_lr, vector_ratio)
    for group in optimizer.param_groups:
        if group["role"] == "embedding" and table_lr:
            group["lr"] = table_lr
        if group["role"] == "vector":
            group["lr"] *= vector_ratio
    return optimizer


def _check_rates(table_lr: float, vector_ratio: float) -> None:
    if not 0 <= vector_ratio < math.inf:
        raise ValueError(f"vector_ratio must be finite and at least 0, got {vector_ratio}. 1 leaves vectors other_lr.")
    if not 0 <= table_lr < math.inf:
        raise ValueError(
            f"table_lr must be finite and at least 0, got {table_lr}. Leave it out, or give 0, and tables of "
            "embeddings have the rate other_lr."
        )


def _is_wide(row: PlanRow) -> bool:
    return row.role == "matrix" and all(n >= 2 * m for _, m, n in row.blocks())


def adam(
    model: nn.Module,
    *,
    lr: float = 0.004,
    other_lr: float = 0.016,
    beta1: float = 0.9,
    beta2: float = 0.95,
    weight_decay: float = 0.0,
) -> Optimizer:
    """steepest.Adam, with `lr` for the matrices inside the model and `other_lr` for the rest."""
    optimizer = Adam(model, lr, betas=(beta1, beta2), weight_decay=weight_decay)
    for group in optimizer.param_groups:
        group["lr"] = lr if group["role"] == "matrix" else other_lr
    return optimizer


def from_recipe(
    recipe: Callable[..., Optimizer], defaults: Mapping[str, OptionValue], *, momo: bool = False
) -> Callable[..., Optimizer]:
    """A method from a recipe, with plain options.

    Args:
        recipe: Of `steepest.optim`.
        defaults: Options and their defaults: keywords of the recipe, `other_lr` for everything that is no matrix, and
            `beta1` and `beta2` for `betas`; `beta1` is the momentum where it is left out.
        momo: Whether steps are Momo's, whose options are then among the method's.
    """
    options: dict[str, OptionValue] = {**defaults, **(MOMO_OPTIONS if momo else {})}
    adam = "adam_lr" in inspect.signature(recipe).parameters

    def build(model: nn.Module, **given: Any) -> Optimizer:
        chosen: dict[str, Any] = {**options, **given}
        if adam and "other_lr" in chosen:
            chosen["adam_lr"] = chosen.pop("other_lr")
        if "beta2" in chosen:
            chosen["betas"] = (chosen.pop("beta1", chosen.get("momentum")), chosen.pop("beta2"))
        if momo:
            bound, estimated = chosen.pop("lower_bound"), chosen.pop("estimate_bound")
            chosen["step_size"] = Momo("auto" if estimated else bound)
        return recipe(model, **chosen)

    kinds = [inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    kinds += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=own) for name, own in options.items()]
    vars(build)["__signature__"] = inspect.Signature(kinds)
    return build


def plain_options(recipe: Callable[..., Optimizer]) -> dict[str, OptionValue]:
    """Options of a recipe that are numbers and flags, with its own defaults: what a method of it has if no row says."""
    own = {name: parameter.default for name, parameter in inspect.signature(recipe).parameters.items()}
    return {name: value for name, value in own.items() if isinstance(value, bool | float) and name != "momo"}


MOMO_OPTIONS: Mapping[str, OptionValue] = {"lower_bound": 0.0, "estimate_bound": False, "dual": "cached"}
_RATES: Mapping[str, OptionValue] = {"momentum": 0.95, "weight_decay": 0.0}
# Name, recipe and options of the methods that have a plain version and one with Momo.
_PAIRS: Mapping[str, tuple[type[Optimizer], Mapping[str, OptionValue]]] = {
    "scion": (Scion, {"lr": 0.04, "other_lr": 0.008, **_RATES}),
    "muonadam": (MuonAdam, {"lr": 0.04, "other_lr": 0.02, **_RATES, "beta2": 0.95}),
    "shampoo-muon": (
        ShampooMuon,
        {"lr": 0.05, "momentum": 0.85, "weight_decay": 0.0, "beta2": 0.975},
    ),
    "polargrad": (PolarGrad, {"lr": 0.5, "other_lr": 0.02, **_RATES, "beta2": 0.95}),
    "muonmax": (MuonMax, {"lr": 0.02, "other_lr": 0.02, **_RATES, "beta2": 0.95}),
}
_NAMED = {Adam, Muon, NewtonMuon, *(recipe for recipe, _ in _PAIRS.values())}
# Recipes without a row: NewtonMuonMax is "newton-muon-max", with the recipe's own defaults.
DERIVED: Mapping[str, tuple[type[Optimizer], Mapping[str, OptionValue]]] = {
    re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower(): (recipe, plain_options(recipe))
    for name, recipe in RECIPES.items()
    if recipe not in _NAMED
}
_ALL_PAIRS = {**_PAIRS, **DERIVED}

METHODS: Mapping[str, Callable[..., Optimizer]] = {
    "adamw": adamw,
    "sgd": sgd,
    "torch-muon": torch_muon,
    "muon": muon,
    "muon-plain": partial(muon, nesterov=False),
    "muon-jordan": partial(muon, coefficients="jordan"),
    "muon-nonic": partial(muon, coefficients="nonic"),
    "muon-wd": partial(muon, weight_decay=0.1),
    "muon-plain-wd": partial(muon, nesterov=False, weight_decay=0.1),
    "adam": adam,
    "newton-muon": newton_muon,
    "parts": parts,
    **{name: from_recipe(recipe, options) for name, (recipe, options) in _ALL_PAIRS.items()},
    **{f"{name}-momo": from_recipe(recipe, options, momo=True) for name, (recipe, options) in _ALL_PAIRS.items()},
}


RATES = ("lr", "other_lr", "table_lr")
# Options that configs of older runs do not have, by method, and what these runs did.
_OF_MUON: Mapping[str, OptionValue] = {"scale": "original", "table_lr": 0.0, "rest": "", "vector_ratio": 1.0}
LATER: Mapping[str, Mapping[str, OptionValue]] = {
    "adamw": {"table_lr": 0.0, "vector_ratio": 1.0},
    "newton-muon": {"coefficients": "auto", "scale": "original", "table_lr": 0.0},
    "parts": {
        "powers_ridge": 1e-3,
        "powers_split": False,
        "powers_prior": 0.0,
        "powers_block": 8192,
        "vector_ratio": 1.0,
    },
    **{name: _OF_MUON for name in METHODS if name == "muon" or name.startswith("muon-")},
}


@dataclass(frozen=True)
class Resolved:
    """Every option of a method, and how they were found; None where that was by hand."""

    options: Mapping[str, OptionValue]
    tuning: Tuning | None


def options_of(method: str) -> dict[str, OptionValue]:
    """The options of a method with the defaults of its signature.

    Raises:
        ValueError: If the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(unknown_name("method", method, METHODS))
    parameters = inspect.signature(METHODS[method]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def resolve(method: str, *, task: str, preset: str, options: Mapping[str, OptionValue]) -> Resolved:
    """Fill in what `options` leaves open.

    Args:
        method: A key of `METHODS`.
        task: Name of the task; with `preset` it selects the row of `TUNED`.
        preset: Size of the task; one without a row takes the options of "demo", but not their tuning record.
        options: What was asked for; if it differs from the tuned options, their tuning record no longer applies.

    Raises:
        ValueError: If the method or an option is unknown, or a number is not finite.
        TypeError: If an option has the wrong type.
    """
    defaults = options_of(method)
    at_demo = TUNED.get((task, "demo"), {}).get(method, Tuned())
    tuned = TUNED.get((task, preset), {}).get(method, Tuned(at_demo.options))
    found = {**defaults, **check_options(method, tuned.options)}
    wanted = {**found, **check_options(method, options)}
    return Resolved(wanted, tuned.tuning if wanted == found else None)


def check_options(method: str, options: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
    """The options, whole numbers made floats where the method takes floats.

    Raises:
        ValueError: If the method or an option is unknown, or a number is not finite.
        TypeError: If an option has the wrong type.
    """
    defaults = options_of(method)
    return {name: _checked(method, name, value, defaults) for name, value in options.items()}


def build_optimizer(method: str, model: nn.Module, options: Mapping[str, OptionValue]) -> Optimizer:
    """The optimizer of a method for a model.

    Args:
        method: A key of `METHODS`.
        model: Its parameters are optimized.
        options: Options of the method; missing ones take the defaults of its signature.

    Raises:
        ValueError: If the method or an option is unknown, or the optimizer refuses a value.
        TypeError: If an option has the wrong type.
    """
    return METHODS[method](model, **check_options(method, options))


def check_buildable(method: str, task: Task, options: Mapping[str, OptionValue]) -> Optimizer:
    """Build model and optimizer once, so that a command can refuse its input before anything is written.

    Args:
        method: A key of `METHODS`.
        task: Its model is built.
        options: As for `build_optimizer`.

    Returns:
        The optimizer.

    Raises:
        ValueError: If the method or an option is unknown, or the optimizer refuses a value or the model.
        TypeError: If an option has the wrong type.
    """
    return build_optimizer(method, task.build_model(0), options)


def _checked(method: str, name: str, value: OptionValue, defaults: Mapping[str, OptionValue]) -> OptionValue:
    if name not in defaults:
        raise ValueError(unknown_name(f"option of the method {method!r}", name, defaults))
    kind = type(defaults[name])
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not -sys.float_info.max <= value <= sys.float_info.max:  # NaN too, and whole numbers beyond all floats
            raise ValueError(f"The option {name!r} of the method {method!r} takes a finite number, got {value!r}.")
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"The option {name!r} of the method {method!r} takes a {kind.__name__}, got {value!r}.")
    return value


class CombinedOptimizer(Optimizer):
    """Steps its parts in turn; one list of groups for schedulers, one state dict for checkpoints.

    Args:
        parts: Optimizers of disjoint parameters.
    """

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share_groups()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of each part; `closure` runs once, before them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state dicts of the parts, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: If it belongs to another number of parts.
        """
        states = state_dict["parts"]
        if len(states) != len(self.parts):
            raise ValueError(f"The state is of {len(states)} optimizers, this one combines {len(self.parts)}.")
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
        self._share_groups()  # a part's groups are new objects after loading

    def _share_groups(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]
