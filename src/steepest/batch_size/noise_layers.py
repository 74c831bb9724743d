"""What is measured of one layer: its view as matrices, the direction its optimizer takes, and a row of numbers."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from steepest.anatomy import PlanRow, View, route
from steepest.batch_size.estimators import Duals, alignment, euclidean, l1, nested_sizes, nuclear
from steepest.checks import refusal
from steepest.geometry import Frobenius, Norm, Sign, Spectral, get_norm
from steepest.linalg import PolarMethod
from steepest.names import unknown_name
from steepest.optim import SteepestDescent
from steepest.optim.momentum import debias
from steepest.optim.state import SECOND, STEP

Kind = Literal["euclidean", "l1", "nuclear", "alignment"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# what torch's own optimizers would do with the gradient of one large batch and no past
TORCH_NORMS: dict[str, Norm] = {
    "SGD": Frobenius(),
    "Adam": Sign(),
    "AdamW": Sign(),
}


_INSIDE = ("optimizer", "_optimizer", "optim", "base_optimizer", "_base_optimizer")  # as wrappers call it


@dataclass(frozen=True, eq=False)
class Layer:
    """One parameter of the optimizer.

    Args:
        name: In the model.
        parameter: Itself.
        view: How it is a set of matrices; None for one that is none.
        matrix: Whether it is optimised as matrices, so that the nuclear scale is taken.
        norm: In which a step is steepest; None where nobody asked for the alignment.
    """

    name: str
    parameter: Tensor
    view: View | None
    matrix: bool
    norm: Norm | None


def stepping(optimizer: object) -> Optimizer:
    """The optimizer that takes the steps, and calls the hooks of steps: the one inside of wrappers that do not.

    Args:
        optimizer: An optimizer, or a wrapper of one.

    Raises:
        TypeError: If there is none.
    """
    found = optimizer
    while not _calls_hooks(found):
        inner = [own for name in _INSIDE if (own := getattr(found, name, None)) is not None and own is not found]
        if not inner:
            raise TypeError(
                f"NoiseScale takes the torch.optim.Optimizer whose steps it counts, got {type(optimizer).__name__}, "
                "which calls no hooks when it steps. If it wraps an optimizer, pass the one inside: NoiseScale(model, "
                "wrapper.optimizer)."
            )
        found = inner[0]
    return cast(Optimizer, found)


def _calls_hooks(optimizer: object) -> bool:
    """Whether torch.optim.Optimizer's constructor ran, which wraps `step` of the class."""
    own = hasattr(optimizer, "_optimizer_step_pre_hooks")
    return isinstance(optimizer, Optimizer) and own and hasattr(type(optimizer).step, "hooked")


def find_layers(model: nn.Module, optimizer: Optimizer, kinds: Sequence[Kind], norm: Norm | str | None) -> list[Layer]:
    """The optimizer's parameters in its own order, each once.

    Args:
        model: Whose parameters they are.
        optimizer: Any.
        kinds: What is to be measured.
        norm: For the alignment, of every layer; None: the optimizer's own.

    Raises:
        ValueError: If a parameter is not in the model, a kind finds no layer, or the norm cannot be known or used.
    """
    planned = optimizer.plan if isinstance(optimizer, SteepestDescent) else route(model)
    rows = {row.parameter: row for row in planned}
    given = None if norm is None else get_norm(norm)
    layers: list[Layer] = []
    for group in optimizer.param_groups:
        own = _norm_of(optimizer, group, given) if "alignment" in kinds else None
        for parameter in cast(list[Tensor], group["params"]):
            if parameter not in rows:
                raise ValueError(
                    f"The optimizer has a parameter of shape {tuple(parameter.shape)} that is not in the model. Give "
                    "NoiseScale the model (after wrapping and sharding it) whose parameters the optimizer was built of."
                )
            layers.append(_layer(rows[parameter], own))
    if "nuclear" in kinds and not any(layer.matrix for layer in layers):
        raise ValueError(
            "kinds has 'nuclear', which is for matrices, but the optimizer has none: embeddings, heads and vectors do "
            "not count. Leave the kind out."
        )
    return layers


def check_kinds(name: str, kinds: object) -> tuple[Kind, ...]:
    """Check for kinds of noise scales.

    Args:
        name: Of the option.
        kinds: What was given.

    Returns:
        The kinds in the order of `KINDS`.

    Raises:
        ValueError: If there are none, or one is not known, or stands twice.
        TypeError: If it is no list of words.
    """
    words = ", ".join(KINDS)
    expected = f"a list of some of {words}"
    if not isinstance(kinds, list | tuple | set | frozenset):
        remedy = f"Write kinds=({kinds!r},)." if isinstance(kinds, str) and kinds in KINDS else ""
        raise TypeError(refusal(name, expected, kinds, remedy))
    given = cast(Collection[object], kinds)
    for kind in given:
        if not isinstance(kind, str):
            raise TypeError(refusal(name, expected, kinds))
        if kind not in KINDS:
            raise ValueError(refusal(name, expected, kinds, unknown_name("kind of noise scale", kind, KINDS)))
    if not given:
        raise ValueError(f"{name} is empty: {refusal('it', f'at least one of {words}', kinds)}")
    if len(set(given)) < len(given):
        raise ValueError(refusal(name, f"{expected}, each once", kinds))
    return tuple(kind for kind in KINDS if kind in given)


