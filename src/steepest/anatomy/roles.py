"""What a parameter is, told from the type of its module: one rule per kind of module, the first that knows it decides.

A name alone never makes a matrix. Names decide only between kinds of parameters that are none: a bias, a position
table, a router.

Which matrices are optimised as such does not depend on their size. Only two shapes are excluded: a matrix with
m = 1 or n = 1, whose polar factor is the normalised gradient, and depthwise filters, each of which sees one channel.
There is no limit on the smallest side or the aspect ratio: low-rank adapters and grouped key projections are narrow and
in practice go to Muon all the same, and with a limit a width sweep would change the optimizer halfway.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from steepest.anatomy.layouts import expert_stack, fused_linear
from steepest.anatomy.plan import UNKNOWN, Role
from steepest.anatomy.sites import Site, kinds
from steepest.anatomy.views import CONV1D, LINEAR, View, conv


@dataclass(frozen=True)
class Verdict:
    """A role with the view that goes with it, and the reason."""

    role: Role
    view: View | None
    reason: str


_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)
_NORM_KIND = re.compile(r"Norm(\dd|Gated|Act|Act2d)?$")
_ROUTER_KIND = re.compile(r"Router(MLP)?$|(MoE|Moe|TopK|Topk|Top\d)\w*Gat(e|ing)$")
_TABLE_KIND = re.compile(r"(Embeddings?|PositionalEncoding)$")
_TABLE_LEAF = re.compile(
    r"(^|_)(rel_)?pos(_|$)|(pos|level|seg|type)_?emb|position(al)?_?(emb|enc)|_(embeddings?|table)$"
    r"|^(\w+_)?tokens?$|^(query|queries|latents?)$"
)
_STATE_DECAY = ("A_log", "A_logs")
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def classify(site: Site) -> Verdict:
    """The role of a parameter at one site.

    Args:
        site: Where the parameter sits.

    Returns:
        The verdict of the first rule that knows it. If none does: "vector", with a reason that starts with "unknown:".

    Raises:
        ValueError: If the weight of a linear layer is not two-dimensional.
    """
    for rule in _RULES:
        verdict = rule(site)
        if verdict:
            return verdict
    return Verdict(
        "vector", None, f"{UNKNOWN} {len(site.shape)}-D parameter of {_kind(site)}, whose layout is not known"
    )


def is_rank_one(site: Site, view: View) -> bool:
    """Whether every matrix of a parameter has a single row or column, so that there is no spectrum to shape.

    Args:
        site: Where the parameter sits.
        view: Its view.

    Returns:
        True if so.
    """
    return all(min(m, n) == 1 for _, m, n in view.blocks(site.shape))


def _no_numbers(site: Site) -> Verdict | None:
    if site.numel == 0:
        return Verdict("vector", None, "empty")
    if not site.parameter.is_floating_point():
        return Verdict("vector", None, f"not real floating point: {site.parameter.dtype}")
    return None


def _norm(site: Site) -> Verdict | None:
    if isinstance(site.module, _NORMS) or any(_NORM_KIND.search(kind) for kind in kinds(site.module)):
        return Verdict("vector", None, f"{'bias' if 'bias' in site.leaf else 'gain'} of {_kind(site)}")
    return None


def _bias(site: Site) -> Verdict | None:
    if re.search(r"(^|_)bias(es)?(_|$)", site.leaf):
        return Verdict("vector", None, f"bias of {_kind(site)}")
    return None


def _router(site: Site) -> Verdict | None:
    """Routers are small and sparse in gradients: one row per expert, moved only by the tokens it competes for."""
    if site.long_dims < 2:
        return None
    of_class = any(_ROUTER_KIND.search(kind) for kind in (*kinds(site.module), *kinds(site.owner)))
    by_place = site.attribute in ("gate", "router") and hasattr(site.owner, "experts")
    if of_class or by_place:
        return Verdict("vector", None, f"router weight, one row per expert ({_kind(site)})")
    return None


def _embedding(site: Site) -> Verdict | None:
    shape = tuple(getattr(site.module, size, None) for size in ("num_embeddings", "embedding_dim"))
    if site.leaf == "weight" and (isinstance(site.module, nn.Embedding | nn.EmbeddingBag) or site.shape == shape):
        return Verdict("embedding", CONV1D, f"lookup table of {_kind(site)}")
    return None


def _linear(site: Site) -> Verdict | None:
    if site.leaf != "weight":
        return None
    names = kinds(site.module)
    is_conv1d = "Conv1D" in names and hasattr(site.module, "nf")
    if isinstance(site.module, nn.Linear) or is_conv1d:
        if len(site.shape) != 2:
            raise ValueError(
                f"{site.name} is the weight of a {_kind(site)} but has shape {site.shape}. Route the model before its "
                "parameters are flattened or packed, or shard it with fully_shard (FSDP2), which keeps shapes."
            )
        view, fused = fused_linear(site)
        stored = ", stored (in, out)" if is_conv1d else ""
        return Verdict("matrix", view, f"weight of {_kind(site)}{stored}{fused}")
    return None


def _linear_lookalike(site: Site) -> Verdict | None:
    """Layers of other libraries that state their sizes as `nn.Linear` does."""
    fans = tuple(getattr(site.module, size, None) for size in ("out_features", "in_features"))
    if site.leaf == "weight" and len(site.shape) == 2 and site.shape in (fans, fans[::-1]):
        view = LINEAR if site.shape == fans else CONV1D
        return Verdict("matrix", view, f"weight of {_kind(site)}, linear by its in_features and out_features")
    return None


def _conv(site: Site) -> Verdict | None:
    if not isinstance(site.module, _ConvNd) or site.leaf != "weight":
        return None
    groups = site.module.groups
    if groups > 1 and groups == site.module.in_channels:
        return Verdict("vector", None, f"depthwise filters of {_kind(site)}: each sees one channel")
    view = conv(groups=groups, transposed=isinstance(site.module, _ConvTransposeNd))
    return Verdict("matrix", view, f"kernel of {_kind(site)}" + (f", {groups} groups" if groups > 1 else ""))


def _recurrent(site: Site) -> Verdict | None:
    if not isinstance(site.module, nn.RNNBase | nn.RNNCellBase) or not site.leaf.startswith("weight_"):
        return None
    name = next((name for name in _GATES for kind in kinds(site.module) if kind in (name, f"{name}Cell")), "RNN")
    gates = 1 if site.leaf.startswith("weight_hr") else _GATES[name]
    if gates == 1:
        return Verdict("matrix", LINEAR, f"weight of {_kind(site)}")
    view = View(split=(site.shape[0] // gates,) * gates)
    return Verdict("matrix", view, f"weight of {_kind(site)}, {gates} gates fused")


def _attention(site: Site) -> Verdict | None:
    if not isinstance(site.module, nn.MultiheadAttention):
        return None
    if site.leaf == "in_proj_weight":
        view = View(split=(site.module.embed_dim,) * 3)
        return Verdict("matrix", view, f"weight of {_kind(site)}, q, k, v fused")
    is_weight = site.leaf in ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return Verdict("matrix", LINEAR, f"weight of {_kind(site)}") if is_weight else None


def _bilinear(site: Site) -> Verdict | None:
    """y_k = x1' W_k x2 is linear in the outer product of x1 and x2, so the two inputs are one fan-in."""
    if isinstance(site.module, nn.Bilinear) and site.leaf == "weight":
        return Verdict("matrix", LINEAR, f"weight of {_kind(site)}, linear in the product of its two inputs")
    return None


