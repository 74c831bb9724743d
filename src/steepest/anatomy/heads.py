"""The output head of a model: a weight whose type is that of any other, found by its place.

In this order: what the model itself names (`get_output_embeddings`); a linear layer with one output per row of the
token table; the last matrix of the model, if it is not the only one. The last two never look inside repeated blocks.
"""

from collections.abc import Iterator, Sequence

from torch import nn

from steepest.anatomy.plan import Role
from steepest.anatomy.sites import Site, kinds, unwrap

_BLOCKS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def find_heads(model: nn.Module, groups: Sequence[Sequence[Site]], roles: Sequence[Role]) -> dict[int, str]:
    """The weights of the output head.

    Args:
        model: The model.
        groups: Its parameters, as by `sites.distinct`.
        roles: The role of each parameter by its type.

    Returns:
        `id` of each head's parameter to the reason; a parameter that is a token table stays one.
    """
    matrices = [sites[0] for sites, role in zip(groups, roles, strict=True) if role == "matrix"]
    tables = [sites for sites, role in zip(groups, roles, strict=True) if role == "embedding"]
    inner = unwrap(model)
    declared = list(_declared(inner))
    if declared:
        return dict.fromkeys(declared, "output head named by the model")
    if any(len({kinds(site.module)[:1] for site in sites}) > 1 for sites in tables):
        return {}  # a table tied with another kind of module: that one is the head
    inside = _inside_blocks(inner)
    outside = [site for site in matrices if id(site.module) not in inside]
    rows = _token_rows(inner)
    reading_out = [site for site in outside if isinstance(site.module, nn.Linear) and site.shape[0] == rows]
    if reading_out:  # an inner layer may have that width by chance; the head comes last
        return {id(reading_out[-1].parameter): f"output head: one row per row of the token table, {rows}"}
    last = matrices[-1] if len(matrices) > 1 else None
    if last and id(last.module) not in inside and _is_layer(last):
        return {id(last.parameter): "output head: the last matrix of the model"}
    return {}


def _is_layer(site: Site) -> bool:
    """A linear layer or a convolution of any library, rather than experts, a recurrence or fused attention."""
    return site.leaf == "weight" and any(hasattr(site.module, fan) for fan in ("out_features", "out_channels", "nf"))


def _declared(model: nn.Module) -> Iterator[int]:
    head = _ask(model, "get_output_embeddings")
    for module in head if isinstance(head, nn.ModuleList) else [head]:
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            yield id(weight)


def _token_rows(model: nn.Module) -> int | None:
    """Rows of the token table: what the model names as such, else the first table in order of registration."""
    tables = [_ask(model, "get_input_embeddings"), *model.modules()]
    return next((table.num_embeddings for table in tables if isinstance(table, nn.Embedding)), None)


def _ask(model: nn.Module, getter: str) -> object:
    method = getattr(model, getter, None)
    try:
        return method() if callable(method) else None
    except NotImplementedError:  # how models without tokens say so
        return None


def _inside_blocks(model: nn.Module) -> set[int]:
    """Modules within a repeated block: a composite in a ModuleList, or one of several alike in another container."""
    inside: set[int] = set()
    for module in model.modules():
        blocks = [module] if isinstance(module, _BLOCKS) else []
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            composites = [child for child in map(unwrap, module.children()) if _is_composite(child)]
            patterns = [_pattern(child) for child in composites]
            listed = isinstance(module, nn.ModuleList)
            repeated = [listed or patterns.count(pattern) > 1 for pattern in patterns]
            blocks += [child for child, again in zip(composites, repeated, strict=True) if again]
        inside.update(id(part) for block in blocks for part in block.modules())
    return inside


def _is_composite(module: nn.Module) -> bool:
    return any(name != "parametrizations" for name, _ in module.named_children())


def _pattern(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """What makes two blocks alike: their class, or for a plain container the classes in it."""
    container = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
    return tuple(kinds(part) for part in module.modules()) if container else (kinds(module),)
