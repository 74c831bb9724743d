"""Named optimizers: each chooses the pieces of `SteepestDescent` and nothing else.

A recipe is one class with `@recipe`, and its name in `__all__`, from which all other lists are made. Options that mean
the same everywhere stand in the typed dictionaries, once, with their texts; `help`, `inspect.signature` and editors
show them with each recipe that has them.
"""

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypedDict, TypeVar, Unpack, cast

import torch
from torch import Tensor

from steepest.anatomy import Role
from steepest.checks import refusal
from steepest.geometry import Ada2, AdaInf, ColNorm, Frobenius, Hybrid, Scaled, ScaleRule, Sign, Spectral
from steepest.linalg import Coefficients, PolarMethod
from steepest.optim.arguments import checked_options, texts_of, texts_of_keys, with_all_texts, with_shared
from steepest.optim.combine import DualMode
from steepest.optim.decay import Decay
from steepest.optim.descent import SteepestDescent, checked_stages
from steepest.optim.guard import OnNonFinite
from steepest.optim.momentum import Averages
from steepest.optim.momo.model import StepSize
from steepest.optim.options import per_role
from steepest.optim.parameters import Parameters
from steepest.optim.storage import Rounding
from steepest.stages import InputMoment, ShampooPowers, Stage

__all__ = [
    "Adam",
    "Muon",
    "MuonAdam",
    "MuonMax",
    "NewtonMuon",
    "NewtonMuonMax",
    "PethickScion",
    "PolarGrad",
    "Scion",
    "ShampooMuon",
    "SignDescent",
]

Rate = float | Tensor
ProcessGroup = Any  # not there in every build of torch
Betas = tuple[float | Averages, float] | None
R = TypeVar("R", bound=type[SteepestDescent])

# Learning rate of everything that is no matrix, relative to that of the matrices. Muon's is the ratio of
# arXiv:2510.09827's default; under "match_rms_adamw" both kinds of update have one size, and one learning rate serves
# both. The others are found in results/tuning for bytes of text.
ADAM_LR_RATIO = 0.1
SCION_OTHER_RATIO = 0.2
MUON_MAX_ADAM_RATIO = 1.0
POLAR_GRAD_ADAM_RATIO = 0.04
# Rounded from the best setting so far of a search that has not ended, 9d29deacf4d40dc0 in results/strongest/tuning.csv.
SHAMPOO_RATIOS: Mapping[Role, float] = {"embedding": 0.35, "head": 0.18, "vector": 0.7}
SHAMPOO = ShampooPowers(exponent=0.5, beta=0.975, block_size=1024, split=True)


class Options(TypedDict, total=False):
    """Options of every recipe."""

    step_size: StepSize | None
    """`Momo(...)`: as much of the step as its model of the loss says is useful; the loss must then be passed. None:
    the whole step."""
    momo: bool
    """Short for `step_size=Momo()`."""
    families: Mapping[str, Mapping[str, Any]] | None
    """Options of parameters by role, or by a pattern of their names, such as {"*.bias": {"betas": (0.9, 0.997)},
    "embedding": {"lr": 0.7}}: each family makes a group of its own; the first that matches counts."""
    dual: DualMode
    """Where a number of all layers must be known before the first can move, as with Momo: "cached" keeps all directions
    until then, "stale" uses the dual norms of the step before."""
    memory_cap: int | None
    """Bytes that a step's temporaries may take, where layers can be moved one after the other; None: one and a half
    times the largest set of parameters of one shape, at least 6 MiB."""
    process_group: ProcessGroup | None
    """Ranks that keep copies of the plain parameters and step together; None: those of `DistributedDataParallel`, if
    the model is or contains such a module. Parameters that are DTensors say themselves who keeps what."""
    exchange_dtype: torch.dtype | None
    """Of averages and directions on their way between ranks, such as torch.bfloat16; None: as they are."""
    on_nonfinite: OnNonFinite
    """"skip" or "raise": what a gradient or loss that is not finite does to a step."""
    rounding: Rounding
    """Of a step's float32 result to a bfloat16 weight: "nearest"; "stochastic", right on average; or "kept", what does
    not fit into the weight is kept beside it, in 2 bytes."""
    momentum_dtype: torch.dtype | None
    """torch.bfloat16 keeps averages of gradients in 16 bits; None: in float32."""


class DecayedOptions(Options, total=False):
    """And of those whose weights decay as one says."""

    weight_decay: float | Decay
    """For everything but vectors (gains, biases): a number, decoupled, or a kind of decay with one."""