def _experts(site: Site) -> Verdict | None:
    found = expert_stack(site)
    return Verdict("matrix", *found) if found else None


def _one_long_dimension(site: Site) -> Verdict | None:
    if len(site.shape) == 0:
        return Verdict("vector", None, f"scalar of {_kind(site)}")
    if site.long_dims <= 1:
        unit = " but for unit dimensions" if len(site.shape) > 1 else ""
        return Verdict("vector", None, f"1-D{unit}, in {_kind(site)}")
    return None


def _state_decay(site: Site) -> Verdict | None:
    if site.leaf in _STATE_DECAY:
        return Verdict("vector", None, f"decay rates of {_kind(site)}: multiplied elementwise")
    return None


def _table(site: Site) -> Verdict | None:
    """A parameter that a custom module adds to activations, or picks rows from: position, class and query tables."""
    if any(_TABLE_KIND.search(kind) for kind in kinds(site.module)) or _TABLE_LEAF.search(site.leaf):
        return Verdict("embedding", None, f"table {site.leaf} of {_kind(site)}")
    return None


def _kind(site: Site) -> str:
    return next(iter(kinds(site.module)), "Module")


_RULES: tuple[Callable[[Site], Verdict | None], ...] = (
    _no_numbers,
    _bias,
    _router,
    _embedding,
    _linear,
    _conv,
    _recurrent,
    _attention,
    _bilinear,
    _experts,
    _linear_lookalike,
    _norm,
    _one_long_dimension,
    _state_decay,
    _table,
)
