"""Recipes for other cells of the grid: norm of each layer, norm of all layers, constrained or regularised.

Source: Crawshaw, Modi, Liu and Gower, arXiv:2510.09827, where the cells have these names.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from steepest.anatomy import InputMoment
from steepest.geometry import Ada2, ColNorm, Frobenius, Hybrid, Product, Scaled, ScaleRule, Sign, Spectral
from steepest.linalg import Coefficients, PolarMethod
from steepest.optim.arguments import checked_options
from steepest.optim.descent import SteepestDescent
from steepest.optim.global_step import DualMode
from steepest.optim.guard import OnNonFinite
from steepest.optim.options import chosen_step_size, per_role
from steepest.optim.parameters import Parameters
from steepest.optim.step_size import StepSize

# Learning rate of everything else relative to the matrices', as found in docs/results/tuning for bytes of text.
SCION_OTHER_RATIO = 0.2
MUON_MAX_ADAM_RATIO = 1.0
POLAR_GRAD_ADAM_RATIO = 0.04


class Scion(SteepestDescent):
    """Constrained descent in the largest of the spectral norms of matrices and the largest entry of everything else.

    The cell that arXiv:2510.09827 calls Scion. `PethickScion` is Scion as its authors define it.

    Args:
        params: A module, or as for `SteepestDescent`.
        lr: Learning rate of the matrices, in units of the spectral norm (times the scale) per step.
        momentum: Of everything.
        nesterov: Of everything.
        weight_decay: Decoupled, for everything but vectors (gains, biases).
        other_lr: Learning rate of everything else: the change of each entry per step. None: lr / 5.
        scale: Length of the matrices' step by shape: "original", "match_rms_adamw", "spectral" or "none".
        coefficients: Of the polynomial methods.
        polar: "auto", "newton-schulz", "gram" or "svd".
        dtype: Of the matrix products; None: bfloat16 on CUDA, float32 elsewhere, float64 for float64 parameters.
        momo: Whether steps are Momo's, with its defaults; the loss must then be passed.
        step_size: `Momo(...)` with options of its own.
        precondition: `InputMoment(...)`, the name of one of its presets, or None for none; as in `NewtonMuon`.
        dual: "cached" or "stale", for Momo.
        on_nonfinite: "skip" or "raise".

    Raises:
        ValueError: If an option or parameter does not fit.
        TypeError: If an option or parameter is of the wrong type.
    """

    @checked_options()
    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        other_lr: float | Tensor | None = None,
        scale: ScaleRule = "none",
        coefficients: str | Coefficients | Sequence[Sequence[float]] = "auto",
        polar: PolarMethod = "auto",
        dtype: torch.dtype | None = None,
        momo: bool = False,
        step_size: StepSize | None = None,
        precondition: InputMoment | str | None = None,
        dual: DualMode = "cached",
        on_nonfinite: OnNonFinite = "skip",
    ) -> None:
        spectral = Spectral(scale=scale, polar=polar, coefficients=coefficients, dtype=dtype)
        super().__init__(
            params,
            lr=per_role(lr, lr * SCION_OTHER_RATIO if other_lr is None else other_lr),
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=per_role(weight_decay, weight_decay, 0.0),
            norms=per_role(spectral, Sign()),
            step_size=chosen_step_size(momo, step_size),
            precondition=precondition,
            dual=dual,
            on_nonfinite=on_nonfinite,
        )


class PethickScion(SteepestDescent):
    """Scion as its authors define it: norms between spaces measured by root mean square, and a ball for each layer.

    Matrices have the spectral norm with scale sqrt(out/in), embeddings the longest column over sqrt(out), heads the
    largest entry times fan-in, vectors the root mean square. A constrained step, W <- (1 - lr) W + lr · radius · lmo,
    keeps the weights in the ball of that radius. Kernels of convolutions are flattened, so that fan-in counts their
    entries; the authors scale each of these entries instead.

    Args:
        params: A module, or as for `SteepestDescent`.
        lr: Learning rate, the part of the way to the edge of the ball.
        momentum: Weight of the old average; the authors' argument is one minus this.
        radius: Of the ball of every layer but the head's.
        head_radius: Of the head's.
        constrained: False leaves out the decay: steps of the same length, without a ball.
        coefficients: As for `Scion`.
        polar: As for `Scion`.
        dtype: As for `Scion`.
        momo: As for `Scion`.
        step_size: As for `Scion`.
        dual: As for `Scion`.
        on_nonfinite: As for `Scion`.

    Raises:
        ValueError: If an option or parameter does not fit.
        TypeError: If an option or parameter is of the wrong type.

    Source:
        Pethick et al., arXiv:2502.07529; radii of their GPT with tied embeddings.
    """

    @checked_options()
    def __init__(
        self,
        params: Parameters,
        lr: float = 2**-12,
        *,
        momentum: float = 0.9,
        radius: float = 50.0,
        head_radius: float = 3000.0,
        constrained: bool = True,
        coefficients: str | Coefficients | Sequence[Sequence[float]] = "auto",
        polar: PolarMethod = "auto",
        dtype: torch.dtype | None = None,
        momo: bool = False,
        step_size: StepSize | None = None,
        dual: DualMode = "cached",
        on_nonfinite: OnNonFinite = "skip",
    ) -> None:
        radii = per_role(radius, radius)
        radii["head"] = head_radius
        spectral = Spectral(scale="spectral", polar=polar, coefficients=coefficients, dtype=dtype)
        super().__init__(
            params,
            lr={role: lr * own for role, own in radii.items()},
            momentum=momentum,
            weight_decay={role: 1 / own if constrained else 0.0 for role, own in radii.items()},
            norms={
                "matrix": spectral,
                "embedding": Scaled(ColNorm(), "sqrt_fan_out"),
                "head": Scaled(Sign(), "inverse_fan_in"),
                "vector": Scaled(Frobenius(), "sqrt_size"),
            },
            step_size=chosen_step_size(momo, step_size),
            dual=dual,
            on_nonfinite=on_nonfinite,
        )


class PolarGrad(SteepestDescent):
    """Regularised descent in the Euclidean norm of spectral norms: each matrix moves by its own nuclear norm.

    Everything else has Adam's Euclidean norm, whose regularised step is Adam's.

    Args:
        params: A module, or as for `SteepestDescent`.
        lr: Learning rate of the matrices, which move by lr · s² · ‖M‖_nuc · U Vᵀ with s the scale. None: 0.5, found for
            a small language model; it changes with the size of gradients.
        momentum: Of the matrices, and the first of `betas` unless these are given.
        weight_decay: Decoupled, for everything but vectors (gains, biases).
        adam_lr: Learning rate of everything else. None: a fixed part of `lr`, tuned for a small language model: the
            units of the two have nothing in common, and the best ratio changes with the size of gradients.
        betas: Adam's; None: (momentum, 0.95).
        eps: Adam's.
        scale: As for `Scion`.
        coefficients: As for `Scion`.
        polar: As for `Scion`.
        dtype: As for `Scion`.
        momo: As for `Scion`.
        step_size: As for `Scion`.
        precondition: As for `Scion`.
        dual: As for `Scion`.
        on_nonfinite: As for `Scion`.

    Raises:
        ValueError: If an option or parameter does not fit.
        TypeError: If an option or parameter is of the wrong type.

    Source:
        Lau, Long and Su, arXiv:2505.21799; with Adam for the rest a cell of arXiv:2510.09827.
    """

    _product: Product | str = "euclid"
    _lr = 0.5
    _adam_ratio = POLAR_GRAD_ADAM_RATIO
    _precondition: InputMoment | None = None

    @checked_options()
    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor | None = None,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        adam_lr: float | Tensor | None = None,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        scale: ScaleRule = "none",
        coefficients: str | Coefficients | Sequence[Sequence[float]] = "auto",
        polar: PolarMethod = "auto",
        dtype: torch.dtype | None = None,
        momo: bool = False,
        step_size: StepSize | None = None,
        precondition: InputMoment | str | None = None,
        dual: DualMode = "cached",
        on_nonfinite: OnNonFinite = "skip",
    ) -> None:
        spectral = Spectral(scale=scale, polar=polar, coefficients=coefficients, dtype=dtype)
        lr = self._lr if lr is None else lr
        super().__init__(
            params,
            lr=per_role(lr, lr * self._adam_ratio if adam_lr is None else adam_lr),
            momentum=momentum,
            weight_decay=per_role(weight_decay, weight_decay, 0.0),
            betas=(momentum, 0.95) if betas is None else betas,
            norms=per_role(spectral, Ada2(eps=eps)),
            product=self._product,
            regularized=True,
            step_size=chosen_step_size(momo, step_size),
            precondition=self._precondition if precondition is None else precondition,
            dual=dual,
            on_nonfinite=on_nonfinite,
        )


class MuonMax(PolarGrad):
    """Regularised descent in the hybrid norm: all matrices move by the sum of all their nuclear norms.

    Everything else moves as under Adam. The sum must be known before the first matrix can move: `dual="cached"` keeps
    all directions until then, `dual="stale"` uses the nuclear norms of the step before. The sum grows with the number
    of matrices, so `lr` must be found anew when the depth of a model changes.

    Args:
        params: A module, or as for `SteepestDescent`.
        lr: Learning rate of the matrices, which move by lr · s · Σ s ‖M‖_nuc · U Vᵀ with s the scale. None: 0.02, found
            for a small language model; with Momo, too large is better than too small.
        momentum: As for `PolarGrad`.
        weight_decay: As for `PolarGrad`.
        adam_lr: As for `PolarGrad`.
        betas: As for `PolarGrad`.
        eps: As for `PolarGrad`.
        scale: As for `PolarGrad`.
        coefficients: As for `PolarGrad`.
        polar: As for `PolarGrad`.
        dtype: As for `PolarGrad`.
        momo: As for `PolarGrad`.
        step_size: As for `PolarGrad`.
        precondition: As for `PolarGrad`.
        dual: "cached" or "stale".
        on_nonfinite: As for `PolarGrad`.

    Raises:
        ValueError: If an option or parameter does not fit.
        TypeError: If an option or parameter is of the wrong type.

    Source:
        Crawshaw, Modi, Liu and Gower, arXiv:2510.09827.
    """

    _product = Hybrid()
    _lr = 0.02
    _adam_ratio = MUON_MAX_ADAM_RATIO


class NewtonMuonMax(MuonMax):
    """MuonMax whose directions are Newton-Muon's, and whose dual norms are what these directions gain.

    Args:
        params: A module or a plan.
        lr: As for `MuonMax`, like all options but one.
        precondition: `InputMoment(...)` or the name of one of its presets, on the momentum. None: `InputMoment()`.

    Raises:
        ValueError: If an option or parameter does not fit.
        TypeError: If an option or parameter is of the wrong type.
    """

    _precondition = InputMoment()


class SignDescent(SteepestDescent):
    """Descent in the largest entry: sign descent with momentum, or, regularised, times the sum of absolute entries.

    Args:
        params: A module, or as for `SteepestDescent`.
        lr: Learning rate: the change of each entry per step.
        momentum: Weight of the old average of gradients.
        nesterov: Look ahead by one gradient.
        weight_decay: Decoupled, for everything but vectors (gains, biases).
        regularized: Whether steps are times the sum of all absolute entries of the momentum.
        momo: As for `Scion`.
        step_size: As for `Scion`.
        on_nonfinite: As for `Scion`.

    Raises:
        ValueError: If an option or parameter does not fit.
        TypeError: If an option or parameter is of the wrong type.

    Source:
        Bernstein et al., arXiv:1802.04434.
    """

    @checked_options()
    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        regularized: bool = False,
        momo: bool = False,
        step_size: StepSize | None = None,
        on_nonfinite: OnNonFinite = "skip",
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=per_role(weight_decay, weight_decay, 0.0),
            norms=per_role(Sign(), Sign()),
            regularized=regularized,
            step_size=chosen_step_size(momo, step_size),
            on_nonfinite=on_nonfinite,
        )