class PolarOptions(Options, total=False):
    """And of those that orthogonalise."""

    coefficients: str | Coefficients | Sequence[Sequence[float]]
    """Of the polynomial methods."""
    polar: PolarMethod
    """"auto", "newton-schulz", "gram" or "svd"."""
    dtype: torch.dtype | None
    """Of the matrix products; None: bfloat16 on CUDA, float32 elsewhere, float64 for float64 parameters."""
    precondition: InputMoment | str | None
    """`InputMoment(...)`, the name of one of its presets, or None for none; as in `NewtonMuon`."""
    stages: Sequence[Stage]
    """What else stands around the search for the matrices' directions, such as `RowScaling()` for NorMuon."""


class MatrixOptions(PolarOptions, DecayedOptions, total=False):
    """Both."""


class AdamOptions(MatrixOptions, total=False):
    """And of those that have one of Adam's norms for what is no matrix."""

    adam_lr: Rate | None
    """Learning rate of everything that is no matrix; None: a part of `lr`."""
    betas: Betas
    """Weights of Adam's old averages of gradients and of their squares; None: (momentum, 0.95)."""
    eps: float
    """Added to the root of Adam's second moment."""


PIECES = (SteepestDescent, Spectral, AdaInf)  # whose defaults, and whose texts, are the recipes'
DEFAULTS: dict[str, object] = {
    **{name: p.default for piece in PIECES for name, p in inspect.signature(piece).parameters.items()},
    "momo": False,
    "adam_lr": None,
}


def _texts() -> dict[str, str]:
    try:
        return texts_of_keys(inspect.getsource(sys.modules[__name__]))
    except (OSError, TypeError):  # where only compiled files are
        return {}


TEXTS = _texts()


def recipe(kind: R) -> R:
    """Make a subclass of `SteepestDescent` a recipe: its options are checked, shown and documented.

    Args:
        kind: Its `__init__` takes `params`, `lr`, own keywords, and the shared ones as `**options: Unpack[...]`.

    Returns:
        The class itself.
    """
    signature = with_shared(inspect.signature(kind.__init__), DEFAULTS)
    if "__init__" in vars(kind):
        setattr(kind, "__init__", checked_options(signature=signature)(kind.__init__))  # noqa: B010 - no method of a type
    elsewhere = [TEXTS, *(texts_of(known.__doc__) for known in (*kind.__mro__[1:], *PIECES))]
    kind.__doc__ = with_all_texts(kind.__doc__ or kind.__name__, list(signature.parameters)[1:], elsewhere)
    return kind


def _taken(options: Any, *names: str) -> dict[str, Any]:
    """Those options that are given, which are no longer among the others then."""
    return {name: options.pop(name) for name in names if name in options}


def _spectral(scale: ScaleRule, options: PolarOptions) -> Spectral:
    return Spectral(scale=scale, **_taken(options, "coefficients", "polar", "dtype"))


def _alike(ratio: float) -> Mapping[Role, float]:
    return dict.fromkeys(SHAMPOO_RATIOS, ratio)


def _rates(lr: Rate, ratios: Mapping[Role, float], options: AdamOptions) -> dict[Role, Rate]:
    adam_lr = options.pop("adam_lr", None)
    return {"matrix": lr, **{role: lr * ratio if adam_lr is None else adam_lr for role, ratio in ratios.items()}}


def _muon(lr: Rate, scale: ScaleRule, options: AdamOptions, ratios: Mapping[Role, float]) -> dict[str, Any]:
    norms = per_role(_spectral(scale, options), AdaInf(**_taken(options, "eps")))
    return {"norms": norms, "lr": _rates(lr, _alike(1.0) if scale == "match_rms_adamw" else ratios, options)}


def _rest(options: Any, precondition: InputMoment | None = None) -> dict[str, Any]:
    """What `SteepestDescent` takes as it is; vectors do not decay."""
    if "weight_decay" in options:
        options["weight_decay"] = per_role(options["weight_decay"], options["weight_decay"], 0.0)
    if precondition is not None and options.get("precondition") is None:
        options["precondition"] = precondition
    return options


