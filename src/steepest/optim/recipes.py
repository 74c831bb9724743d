"""Named optimizers: each chooses the pieces of `SteepestDescent` and nothing else."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steepest.anatomy import InputMoment
from steepest.geometry import AdaInf, ScaleRule, Spectral
from steepest.linalg import Coefficients, PolarMethod
from steepest.optim.arguments import checked_options
from steepest.optim.descent import SteepestDescent
from steepest.optim.global_step import DualMode
from steepest.optim.guard import OnNonFinite
from steepest.optim.options import chosen_step_size, per_role
from steepest.optim.parameters import Parameters
from steepest.optim.step_size import StepSize

# Learning rate of everything that is no matrix, relative to that of the matrices: the ratio of arXiv:2510.09827's
# default. Under "match_rms_adamw" both kinds of update have one size, and one learning rate serves both.
ADAM_LR_RATIO = 0.1


class Muon(SteepestDescent):
    """Spectral descent for matrices, Adam for everything else.

    The four variants of the literature are `nesterov` on or off, times `weight_decay` zero or not. With
    `nesterov=True, coefficients="jordan"` the matrix update is that of `torch.optim.Muon`.

    Args:
        params: A module, or as for `SteepestDescent`.
        lr: Learning rate of the matrices, in units of the spectral norm (times the scale) per step.
        momentum: Of the matrices.
        nesterov: Of the matrices.
        weight_decay: Decoupled, for matrices, embeddings and head; not for vectors (gains, biases).
        adam_lr: Learning rate of everything else. None: `lr` with scale="match_rms_adamw", else lr / 10.
        betas: Adam's, for everything else; None: (0.9, 0.95), or (momentum, 0.95) with Momo, which needs one momentum.
        eps: Adam's.
        scale: Length of the step by shape: "original", "match_rms_adamw", "spectral" or "none".
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

    Source:
        Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/.
    """

    _precondition: InputMoment | None = None

    @checked_options()
    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        adam_lr: float | Tensor | None = None,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        scale: ScaleRule = "original",
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
        if adam_lr is None:
            adam_lr = lr * (1.0 if scale == "match_rms_adamw" else ADAM_LR_RATIO)
        super().__init__(
            params,
            lr=per_role(lr, adam_lr),
            momentum=momentum,
            nesterov=per_role(nesterov, False),
            weight_decay=per_role(weight_decay, weight_decay, 0.0),
            betas=betas,
            norms=per_role(spectral, AdaInf(eps=eps)),
            step_size=chosen_step_size(momo, step_size),
            precondition=self._precondition if precondition is None else precondition,
            dual=dual,
            on_nonfinite=on_nonfinite,
        )


class NewtonMuon(Muon):
    """Muon that knows what its layers read: it follows the polar factor of M (K + γ I)^-a, K the inputs' second moment.

    K is looked at in one step of 32 only, so that other steps cost one more product per layer. The model itself, or its
    plan, must be passed: parameters alone do not tell which modules they belong to.

    Args:
        params: A module or a plan.
        lr: As for `Muon`, like all options but one.
        precondition: `InputMoment(...)` or the name of one of its presets. None: `InputMoment()`, whose exponent and
            structures are the best of twelve settings tried in docs/results/newton_muon, on one small model, at
            `every=8`; "paper_record4" has the paper's moment, not that script's whole recipe (`InputMoment.preset`).

    Raises:
        ValueError: If an option or parameter does not fit.
        TypeError: If an option or parameter is of the wrong type.

    Source:
        Du and Su, arXiv:2604.01472, Algorithm 1.
    """

    _precondition = InputMoment()


class MuonAdam(Muon):
    """Constrained steepest descent in the largest of the spectral norms and Adam's norm.

    The same step as `Muon` with this cell's choices: plain momentum, one decay rate for all averages, no scale by
    shape, and a learning rate ratio of ten.

    Args:
        params: As for `Muon`.
        lr: Learning rate of the matrices; everything else has a tenth of it unless `adam_lr` is given.
        momentum: Of the matrices, and the first of `betas` unless these are given.
        weight_decay: As for `Muon`.
        adam_lr: As for `Muon`.
        betas: As for `Muon`; None: (momentum, 0.95).
        eps: Adam's.
        scale: As for `Muon`.
        coefficients: As for `Muon`.
        polar: As for `Muon`.
        dtype: As for `Muon`.
        momo: As for `Muon`.
        step_size: As for `Muon`.
        precondition: As for `Muon`.
        dual: As for `Muon`.
        on_nonfinite: As for `Muon`.

    Raises:
        ValueError: If an option or parameter does not fit.
        TypeError: If an option or parameter is of the wrong type.

    Source:
        Crawshaw, Modi, Liu and Gower, arXiv:2510.09827.
    """

    @checked_options()
    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 0.02,
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
        super().__init__(
            params,
            lr,
            momentum=momentum,
            nesterov=False,
            weight_decay=weight_decay,
            adam_lr=adam_lr,
            betas=(momentum, 0.95) if betas is None else betas,
            eps=eps,
            scale=scale,
            coefficients=coefficients,
            polar=polar,
            dtype=dtype,
            momo=momo,
            step_size=step_size,
            precondition=precondition,
            dual=dual,
            on_nonfinite=on_nonfinite,
        )


class Adam(SteepestDescent):
    """Adam, with decoupled weight decay for everything but vectors: steepest descent in Adam's own norm.

    Args:
        params: A module, or as for `SteepestDescent`.
        lr: Learning rate, about the largest change of an entry per step.
        betas: Weights of the old averages of gradients and of their squares; None: (0.9, 0.999).
        eps: Added to the root of the second moment.
        weight_decay: Decoupled; not for vectors (gains, biases).
        momo: Whether steps are Momo's, with its defaults; the loss must then be passed.
        step_size: `Momo(...)` with options of its own.
        on_nonfinite: "skip" or "raise".

    Raises:
        ValueError: If an option or parameter does not fit.
        TypeError: If an option or parameter is of the wrong type.

    Source:
        Kingma and Ba, arXiv:1412.6980, Algorithm 1; Loshchilov and Hutter, arXiv:1711.05101 (decoupled decay).
    """

    @checked_options()
    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] | None = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momo: bool = False,
        step_size: StepSize | None = None,
        on_nonfinite: OnNonFinite = "skip",
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            weight_decay=per_role(weight_decay, weight_decay, 0.0),
            betas=(0.9, 0.999) if betas is None else betas,
            norms=per_role(AdaInf(eps=eps), AdaInf(eps=eps)),
            step_size=chosen_step_size(momo, step_size),
            on_nonfinite=on_nonfinite,
        )