def _norm_of(optimizer: Optimizer, group: Mapping[str, Any], given: Norm | None) -> Norm:
    if given is not None:
        return given
    if isinstance(optimizer, SteepestDescent):
        return optimizer.norm_of(group)
    name = type(optimizer).__name__
    if name == "Muon":  # torch's rules have the names of ours
        return Spectral(scale=group.get("adjust_lr_fn") or "original", polar="auto")
    if name not in TORCH_NORMS:
        raise ValueError(
            f"kinds has 'alignment', but in which norm {name} descends is not known. Pass norm=, an object or a name "
            "such as 'sign' or 'spectral', or leave the kind out."
        )
    return TORCH_NORMS[name]


def _layer(row: PlanRow, norm: Norm | None) -> Layer:
    if norm is not None and norm.matrix and row.view is None:
        raise ValueError(
            f"The norm {norm} is one of matrices, but {row.name!r} of shape {row.shape} is none. Build one NoiseScale "
            "for each optimizer, or pass a norm for all shapes, such as 'sign' or 'frobenius'."
        )
    return Layer(row.name, row.parameter, row.view, row.role == "matrix" and row.view is not None, norm)


def second_moment(optimizer: Optimizer, layer: Layer) -> Tensor | None:
    """What an adaptive norm of ours needs to choose its direction: V, debiased; None if not needed or not there yet."""
    state = optimizer.state.get(layer.parameter, {})
    if layer.norm is None or not layer.norm.adapts or SECOND not in state:
        return None
    groups = [g for g in optimizer.param_groups if any(p is layer.parameter for p in g["params"])]
    weight = debias(groups[0]["beta2"], state[STEP].to(state[SECOND].dtype))
    return state[SECOND] / weight if bool(weight > 0) else None


def columns(kinds: Sequence[Kind], count: int) -> tuple[str, ...]:
    """Names of the numbers of one layer.

    Args:
        kinds: What is measured.
        count: R, the number of micro-batches.
    """
    names: list[str] = []
    for kind in kinds:
        if kind == "euclidean":
            names += ["euclidean.noise", "euclidean.signal"]
        elif kind == "alignment":
            names += [f"alignment.{size}" for size in nested_sizes(count)]
        else:
            names += [f"{kind}.{part}" for part in Duals._fields]
    return tuple(names)


def measure_layer(
    layer: Layer,
    gradients: Tensor,
    samples: Tensor,
    *,
    kinds: Sequence[Kind],
    moment: Tensor | None,
    method: PolarMethod,
) -> Tensor:
    """All numbers of one layer.

    Args:
        layer: Which.
        gradients: g (R, *shape), mean gradients of micro-batches.
        samples: b (R,).
        kinds: What to measure.
        moment: As of `second_moment`.
        method: Of the polar factors in the nuclear scale.

    Returns:
        (columns,) float64; all NaN if a gradient is not finite.
    """
    gradients = gradients.to(torch.promote_types(gradients.dtype, torch.float32))
    size = len(columns(kinds, len(gradients)))
    if not bool(gradients.isfinite().all()):
        return torch.full((size,), torch.nan, dtype=torch.float64, device=gradients.device)
    values: list[Tensor] = []
    for kind in kinds:
        if kind == "euclidean":
            values += euclidean(gradients, samples)
        elif kind == "l1":
            values += l1(gradients, samples)
        elif kind == "nuclear":
            values += _nuclear(layer, gradients, samples, method)
        else:
            values += _alignment(layer, gradients, samples, moment).unbind()
    return torch.stack([value.double() for value in values])


def _nuclear(layer: Layer, gradients: Tensor, samples: Tensor, method: PolarMethod) -> list[Tensor]:
    """Summed over the layer's matrices: in the largest of their norms, duals add up. No matrix: zeros."""
    if not layer.matrix:
        return [gradients.new_zeros((), dtype=torch.float64)] * len(Duals._fields)
    parts = [nuclear(batch, samples, method=method) for batch in _batches(gradients, layer.view)]
    return [torch.stack([part[place].sum() for part in parts]).sum() for place in range(len(Duals._fields))]


def _alignment(layer: Layer, gradients: Tensor, samples: Tensor, moment: Tensor | None) -> Tensor:
    norm = cast(Norm, layer.norm)
    view = layer.view if norm.matrix else None
    batches = _batches(gradients, view)
    moments = [None] * len(batches)
    if moment is not None:
        wide = moment.to(gradients.dtype).to(gradients.device)
        moments = [batch[0] for batch in _batches(wide.unsqueeze(0), view)]
    sizes = nested_sizes(len(gradients))
    parts = [
        alignment(batch, samples, partial(_ascent, norm, v), sizes) for batch, v in zip(batches, moments, strict=True)
    ]
    return torch.stack(parts).sum(0)


def _ascent(norm: Norm, moment: Tensor | None, average: Tensor) -> Tensor:
    """-lmo; a norm that adapts and has no past takes the squares of what it is given, as its first step does."""
    if norm.adapts and moment is None:
        moment = average.square()
    return -norm.lmo(average, moment)


def _batches(gradients: Tensor, view: View | None) -> list[Tensor]:
    """(R, B, m, n) for each block of the view, or one with a single row."""
    if view is None:
        return [gradients.reshape(len(gradients), 1, 1, -1)]
    split = [view.split_tensor(gradient) for gradient in gradients]
    return [torch.stack(block) for block in zip(*split, strict=True)]
