"""What to do with the second moment of a layer's inputs: the options of Newton-Muon, and their presets.

For a layer y = W z with gradient G, Newton-Muon follows the polar factor of G (K + γ I)^-1 instead of that of G, where
K is a moving average of the mean of z zᵀ over tokens (arXiv:2604.01472, Algorithm 1). The general form here is

    polar(G P_a) P_b,    P_c = (K + γ I)^-c,

in which (a, b) = (0, 0) is Muon, (1, 0) Newton-Muon, and (1/2, 1/2) steepest descent in the norm ‖Q K^(1/2)‖: the size
of the change of the layer's outputs, which no invertible map of the inputs alters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal, Self, cast, get_args

from steepest.anatomy import PlanRow, Role
from steepest.checks import Check, check_fields, choice, flag, number, optional, pair, refusal, whole
from steepest.linalg.spd import RidgeUnit
from steepest.names import unknown_name
from steepest.stages.stage import Stage

Structure = Literal["wide", "auto", "full", "block", "diagonal", "none"]
Preconditioned = Literal["gradient", "momentum"]
Missing = Literal["raise", "muon"]
Solver = Literal["inverse", "factor"]

INPUT_OPTIONS = "input_options"  # what the powers in the state were made with, where there are some
INPUT_STEPS = "input_steps"  # how many steps were done, where layer inputs are looked at
ROLES_WITH: tuple[Role, ...] = ("matrix", "head", "embedding")  # of parameters that read something
WIDEST = 4096  # a full moment and its inverse of this fan-in take 128 MiB in float32


@dataclass(frozen=True)
class InputMoment(Stage):
    """Second moments of layer inputs, and how gradients are multiplied with their inverses.

    Args:
        every: Steps from one refresh to the next; only steps that refresh look at inputs at all.
        decay: Weight of the old moment at a refresh, in [0, 1).
        ridge: γ, relative to the size of the moment as `ridge_unit` measures it.
        ridge_unit: "trace" (mean eigenvalue), "frobenius" (root mean square) or "spectral" (largest).
        ridge_floor: Added to γ, in units of the moment.
        structure: "full"; "diagonal"; "block": diagonal blocks of `block_size`; "none": Muon for that layer. "wide" is
            "diagonal" for layers that read at least twice as many features as all layers that share their inputs write,
            such as the second map of an MLP, else "none". "auto" is the same, but "full" where that is "none" and the
            features are at most 4,096, else "diagonal". Or a mapping from patterns of parameter names to these, of
            which the last that matches counts; what matches none is "wide".
        block_size: Of "block"; it must divide the fan-in. None: the fan-out, and where that is not smaller, "full".
        exponents: (a, b) as above, in [0, 1]; (1, 0) is the paper's.
        on: What is multiplied with P_a: the "momentum" when a direction is sought, or each "gradient" before it is
            averaged, as the paper does. They differ while K changes. Momo and regularised descent need "momentum",
            because a momentum of preconditioned gradients does not tell how the loss changes.
        bias_correction: Whether the average of moments is divided by the sum of its weights.
        init: The moment before the first refresh, as a multiple of the identity; needs bias_correction=False.
        normalize: Whether P_a and P_b are scaled to a mean diagonal entry of one. With on="gradient" this keeps
            gradients of before and after a refresh on one scale in their average.
        blend: Part of P that is used, in [0, 1]: (1 - blend) I + blend P; 0 is Muon. Below 1 it needs `normalize`.
        anneal: (start, end), steps between which the blend falls linearly to zero; nothing is looked at after that.
        first: Step, counted from 0, of the first refresh; steps before it are Muon's. None: every - 1.
        stagger: Whether layers take turns in refreshing, instead of all in one step.
        solver: "inverse" keeps (K + γ I)^-1, "factor" a Cholesky factor and solves with it; "factor" is for exponents
            (1, 0).
        tokens: At most so many rows, evenly spread, of what one call of a layer reads. None: all.
        missing: What to do with a layer that has a gradient at a refresh but whose inputs were not seen: "raise"; or,
            for "muon", go on with the moment it has, which is Muon's step if there is none, and count that.
        hooks: Whether inputs are found by hooks on the modules; else only what `record_input` is told counts.
        roles: Of the parameters whose gradients are multiplied, of "matrix", "head" and "embedding". The last two need
            on="gradient" and norms that look at each entry by itself, as Adam's: G P_a is what Adam averages; P_b is
            the matrices' alone. Of a head, `structure` "wide" is "auto". A table's inputs are one-hot, so that its
            moment is diagonal, the frequencies of tokens, whatever `structure` says but "none"; those at `padding_idx`
            do not count, and tables that no module looks up by numbers have none. A factor that stays the same cancels
            in Adam's quotient: of a table, or a head with a diagonal, only changes of the moment act. A table that is
            also the head is refused, since its gradient is a sum of two, of which each has other inputs; where that
            is done without a module, as by F.linear(x, table.weight), it cannot be seen.

    Raises:
        ValueError: If an option is out of range, or two options exclude one another.
        TypeError: If an option is of the wrong type.

    Source:
        Du and Su, arXiv:2604.01472, Algorithm 1 and Appendix A.
    """

    every: int = 32
    decay: float = 0.95
    ridge: float = 0.2
    ridge_unit: RidgeUnit = "trace"
    ridge_floor: float = 0.0
    structure: Structure | Mapping[str, Structure] = "wide"
    block_size: int | None = None
    exponents: tuple[float, float] = (1.0, 0.0)
    on: Preconditioned = "momentum"
    bias_correction: bool = True
    init: float = 0.0
    normalize: bool = True
    blend: float = 1.0
    anneal: tuple[int, int] | None = None
    first: int | None = None
    stagger: bool = False
    solver: Solver = "inverse"
    tokens: int | None = None
    missing: Missing = "raise"
    hooks: bool = True
    roles: Sequence[Role] = ("matrix",)

    prefix = "input_"
    kept = "moments of layer inputs"
    option = "precondition=InputMoment()"
    group_keys = MappingProxyType({INPUT_STEPS: 0, INPUT_OPTIONS: ""})

    def __post_init__(self) -> None:
        check_fields(self, _CHECKS)
        self._check_together()

    def attach(self, rows: Sequence[PlanRow]) -> Stage:
        """Look at the inputs of the layers that the options choose.

        Args:
            rows: Of the plan: the trainable parameters of the roles.

        Raises:
            ValueError: If no parameter is left to precondition, none can be hooked, or one is a table and a head.
        """
        from steepest.stages.inputs.stage import InputMoments

        return InputMoments(self, rows)

    @property
    def keeps_ball(self) -> bool:
        """Whether directions stay what they are."""
        return self.exponents[1] == 0

    @property
    def no_duals(self) -> str | None:
        """Why momenta do not tell how the loss changes, with on="gradient"."""
        if self.on == "momentum":
            return None
        return (
            "InputMoment(on='gradient') averages preconditioned gradients, which do not tell how the loss changes, "
            "as Momo, regularised descent and product norms need. Set on='momentum'."
        )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """Options by name.

        Args:
            name: "default"; "paper_record4", "paper_record28" and "track3": the moment, its inverse and what is
                multiplied, as in the published training scripts of that name. All else is the optimizer's: record 4
                scales steps by sqrt(max(m, n)), as `scale="match_rms_adamw"` does with five times its rate, and not by
                the default's sqrt(max(1, m/n)); record 28 by the latter of the shape as stored.
            overrides: Options that take the place of the preset's.

        Returns:
            The options.

        Raises:
            ValueError: If the preset is unknown, or an option does not fit.
            TypeError: If an option is unknown.
        """
        choice(PRESETS)("preset", name)
        for option in overrides:
            if option not in (known := [field.name for field in fields(cls)]):
                raise TypeError(f"InputMoment: {unknown_name('option', option, known)}")
        return cls(**{**PRESETS[name], **overrides})

    def structure_for(self, name: str) -> Structure:
        """The structure that was asked for a parameter.

        Args:
            name: Of the parameter.
        """
        if isinstance(self.structure, str):
            return self.structure
        found: Structure = "wide"
        for pattern, own in self.structure.items():
            found = own if fnmatchcase(name, pattern) else found
        return found

    @property
    def powers(self) -> tuple[float, ...]:
        """The distinct exponents above zero, each of which takes a matrix."""
        return tuple(dict.fromkeys(exponent for exponent in self.exponents if exponent > 0))

    def start(self, turn: int, turns: int) -> int:
        """Step of the first refresh of a layer.

        Args:
            turn: Which layer.
            turns: Of how many.
        """
        first = self.every - 1 if self.first is None else self.first
        return first + (turn * self.every // turns if self.stagger else 0)

    def due(self, step: int, start: int) -> bool:
        """Whether a layer refreshes.

        Args:
            step: Counted from 0.
            start: Step of its first refresh.
        """
        return step >= start and (step - start) % self.every == 0 and self.blend_at(step) > 0

    def blend_at(self, step: int) -> float:
        """Part of P that is used in a step.

        Args:
            step: Counted from 0.
        """
        if self.anneal is None:
            return self.blend
        start, end = self.anneal
        return self.blend * min(1.0, max(0.0, (end - step) / (end - start)))

    def _check_together(self) -> None:
        elsewhere = [role for role in self.roles if role != "matrix"]
        if elsewhere and self.on == "momentum":
            raise ValueError(
                f"InputMoment: roles={self.roles} with on='momentum': in the norm of a role {elsewhere[0]!r}, such as "
                "Adam's, a direction is divided by second moments of the gradients, which a preconditioned momentum "
                "does not fit. Set on='gradient'."
            )
        if self.anneal is not None and self.anneal[0] >= self.anneal[1]:
            raise ValueError(
                f"InputMoment: anneal must be two steps (start, end), 0 <= start < end, got {self.anneal}."
            )
        if self.init > 0 and self.bias_correction:
            raise ValueError(
                f"InputMoment: init={self.init:g} is a bias that bias_correction=True would take away; set it to False."
            )
        if self.solver == "factor" and self.exponents != (1.0, 0.0):
            raise ValueError(
                f"InputMoment: solver='factor' solves with K, so its exponents are (1, 0), got {self.exponents}. "
                "Use solver='inverse'."
            )
        if not self.normalize and (self.blend < 1 or self.anneal is not None):
            raise ValueError(
                "InputMoment: blend and anneal add P to the identity, for which P needs its scale; set normalize=True."
            )


def _check_structure(name: str, value: object) -> Any:
    if not isinstance(value, str | Mapping):
        raise TypeError(refusal(name, "a name or a mapping from patterns to names", value))
    one = choice(get_args(Structure))
    if isinstance(value, str):
        return one(name, value)
    for pattern, own in cast(Mapping[object, object], value).items():
        if not isinstance(pattern, str):
            raise TypeError(refusal(name, "a name or a mapping from patterns to names", value))
        one(name, own)
    return cast(Any, value)


def _check_roles(name: str, value: object) -> tuple[str, ...]:
    several = isinstance(value, list | tuple)
    given = cast(Sequence[object], value)
    if not several or not given or not all(isinstance(one, str) and one in ROLES_WITH for one in given):
        remedy = f"Write roles=({value!r},)." if isinstance(value, str) else ""
        text = refusal(name, f"a tuple of one or more of {', '.join(map(repr, ROLES_WITH))}", value, remedy)
        raise ValueError(text) if several and given else TypeError(text)
    return tuple(role for role in ROLES_WITH if role in given)


_CHECKS: Mapping[str, Check] = {
    "every": whole(1),
    "decay": number(high=1.0),
    "ridge": number(),
    "ridge_unit": choice(get_args(RidgeUnit)),
    "ridge_floor": number(),
    "structure": _check_structure,
    "block_size": optional(whole(1)),
    "exponents": pair(number(high=1.0, up_to=True), "two numbers in [0, 1]"),
    "on": choice(get_args(Preconditioned)),
    "bias_correction": flag,
    "init": number(),
    "normalize": flag,
    "blend": number(high=1.0, up_to=True),
    "anneal": optional(pair(whole(0), "two steps (start, end), 0 <= start < end")),
    "first": optional(whole(0)),
    "stagger": flag,
    "solver": choice(get_args(Solver)),
    "tokens": optional(whole(1)),
    "missing": choice(get_args(Missing)),
    "hooks": flag,
    "roles": _check_roles,
}

_PAPER: Mapping[str, Any] = {
    "structure": "block",
    "exponents": (1.0, 0.0),
    "on": "gradient",
    "bias_correction": False,
    "init": 1e-3,
    "normalize": False,
}

# Source of the paper's rows: its code release, https://github.com/zhehangdu/Newton-Muon, and the entry of the same
# author in https://github.com/KellerJordan/modded-nanogpt, records/track_3_optimization.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "paper_record4": {**_PAPER, "every": 32, "decay": 0.95, "ridge": 0.2, "ridge_floor": 1e-8},
    "paper_record28": {**_PAPER, "every": 16, "decay": 0.8, "ridge": 0.2},
    "track3": {**_PAPER, "every": 64, "decay": 0.95, "ridge": 0.2, "ridge_floor": 1e-8},
}
