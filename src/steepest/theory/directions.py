"""Update directions of a real model, scored against the exact Hessian of the loss in one weight at a time."""

import copy
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from steepest.linalg import polar
from steepest.linalg.spd import damped_power, ridge_unit
from steepest.names import unknown_name
from steepest.theory.scores import Score, hessian_score

ADAM_EPS = 1e-8


@dataclass(frozen=True)
class LayerDirections:
    """What was found for one layer.

    Args:
        layer: Name of the module.
        shape: (m, n) of its weight.
        condition: Largest over smallest eigenvalue of K, without ridge; infinite where the smallest is rounding.
        raised: How often γ was multiplied by ten until K + γ I was positive definite.
        scores: By direction.
    """

    layer: str
    shape: tuple[int, int]
    condition: float
    raised: int
    scores: Mapping[str, Score]


def linear_layers(model: nn.Module, patterns: Sequence[str] = ("*",)) -> list[str]:
    """Names of the linear layers that patterns such as "blocks.1.*" choose, in the model's order.

    Args:
        model: The model.
        patterns: Each must choose a layer; * and ? stand for any characters.

    Returns:
        Names of `nn.Linear` modules.

    Raises:
        ValueError: If a pattern chooses nothing.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(unknown_name("linear layer", pattern, names))
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def score_directions(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    layers: Sequence[str],
    *,
    ridge: float = 0.2,
    second_moments: Mapping[str, Tensor] | None = None,
) -> list[LayerDirections]:
    """Score seven directions for each of some linear layers, on one and the same batch.

    The model is copied, and the copy runs in float64, once; attention takes the implementation that has second
    derivatives. K is the mean of z zᵀ over all inputs z of the layer in that batch.

    Args:
        model: In the mode, training or evaluation, in which it is to be measured.
        loss: From the float64 copy to the mean loss over the batch, 0-d. Its floating-point inputs must be float64.
        layers: Names of `nn.Linear` modules, such as those from `linear_layers`.
        ridge: γ relative to tr(K) / n, at least 0; grows tenfold where K + γ I is not positive definite in float64.
        second_moments: Adam's averages of squared gradients by name of the layer, (m, n). A layer without one has the
            direction sign(G), Adam's first step, in place of "adam".

    Returns:
        One entry per layer, in the order given.

    Raises:
        ValueError: If a name is not that of a linear layer with a weight of its own, the ridge is negative, a layer
            does not take part in the loss, or something is not finite.

    Source:
        arXiv:2604.01472, section 4.3.
    """
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge must be a finite number of at least 0, got {ridge:g}.")
    model = copy.deepcopy(model).double()
    modules = {name: _own_linear(model, name) for name in layers}
    moments = {name: _InputMoment(module) for name, module in modules.items()}
    try:
        with sdpa_kernel(SDPBackend.MATH):
            value = loss(model)
            weights = [module.weight for module in modules.values()]
            gradients = torch.autograd.grad(value, weights, create_graph=True, materialize_grads=True)
    finally:
        for moment in moments.values():
            moment.handle.remove()
    found: list[LayerDirections] = []
    for (name, module), gradient in zip(modules.items(), gradients, strict=True):
        second = (second_moments or {}).get(name)
        found.append(_score_layer(name, module, gradient, moments[name].mean(name), ridge=ridge, second=second))
    return found


def directions(gradient: Tensor, root: Tensor, *, second_moment: Tensor | None = None) -> dict[str, Tensor]:
    """The directions, each to be subtracted; lengths differ and mean nothing.

    Args:
        gradient: G (m, n), float64.
        root: (K + γ I)^(-1/2) (n, n).
        second_moment: Adam's average of squared gradients (m, n), or None.

    Returns:
        By name.
    """
    half = gradient @ root
    adam = {"sign": gradient.sign()}
    if second_moment is not None:
        adam = {"adam": gradient / (second_moment.double().sqrt() + ADAM_EPS)}
    return {
        "gradient": gradient,
        **adam,
        "muon": polar(gradient, method="svd"),
        "muon-ns5": polar(gradient, method="newton-schulz", coefficients="jordan"),
        "newton-muon-half": polar(half, method="svd"),
        "whitened-muon": polar(half, method="svd") @ root,
        "newton-muon": polar(half @ root, method="svd"),
    }


def _score_layer(
    name: str, module: nn.Linear, gradient: Tensor, moment: Tensor, *, ridge: float, second: Tensor | None
) -> LayerDirections:
    if second is not None and second.shape != module.weight.shape:
        shapes = f"{tuple(second.shape)}, its weight {tuple(module.weight.shape)}"
        raise ValueError(
            f"The second moment of {name!r} has shape {shapes}. Give the average of its squared gradients."
        )
    batch = moment.unsqueeze(0)
    damped = damped_power(batch, ridge * ridge_unit(batch), 0.5)
    if not bool(damped.ok.all()):
        raise ValueError(f"The inputs of {name!r} are zero or not finite: K has no inverse, whatever the ridge.")
    chosen = directions(gradient.detach(), damped.power[0], second_moment=second)
    smallest, largest = (float(value) for value in torch.linalg.eigvalsh(moment)[[0, -1]])
    rounding = len(moment) * torch.finfo(moment.dtype).eps * largest
    return LayerDirections(
        layer=name,
        shape=(module.out_features, module.in_features),
        condition=largest / smallest if smallest > rounding else math.inf,
        raised=int(damped.raised),
        scores={key: hessian_score(q, gradient, module.weight) for key, q in chosen.items()},
    )


class _InputMoment:
    """Mean of z zᵀ over all inputs of a layer, by a hook before its forward."""

    def __init__(self, module: nn.Linear) -> None:
        self.total = torch.zeros(
            module.in_features, module.in_features, dtype=torch.float64, device=module.weight.device
        )
        self.tokens = 0
        self.handle = module.register_forward_pre_hook(self._collect)

    def _collect(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        z = inputs[0].detach().reshape(-1, inputs[0].size(-1))
        self.total = self.total.to(z.device) + z.mT @ z
        self.tokens += len(z)

    def mean(self, name: str) -> Tensor:
        if self.tokens == 0:
            raise ValueError(f"The layer {name!r} was not called. Leave it out, or call the module and not its weight.")
        return self.total / self.tokens


def _own_linear(model: nn.Module, name: str) -> nn.Linear:
    modules = dict(model.named_modules())
    module = modules.get(name)
    if not isinstance(module, nn.Linear):
        raise ValueError(unknown_name("linear layer", name, linear_layers(model)))
    owners = [
        path for path, _ in model.named_parameters(remove_duplicate=False) if model.get_parameter(path) is module.weight
    ]
    if len(owners) > 1:
        raise ValueError(f"The weight of {name!r} is shared by {', '.join(owners)}: K would not be all of its inputs.")
    module.weight.requires_grad_(True)
    return module
