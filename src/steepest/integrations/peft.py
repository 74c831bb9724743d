"""PEFT: LoRA+ with roles, names and views as from the model.

`steepest.Muon(model)` of a model with adapters needs nothing from here. LoRA+ hands groups of bare parameters to an
optimizer, which must then guess what is a matrix.
"""

from collections.abc import Sequence
from typing import Any, cast

from steepest.anatomy import PlanRow, route
from steepest.optim import SteepestDescent

try:
    from peft import PeftModel
    from peft.optimizers import create_loraplus_optimizer as grouped
except ImportError as error:
    raise ImportError("steepest.integrations.peft needs peft: pip install 'steepest[peft]'") from error

Groups = Sequence[dict[str, Any]]


def create_loraplus_optimizer(
    model: PeftModel, optimizer_cls: type[SteepestDescent], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> SteepestDescent:
    """As PEFT's function of that name: B of each adapter learns faster than A (arXiv:2402.12354).

    Args:
        model: With adapters.
        optimizer_cls: A recipe such as `steepest.Muon`; one that looks at layers' inputs needs the model, and cannot be
            made of groups.
        lr: Of A, and of all that is trained besides.
        loraplus_lr_ratio: Of the rate of B to that of A.
        **kwargs: Options of the recipe, and PEFT's `loraplus_weight_decay` and `loraplus_lr_embedding`.

    Returns:
        The optimizer, with a group for each role in each of LoRA+'s groups, all with the rates of LoRA+.
    """
    rows = {row.parameter: row for row in route(model)}

    def build(groups: Groups, **options: Any) -> SteepestDescent:
        return optimizer_cls([part for group in groups for part in _by_role(group, rows)], **options)

    made = grouped(model, cast(Any, build), lr=lr, loraplus_lr_ratio=loraplus_lr_ratio, **kwargs)
    return cast(SteepestDescent, made)


def _by_role(group: dict[str, Any], rows: dict[Any, PlanRow]) -> Groups:
    """A group's parameters with their names, those of one role and view together."""
    found: dict[Any, dict[str, Any]] = {}
    for parameter in group["params"]:
        row = rows[parameter]
        key = row.role, str(row.view)
        part = found.setdefault(key, {**group, "params": [], "role": row.role, "view": row.view})
        part["params"].append((row.name, parameter))
    return list(found.values())
