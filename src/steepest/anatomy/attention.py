"""Where queries and keys of attention come from: which rows of which weights make those of each head."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from steepest.anatomy.layouts import fused_linear, head_counts
from steepest.anatomy.sites import Site, distinct, kinds
from steepest.anatomy.views import LINEAR
from steepest.checks import refusal, shown

PAIRS = (
    *(("q_proj", "k_proj"), ("query", "key"), ("wq", "wk"), ("w_q", "w_k"), ("q", "k"), ("to_q", "to_k")),
    *(("q_lin", "k_lin"), ("query_proj", "key_proj"), ("c_q", "c_k")),
)
# Modules beside the projections that norm queries and keys: their size, then, is not that of the weights.
NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "norm_q", "norm_k", "query_norm", "key_norm", "qk_norm")


@dataclass(frozen=True)
class Rows:
    """Rows of a parameter that make queries, or keys.

    Args:
        parameter: A weight (out, in), a bias (out,), or, if `along` is 1, a weight (in, out).
        index: (heads, head_dim), which of its outputs belong to each head.
        along: Dimension of the outputs.
    """

    parameter: Tensor = field(repr=False)
    index: Tensor
    along: int = 0


@dataclass(frozen=True)
class Attention:
    """One attention layer, as far as its logits go.

    Args:
        name: By which maxima are recorded.
        query: Rows that make queries, of a weight and maybe a bias; alike in heads.
        key: Likewise; as many heads, or fewer that are shared by equally many queries each.
        outputs: The modules whose outputs are queries and keys before any rotation, if there are such.
    """

    name: str
    query: tuple[Rows, ...]
    key: tuple[Rows, ...]
    outputs: tuple[nn.Module, nn.Module] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for own in (self.query, self.key):
            if not own or len({rows.index.shape for rows in own}) > 1:
                raise ValueError(
                    f"Attention {self.name!r}: queries and keys need rows, alike in heads, got {shown(own)}."
                )
        if self.heads % self.key_heads:
            raise ValueError(
                f"Attention {self.name!r}: {self.heads} heads of queries cannot share {self.key_heads} heads of keys "
                "equally. Give heads and key_heads as the module has them."
            )

    @property
    def heads(self) -> int:
        """Heads of queries."""
        return len(self.query[0].index)

    @property
    def key_heads(self) -> int:
        """Heads of keys."""
        return len(self.key[0].index)

    @classmethod
    def of(
        cls, name: str, query: nn.Module, key: nn.Module, *, heads: int, key_heads: int | None = None
    ) -> "Attention":
        """Of two linear layers.

        Args:
            name: By which maxima are recorded.
            query: With a weight (heads · head_dim, in), and maybe a bias.
            key: With a weight (key_heads · head_dim, in), and maybe a bias.
            heads: Of queries.
            key_heads: Of keys; None: as many.

        Raises:
            ValueError: If rows cannot be divided among heads.
            TypeError: If one is no linear layer.
        """
        counts = (heads, heads if key_heads is None else key_heads)
        rows = [_rows(name, layer, count) for layer, count in zip((query, key), counts, strict=True)]
        return cls(name, rows[0], rows[1], outputs=(query, key))


def attentions(model: nn.Module) -> list[Attention]:
    """The attention layers of a model whose queries and keys are known to be products of weights, and nothing else.

    Those are `torch.nn.MultiheadAttention`; modules that state how many heads they have, with two linear layers named
    as in `PAIRS`; and fused weights that the routing takes apart. Layers that norm queries or keys are left out.

    Args:
        model: Any module.
    """
    found: dict[str, Attention] = {}
    by_owner: dict[int, dict[str, Site]] = {}
    for sites in distinct(model):
        for site in sites:
            if site.leaf == "weight" and site.owner is not None and not _norms(site.owner):
                by_owner.setdefault(id(site.owner), {})[site.attribute] = site
            if site.leaf in ("in_proj_weight", "q_proj_weight") and isinstance(site.module, nn.MultiheadAttention):
                name = site.name.rpartition(".")[0] or "attention"
                found[name] = _multihead(name, site.module)
    for layers in by_owner.values():
        for attribute, site in layers.items():
            name = site.name.removesuffix(".weight").removesuffix(attribute).removesuffix(".") or "attention"
            other = next((layers[key] for query, key in PAIRS if query == attribute and key in layers), None)
            own = _separate(name, site, other) if other is not None else _fused(name, site)
            if own is not None:
                found[name] = own
    return list(found.values())


def _norms(owner: nn.Module) -> bool:
    return any(getattr(owner, name, None) is not None for name in NORMS)


def _separate(name: str, query: Site, key: Site) -> Attention | None:
    heads, key_heads = head_counts(query)
    linear = all(type(site.module).__name__ != "Conv1D" and len(site.shape) == 2 for site in (query, key))
    plain = linear and fused_linear(query)[0] == LINEAR  # a gate may stand beside each query
    if not (heads and key_heads and plain) or query.shape[0] % heads or key.shape[0] % key_heads:
        return None
    if heads % key_heads or query.shape[0] // heads != key.shape[0] // key_heads:
        return None
    return Attention.of(name, query.module, key.module, heads=heads, key_heads=key_heads)


def _fused(name: str, site: Site) -> Attention | None:
    """Of a weight that makes queries, keys and values."""
    if len(site.shape) != 2:
        return None
    view, told = fused_linear(site)
    heads, _ = head_counts(site)
    if "q, k, v fused" not in told or len(view.split) != 3 or not heads or view.split[0] % heads:
        return None
    dim = view.split[0] // heads
    if view.split[1] % dim:
        return None
    along = int(view.transposed)
    outputs = torch.arange(site.shape[along], device="cpu")
    parts = view.split_tensor(outputs.unsqueeze(0) if view.transposed else outputs.unsqueeze(1))
    index = [part.reshape(-1, dim) for part in parts[:2]]
    query, key = (_with_bias(site.module, own, along) for own in index)
    return Attention(name, query, key, outputs=(site.module, site.module))


def _multihead(name: str, module: nn.MultiheadAttention) -> Attention:
    own: Any = module
    outputs = torch.arange(2 * own.embed_dim, device="cpu").view(2, own.num_heads, own.head_dim)
    if own.in_proj_weight is not None:
        rows: list[tuple[Rows, ...]] = [(Rows(own.in_proj_weight, index),) for index in outputs]
    else:
        rows = [(Rows(weight, outputs[0]),) for weight in (own.q_proj_weight, own.k_proj_weight)]
    if own.in_proj_bias is not None:
        rows = [(*part, Rows(own.in_proj_bias, index)) for part, index in zip(rows, outputs, strict=True)]
    query, key = rows
    return Attention(name, query, key)


def _rows(name: str, layer: nn.Module, heads: int) -> tuple[Rows, ...]:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or "Conv1D" in kinds(layer):
        raise TypeError(refusal(f"Attention {name!r}", "two linear layers", layer))
    if isinstance(heads, bool) or not isinstance(cast(object, heads), int) or heads < 1 or weight.shape[0] % heads:
        expected = f"a divisor of the {weight.shape[0]} rows of a weight of shape {tuple(weight.shape)}"
        raise ValueError(refusal(f"Attention {name!r}: heads", expected, heads))
    return _with_bias(layer, torch.arange(weight.shape[0], device="cpu").view(heads, -1), 0)


def _with_bias(layer: nn.Module, index: Tensor, along: int) -> tuple[Rows, ...]:
    named = [(getattr(layer, "weight", None), along), (getattr(layer, "bias", None), 0)]
    return tuple(Rows(one, index, where) for one, where in named if isinstance(one, Tensor))


def check_attentions(given: Sequence[object]) -> list[Attention]:
    """Refuse what are no attention layers, or none.

    Args:
        given: Anything.

    Raises:
        ValueError: If there is none, or two have one name.
        TypeError: If one is something else.
    """
    for one in given:
        if not isinstance(one, Attention):
            raise TypeError(refusal("attentions", "a model, or a list of steepest.anatomy.Attention", one))
    found = [one for one in given if isinstance(one, Attention)]
    names = [one.name for one in found]
    if not found:
        raise ValueError(
            "QKClip: there is no attention whose queries and keys are known to be products of weights. Name them: "
            "QKClip([steepest.anatomy.Attention.of('layer 0', layer.q, layer.k, heads=8)])."
        )
    if len(set(names)) < len(names):
        raise ValueError(refusal("QKClip: names of attentions", "distinct", names))
    return found