@recipe
class Muon(SteepestDescent):
    """Spectral descent for matrices, Adam for everything else.

    The four variants of the literature are `nesterov` on or off, times `weight_decay` zero or not. With
    `nesterov=True, coefficients="jordan"` the matrix update is that of `torch.optim.Muon`.

    Args:
        lr: Learning rate of the matrices, in units of the spectral norm (times the scale) per step.
        momentum: Of the matrices.
        nesterov: Of the matrices.
        adam_lr: Learning rate of everything else. None: `lr` with scale="match_rms_adamw", else lr / 10.
        betas: Adam's; None: (0.9, 0.95), or (momentum, 0.95) with Momo, which needs one momentum.
        **options: See `AdamOptions`.

    Source:
        Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/.
    """

    _precondition: ClassVar[InputMoment | None] = None
    _ratios: ClassVar[Mapping[Role, float]] = _alike(ADAM_LR_RATIO)

    def __init__(
        self,
        params: Parameters,
        lr: Rate = 0.02,
        *,
        momentum: float | Averages = 0.95,
        nesterov: bool = True,
        scale: ScaleRule = "original",
        **options: Unpack[AdamOptions],
    ) -> None:
        super().__init__(
            params,
            momentum=momentum,
            nesterov=per_role(nesterov, False),
            **_muon(lr, scale, options, self._ratios),
            **_rest(options, self._precondition),
        )


@recipe
class ShampooMuon(Muon):
    """Muon between Shampoo's powers: along T(polar(T(M))) with T(M) = L^-¼ M R^-¼, L and R moments of both sides.

    Rows and columns in which gradients are large and alike no longer decide the direction, which is that of steepest
    descent in the norm of L^¼ W R^¼, scaled to the Frobenius norm of the polar factor. Momenta, exponent and ratios of
    the learning rates are guesses of a search that has not ended (results/strongest); it was never compared with
    Muon by seeds that chose nothing.

    Args:
        params: A module or a plan, for rates by role: parameters alone are matrices or vectors.
        lr: Learning rate of the matrices: the root mean square of a direction's singular values, times the scale.
        momentum: Of the matrices.
        nesterov: Of the matrices.
        powers: Of both sides. In smaller blocks, or renewed more rarely, they cost less.
        adam_lr: Learning rate of everything else. None: `lr` with scale="match_rms_adamw", else 0.35 lr for
            embeddings, 0.18 lr for heads, 0.7 lr for vectors.
        betas: Adam's; None: (momentum, 0.975).
        stages: What else stands around the search for directions, inside of the powers; `precondition` is outside.
        **options: See `AdamOptions`.

    Source:
        Powers before the polar factor are PMuon's, of https://github.com/KellerJordan/modded-nanogpt,
        records/track_3_optimization. The halves are ours.
    """

    _ratios = SHAMPOO_RATIOS

    def __init__(
        self,
        params: Parameters,
        lr: Rate = 0.05,
        *,
        momentum: float | Averages = 0.85,
        nesterov: bool = True,
        scale: ScaleRule = "original",
        powers: ShampooPowers = SHAMPOO,
        **options: Unpack[AdamOptions],
    ) -> None:
        if not isinstance(cast(object, powers), ShampooPowers):
            raise TypeError(refusal("powers", "ShampooPowers(...)", powers))
        options["betas"] = options.get("betas") or (momentum, 0.975)
        options["stages"] = (powers, *checked_stages(None, options.get("stages", ())))
        super().__init__(params, lr, momentum=momentum, nesterov=nesterov, scale=scale, **options)


@recipe
class NewtonMuon(Muon):
    """Muon that knows what its layers read: it follows the polar factor of M (K + γ I)^-a, K the inputs' second moment.

    K is looked at in one step of 32 only, so that other steps cost one more product per layer. The model itself, or its
    plan, must be passed: parameters alone do not tell which modules they belong to.

    Args:
        params: A module or a plan.
        precondition: `InputMoment(...)` or the name of one of its presets. None: `InputMoment()`, whose exponent and
            structures are the best of twelve settings tried in results/newton_muon, on one small model, at
            `every=8`; "paper_record4" has the paper's moment, not that script's whole recipe (`InputMoment.preset`).
        **options: See `Muon`.

    Source:
        Du and Su, arXiv:2604.01472, Algorithm 1.
    """

    _precondition = InputMoment()


