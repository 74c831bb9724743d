"""How long the spectral step of an m x n matrix is: the four rules in use, under torch's names."""

import math
from typing import Literal, cast, get_args

from steepest.checks import choice

__all__ = ["ScaleRule", "scale_factor"]

ScaleRule = Literal["original", "match_rms_adamw", "spectral", "none"]
"""How long the spectral step of an m x n matrix is: see `scale_factor`."""


def scale_factor(rule: ScaleRule, fan_out: int, fan_in: int) -> float:
    """Factor s of the update s · U Vᵀ.

    Args:
        rule: "original": sqrt(max(1, m/n)). "match_rms_adamw": 0.2 · sqrt(max(m, n)), the root mean square that AdamW's
            updates usually have, so that one learning rate serves both. "spectral": sqrt(m/n), the unit ball of the
            operator norm between root-mean-square norms. "none": 1.
        fan_out: m, rows of the matrix that the view makes, not a kernel size.
        fan_in: n, columns.

    Returns:
        The factor; 1 if the matrix has no entries.

    Raises:
        ValueError: If the rule is not known.

    Source:
        Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/ (original); Liu et al., arXiv:2502.16982, eq. 4
        (match_rms_adamw); Bernstein and Newhouse, arXiv:2410.21265 (spectral).

    Examples:
        >>> [scale_factor(rule, 400, 100) for rule in ("original", "match_rms_adamw", "spectral", "none")]
        [2.0, 4.0, 2.0, 1.0]
        >>> [scale_factor(rule, 100, 400) for rule in ("original", "match_rms_adamw", "spectral", "none")]
        [1.0, 4.0, 0.5, 1.0]
    """
    if not isinstance(cast(object, rule), str) or rule not in get_args(ScaleRule):
        choice(get_args(ScaleRule))("scale", rule)
    if rule == "none" or fan_out == 0 or fan_in == 0:
        return 1.0
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(fan_out, fan_in))
    ratio = fan_out / fan_in
    return math.sqrt(ratio if rule == "spectral" else max(1.0, ratio))
