"""Warnings that point at the user's line, however many frames of this package and of torch lie between."""

import sys
import warnings
from pathlib import Path

import torch

_INSIDE = tuple(str(Path(file).parent) for file in (__file__, torch.__file__))


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the nearest line that is neither this package's nor torch's.

    Args:
        message: What to say.
        category: Of the warning.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