@recipe
class MuonAdam(SteepestDescent):
    """Constrained steepest descent in the largest of the spectral norms and Adam's norm.

    The same step as `Muon` with this cell's choices: plain momentum, one decay rate for all averages, no scale by
    shape, and a learning rate ratio of ten.

    Args:
        lr: Learning rate of the matrices, in units of the spectral norm (times the scale) per step.
        momentum: Of the matrices, and the first of `betas` unless these are given.
        adam_lr: Learning rate of everything else. None: `lr` with scale="match_rms_adamw", else lr / 10.
        **options: See `AdamOptions`.

    Source:
        Crawshaw, Modi, Liu and Gower, arXiv:2510.09827.
    """

    def __init__(
        self,
        params: Parameters,
        lr: Rate = 0.02,
        *,
        momentum: float | Averages = 0.95,
        scale: ScaleRule = "none",
        **options: Unpack[AdamOptions],
    ) -> None:
        super().__init__(
            params,
            momentum=momentum,
            betas=options.pop("betas", None) or (momentum, 0.95),
            **_muon(lr, scale, options, _alike(ADAM_LR_RATIO)),
            **_rest(options),
        )


@recipe
class Adam(SteepestDescent):
    """Adam, with decoupled weight decay for everything but vectors: steepest descent in Adam's own norm.

    Args:
        lr: Learning rate, about the largest change of an entry per step.
        betas: Weights of the old averages of gradients and of their squares; None: (0.9, 0.999).
        **options: See `DecayedOptions`.

    Source:
        Kingma and Ba, arXiv:1412.6980, Algorithm 1; Loshchilov and Hutter, arXiv:1711.05101 (decoupled decay).
    """

    def __init__(
        self,
        params: Parameters,
        lr: Rate = 1e-3,
        *,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        **options: Unpack[DecayedOptions],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=(0.9, 0.999) if betas is None else betas,
            norms=per_role(AdaInf(eps=eps), AdaInf(eps=eps)),
            **_rest(options),
        )


@recipe
class SignDescent(SteepestDescent):
    """Descent in the largest entry: sign descent with momentum, or, regularised, times the sum of absolute entries.

    Args:
        lr: Learning rate: the change of each entry per step.
        momentum: Weight of the old average of gradients.
        nesterov: Look ahead by one gradient.
        regularized: Whether steps are times the sum of all absolute entries of the momentum.
        **options: See `DecayedOptions`.

    Source:
        Bernstein et al., arXiv:1802.04434.
    """

    def __init__(
        self,
        params: Parameters,
        lr: Rate = 1e-3,
        *,
        momentum: float | Averages = 0.9,
        nesterov: bool = False,
        regularized: bool = False,
        **options: Unpack[DecayedOptions],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            norms=per_role(Sign(), Sign()),
            regularized=regularized,
            **_rest(options),
        )


@recipe
class Scion(SteepestDescent):
    """Constrained descent in the largest of the spectral norms of matrices and the largest entry of everything else.

    The cell that arXiv:2510.09827 calls Scion. `PethickScion` is Scion as its authors define it.

    Args:
        lr: Learning rate of the matrices, in units of the spectral norm (times the scale) per step.
        momentum: Of everything.
        nesterov: Of everything.
        other_lr: Learning rate of everything else: the change of each entry per step. None: lr / 5.
        **options: See `MatrixOptions`.
    """

    def __init__(
        self,
        params: Parameters,
        lr: Rate = 0.02,
        *,
        momentum: float | Averages = 0.95,
        nesterov: bool = False,
        scale: ScaleRule = "none",
        other_lr: Rate | None = None,
        **options: Unpack[MatrixOptions],
    ) -> None:
        super().__init__(
            params,
            lr=per_role(lr, lr * SCION_OTHER_RATIO if other_lr is None else other_lr),
            momentum=momentum,
            nesterov=nesterov,
            norms=per_role(_spectral(scale, options), Sign()),
            **_rest(options),
        )


