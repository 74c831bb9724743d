"""Multiplying parameter-shaped tensors with the powers of their layers' input moments, in one step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.anatomy import LINEAR
from steepest.stages.inputs.options import InputMoment
from steepest.stages.inputs.readers import Reader
from steepest.stages.inputs.refresh import multiplied


@dataclass(frozen=True)
class Applied:
    """The powers of one step.

    Args:
        options: Of the preconditioning.
        powers: Identity of a parameter to how it is read, and the powers (one per exponent, *shape of its layout).
        blend: Part of them that is used.
    """

    options: InputMoment
    powers: Mapping[int, tuple[Reader, Tensor]]
    blend: float

    def times(self, parameters: Sequence[Tensor], tensors: Sequence[Tensor], which: int) -> list[Tensor]:
        """Multiply with P_a or P_b.

        Args:
            parameters: To which the tensors belong.
            tensors: Shaped like them.
            which: 0 for P_a, 1 for P_b.

        Returns:
            New tensors, or the given ones where nothing is to be multiplied.
        """
        exponent = self.options.exponents[which]
        if exponent == 0:
            return list(tensors)
        place = self.options.powers.index(exponent)
        return [self._one(parameter, tensor, place) for parameter, tensor in zip(parameters, tensors, strict=True)]

    def _one(self, parameter: Tensor, tensor: Tensor, place: int) -> Tensor:
        found = self.powers.get(id(parameter))
        if found is None:
            return tensor
        reader, powers = found
        solver = self.options.solver
        if reader.view == LINEAR and tensor.ndim == 2:
            result = multiplied(tensor.unsqueeze(0), powers[place], reader.layout, solver=solver)[0]
        else:
            (batch,) = reader.view.split_tensor(tensor)
            result = reader.view.merge((multiplied(batch, powers[place], reader.layout, solver=solver),), tensor.shape)
        return result if self.blend == 1 else torch.lerp(tensor, result, self.blend)
