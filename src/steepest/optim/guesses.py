"""What a parameter is taken for where no model tells, and when that deserves a word.

The rule for bare parameters: two or more dimensions make a matrix, fewer a vector. In three dimensions, one of length
one in front (a table of positions, a class token) or fewer than two longer than one (a gain) make a vector too.

An embedding or an output head looks like any matrix, so that its spectral step would be wrong without a word. The
optimizer warns, once, if a parameter that was taken for a matrix is named like a table or a head, or has the shape of
one, or if two or more of them came in groups that each set weight_decay: a host's groups, with and without decay.
"""

import re
from collections.abc import Sequence

from torch import Tensor

from steepest.anatomy import Role

Named = Sequence[tuple[str, Tensor]]
# A long side of at least so many entries, and so many times the short one: tables of words have it, maps seldom.
LONG, TIMES = 1000, 6
TABLES = re.compile(
    r"(^|[._])(embed|embeds|embedding|embeddings|emb|wte|wpe|unembed|vocab|lm_head|head|classifier|readout)([._]|$)"
    r"|^(\w+\.)?output\.weight$"
)
SHOWN = 3  # examples in a message


def guessed_role(parameter: Tensor) -> Role:
    """Matrix or vector, by the dimensions.

    Args:
        parameter: Any tensor.
    """
    shape = parameter.shape
    flat = len(shape) == 3 and (shape[0] == 1 or sum(size > 1 for size in shape) < 2)
    return "matrix" if len(shape) >= 2 and not flat else "vector"


def doubt(guessed: Named, *, host: bool) -> str | None:
    """What to say of parameters that were taken for matrices.

    Args:
        guessed: They, with their names.
        host: Whether they came in several groups that each set weight_decay.

    Returns:
        A text that names the remedy; None if there is no reason to doubt.
    """
    named = [entry for entry in guessed if TABLES.search(entry[0])]
    shaped = [entry for entry in guessed if _long(entry[1])]
    several = list(guessed) if host and len(guessed) > 1 else []
    for doubtful, why in (
        (named, "but their names are those of embeddings or output heads"),
        (shaped, "but their shapes are those of embeddings or output heads"),
        (several, "but groups with and without weight decay are what a host makes of a whole model"),
    ):
        if doubtful:
            examples = ", ".join(f"{name!r} of shape {tuple(p.shape)}" for name, p in doubtful[:SHOWN])
            more = f" and {len(doubtful) - SHOWN} more" if len(doubtful) > SHOWN else ""
            return (
                f"Without the model, parameters with two or more dimensions are taken for matrices, {why}: {examples}"
                f"{more}. The embeddings and the output head among them get spectral steps, fused weights are not "
                "taken apart. Pass the model or steepest.route(model) instead. Where a host makes the groups: in "
                'transformers\' Trainer write optimizer_cls_and_kwargs=(from_model(steepest.Muon), {"lr": ...}), with '
                "from_model of steepest.integrations.transformers; elsewhere hand it the finished optimizer, "
                "steepest.Muon(model), or give each group a role=."
            )
    return None


def _long(parameter: Tensor) -> bool:
    if parameter.ndim != 2 or not parameter.numel():
        return False
    return max(parameter.shape) >= max(LONG, TIMES * min(parameter.shape))
