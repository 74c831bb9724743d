"""Norms on the weight of one layer, each with its dual norm and linear minimisation oracle."""

from steepest.geometry import adaptive, layer, norm, product, scale, scaled, spectrum
from steepest.geometry.adaptive import *  # noqa: F403
from steepest.geometry.layer import *  # noqa: F403
from steepest.geometry.norm import *  # noqa: F403
from steepest.geometry.product import *  # noqa: F403
from steepest.geometry.scale import *  # noqa: F403
from steepest.geometry.scaled import *  # noqa: F403
from steepest.geometry.spectrum import *  # noqa: F403

__all__: list[str] = []
__all__ += adaptive.__all__
__all__ += layer.__all__
__all__ += norm.__all__
__all__ += product.__all__
__all__ += scale.__all__
__all__ += scaled.__all__
__all__ += spectrum.__all__