@recipe
class PethickScion(SteepestDescent):
    """Scion as its authors define it: norms between spaces measured by root mean square, and a ball for each layer.

    Matrices have the spectral norm with scale sqrt(out/in), embeddings the longest column over sqrt(out), heads the
    largest entry times fan-in, vectors the root mean square. A constrained step, W <- (1 - lr) W + lr · radius · lmo,
    keeps the weights in the ball of that radius. Kernels of convolutions are flattened, so that fan-in counts their
    entries; the authors scale each of these entries instead.

    Args:
        lr: Learning rate, the part of the way to the edge of the ball.
        momentum: Weight of the old average; the authors' argument is one minus this.
        radius: Of the ball of every layer but the head's.
        head_radius: Of the head's.
        constrained: False leaves out the decay: steps of the same length, without a ball.
        **options: See `PolarOptions`.

    Source:
        Pethick et al., arXiv:2502.07529; radii of their GPT with tied embeddings.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 2**-12,
        *,
        momentum: float | Averages = 0.9,
        radius: float = 50.0,
        head_radius: float = 3000.0,
        constrained: bool = True,
        **options: Unpack[PolarOptions],
    ) -> None:
        radii: dict[Role, float] = {**per_role(radius, radius), "head": head_radius}
        super().__init__(
            params,
            lr={role: lr * own for role, own in radii.items()},
            momentum=momentum,
            weight_decay={role: 1 / own if constrained else 0.0 for role, own in radii.items()},
            norms={
                "matrix": _spectral("spectral", options),
                "embedding": Scaled(ColNorm(), "sqrt_fan_out"),
                "head": Scaled(Sign(), "inverse_fan_in"),
                "vector": Scaled(Frobenius(), "sqrt_size"),
            },
            **_rest(options),
        )


@recipe
class PolarGrad(SteepestDescent):
    """Regularised descent in the Euclidean norm of spectral norms: each matrix moves by its own nuclear norm.

    Everything else has Adam's Euclidean norm, whose regularised step is Adam's.

    Args:
        lr: Learning rate of the matrices, which move by lr · s² · ‖M‖_nuc · U Vᵀ with s the scale. The default is for
            a small language model; it changes with the size of gradients.
        momentum: Of the matrices, and the first of `betas` unless these are given.
        adam_lr: Learning rate of everything else. None: a fixed part of `lr`, tuned for a small language model: the
            units of the two have nothing in common, and the best ratio changes with the size of gradients.
        **options: See `AdamOptions`.

    Source:
        Lau, Long and Su, arXiv:2505.21799; with Adam for the rest a cell of arXiv:2510.09827.
    """

    def __init__(
        self,
        params: Parameters,
        lr: Rate = 0.5,
        *,
        momentum: float | Averages = 0.95,
        scale: ScaleRule = "none",
        **options: Unpack[AdamOptions],
    ) -> None:
        pieces = _regularized(lr, POLAR_GRAD_ADAM_RATIO, momentum, scale, options)
        super().__init__(params, product="euclid", **pieces)


@recipe
class MuonMax(SteepestDescent):
    """Regularised descent in the hybrid norm: all matrices move by the sum of all their nuclear norms.

    Everything else moves as under Adam. The sum must be known before the first matrix can move: `dual="cached"` keeps
    all directions until then, `dual="stale"` uses the nuclear norms of the step before. The sum grows with the number
    of matrices, so `lr` must be found anew when the depth of a model changes.

    Args:
        lr: Learning rate of the matrices, which move by lr · s · Σ s ‖M‖_nuc · U Vᵀ with s the scale. The default is
            for a small language model; with Momo, too large is better than too small.
        momentum: Of the matrices, and the first of `betas` unless these are given.
        adam_lr: Learning rate of everything else. None: that of the matrices, tuned as for `PolarGrad`.
        **options: See `AdamOptions`.

    Source:
        Crawshaw, Modi, Liu and Gower, arXiv:2510.09827.
    """

    _precondition: ClassVar[InputMoment | None] = None

    def __init__(
        self,
        params: Parameters,
        lr: Rate = 0.02,
        *,
        momentum: float | Averages = 0.95,
        scale: ScaleRule = "none",
        **options: Unpack[AdamOptions],
    ) -> None:
        pieces = _regularized(lr, MUON_MAX_ADAM_RATIO, momentum, scale, options, self._precondition)
        super().__init__(params, product=Hybrid(), **pieces)


@recipe
class NewtonMuonMax(MuonMax):
    """MuonMax whose directions are Newton-Muon's, and whose dual norms are what these directions gain.

    Args:
        params: A module or a plan.
        precondition: `InputMoment(...)` or the name of one of its presets, on the momentum. None: `InputMoment()`.
        **options: See `MuonMax`.
    """

    _precondition = InputMoment()


def _regularized(
    lr: Rate,
    ratio: float,
    momentum: float | Averages,
    scale: ScaleRule,
    options: AdamOptions,
    precondition: InputMoment | None = None,
) -> dict[str, Any]:
    """Pieces of the regularised cells with Adam's step for everything else."""
    return {
        "lr": _rates(lr, _alike(ratio), options),
        "momentum": momentum,
        "betas": options.pop("betas", None) or (momentum, 0.95),
        "norms": per_role(_spectral(scale, options), Ada2(**_taken(options, "eps"))),
        "regularized": True,
        **_rest(options, precondition),
    }


RECIPES: dict[str, type[SteepestDescent]] = {name: globals()[name] for name in __all__}
