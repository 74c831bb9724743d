"""Layouts that shapes do not show: fused projections and stacked experts of published models.

A fused weight is split only where its order of rows is known, from the module's own declaration or from the source
of its class. Elsewhere it stays one matrix, which is a valid choice, and the reason says so.
"""

from collections.abc import Set
from typing import Any, cast

from torch import Tensor, nn

from steepest.anatomy.sites import Site, kinds
from steepest.anatomy.views import CONV1D, LINEAR, View

# All class names here are those of transformers 5.23 (the layouts were read in its source).
# Attention whose fused rows are (part, head, head_dim): all of q, then all of k, then all of v.
_PARTS_FIRST = frozenset({
    "Blip2Attention", "BlipAttention", "CohereCompassVisionAttention", "DbrxAttention", "Dots3NoteVisionAttention",
    "DeepseekOcr2SamVisionAttention", "Ernie4_5_VLMoeVisionAttention", "Exaone4_5_VisionAttention",
    "Florence2VisionWindowAttention", "Glm4vMoeVisionAttention", "Glm4vVisionAttention", "Glm5NextVisionAttention",
    "GlmImageVisionAttention", "GlmOcrVisionAttention", "GotOcr2VisionAttention", "HieraMaskUnitAttention",
    "InstructBlipAttention", "InstructBlipVideoAttention", "MgpstrAttention", "ModernBertAttention", "MptAttention",
    "PPFormulaNetVisionAttention", "Phi3Attention", "Phi4MultimodalAttention",
    "Qwen2_5_VLVisionAttention", "Qwen3OmniMoeVisionAttention", "Qwen3VLMoeVisionAttention", "Qwen3VLVisionAttention",
    "Qwen3_5MoeVisionAttention", "Qwen3_5VisionAttention", "Qwen4ExpVisionAttention", "Sam2MultiScaleAttention",
    "SamHQVisionAttention", "SamVisionAttention", "SegGptAttention", "SLANeXtVisionAttention",
    "TimesformerSelfAttention", "UnlimitedOcrSamVisionAttention", "VisionAttention", "VitDetAttention",
})  # fmt: skip
# The same for rows (head, part, head_dim): q, k and v of the first head, then of the second, ...
_HEADS_FIRST = frozenset({
    "BloomAttention", "GPTNeoXAttention", "GPTNeoXJapaneseAttention", "MiniMaxLightningAttention", "PersimmonAttention",
})  # fmt: skip
# Mixers of state spaces, whose in_proj makes a gate, the inputs, B, C and one time step for each head, in that order.
_STATE_SPACES = frozenset({
    "BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer", "Mamba2Mixer", "NemotronHMamba2Mixer",
    "Zamba2MambaMixer",
})  # fmt: skip
# Gated delta rules: all of q, then k, then v; or rows (key head, part), the parts being q, k, v and a gate, or b and a.
_DELTA_RULES = frozenset({"Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet", "Qwen4ExpTextGatedDeltaNet"})
_DELTA_RULES_BY_HEAD = frozenset({"Qwen3NextGatedDeltaNet"})
# Attention whose q_proj has rows (head, part, head_dim): the query of a head, then its gate.
_GATED_QUERIES = frozenset({
    "Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention", "Qwen4ExpTextAttention",
})  # fmt: skip
_QKV = ("qkv", "qkv_proj", "Wqkv", "query_key_value", "in_proj_qkv", "c_attn")
_GATE_UP = ("gate_up_proj",)
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEY_VALUE_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads")

# Stacks of matrices that neither declare their layout nor show it in their shapes: all are (experts, out, in).
_STACKS = frozenset({
    "InklingSharedExperts", "JetMoeParallelExperts", "KyutaiSpeechToTextFlexibleLinear", "MoshiFlexibleLinear",
})  # fmt: skip
# Experts without a declaration (in this or an earlier release): gate rows before up rows, or in alternation.
_GATE_THEN_UP = frozenset({
    "Llama4TextExperts", "LongcatFlashExperts", "Qwen3VLMoeTextExperts", "Step3p7Experts",
})  # fmt: skip
_GATE_UP_ALTERNATE = frozenset({"GptOssExperts"})


def fused_linear(site: Site) -> tuple[View, str]:
    """View of a linear weight, taking apart what is fused.

    Args:
        site: Weight (out, in) of an `nn.Linear`, or (in, out) of a `Conv1D`.

    Returns:
        The view, and what to add to the reason: empty if nothing is fused.
    """
    if "Conv1D" in kinds(site.module):
        fan_in, fan_out = site.shape
        parts = fan_out // fan_in
        if site.attribute == "c_attn" and fan_out == parts * fan_in and parts in (2, 3):
            fused = "q, k, v" if parts == 3 else "k, v"
            return View(transposed=True, split=(fan_in,) * parts), f", {fused} fused"
        return CONV1D, ""
    fan_out = site.shape[0]
    if site.attribute in _GATE_UP:  # every class of transformers puts gate before up; others may not
        if fan_out % 2 or not any(_is_of_transformers(kind) for kind in type(site.owner).__mro__):
            return LINEAR, ", fused gate, up of unknown order kept whole"
        return View(split=(fan_out // 2,) * 2), ", gate, up fused"
    if (found := _recurrent(site) or _gated_query(site)) is not None:
        view, parts = found
        return (view, f", {parts} fused") if sum(view.split) == fan_out else (LINEAR, f", fused {parts} kept whole")
    if site.attribute in _QKV:
        view = _fused_qkv(site)
        return (view, ", q, k, v fused") if view else (LINEAR, ", fused q, k, v of unknown order kept whole")
    return LINEAR, ""


def _recurrent(site: Site) -> tuple[View, str] | None:
    """Parts of what a state space or a gated delta rule reads, by the sizes that the module states."""
    owner: Any = site.owner
    if _is_one_of(_STATE_SPACES, owner) and site.attribute == "in_proj":
        inner, state, heads = owner.intermediate_size, owner.n_groups * owner.ssm_state_size, owner.num_heads
        return View(split=(inner, inner, state, state, heads)), "gate, x, B, C, dt"
    if _is_one_of(_DELTA_RULES, owner) and site.attribute == "in_proj_qkv":
        return View(split=(owner.key_dim, owner.key_dim, owner.value_dim)), "q, k, v"
    if _is_one_of(_DELTA_RULES_BY_HEAD, owner) and site.attribute == "in_proj_qkvz":
        split = (owner.key_dim, owner.key_dim, owner.value_dim, owner.value_dim)
        return View(split=split, interleave=owner.num_k_heads), "q, k, v, gate"
    if _is_one_of(_DELTA_RULES_BY_HEAD, owner) and site.attribute == "in_proj_ba":
        return View(split=(owner.num_v_heads,) * 2, interleave=owner.num_k_heads), "b, a"
    return None


def _gated_query(site: Site) -> tuple[View, str] | None:
    if not _is_one_of(_GATED_QUERIES, site.owner) or site.attribute != "q_proj":
        return None
    half = site.shape[0] // 2
    return View(split=(half, half), interleave=half // cast(Any, site.owner).head_dim), "q, gate"


def _fused_qkv(site: Site) -> View | None:
    heads, key_value_heads = head_counts(site)
    slots = heads + 2 * key_value_heads
    if not heads or site.shape[0] % slots:
        return None
    dim = site.shape[0] // slots
    split = (heads * dim, key_value_heads * dim, key_value_heads * dim)
    if _is_one_of(_PARTS_FIRST, site.owner):
        return View(split=split)
    if _is_one_of(_HEADS_FIRST, site.owner) and heads == key_value_heads:
        return View(split=split, interleave=heads)
    return None


def head_counts(site: Site) -> tuple[int, int]:
    """Query heads and key-value heads as the owner or its config states them; zeros if neither does.

    Args:
        site: A weight of a projection in an attention module.
    """
    sources = (site.owner, getattr(site.owner, "config", None))

    def stated(names: tuple[str, ...], default: int) -> int:
        values = (getattr(source, name, None) for source in sources for name in names)
        return next((value for value in values if isinstance(value, int)), default)

    heads = stated(_HEAD_COUNTS, 0)
    return heads, stated(_KEY_VALUE_HEAD_COUNTS, heads)


def expert_stack(site: Site) -> tuple[View, str] | None:
    """View of a weight that holds many experts.

    Args:
        site: A parameter directly on a module of experts.

    Returns:
        The view and a reason, or None if this is no stack of matrices that we know.
    """
    if _is_one_of({"DbrxExpertGLU"}, site.module):
        count = int(site.module.moe_num_experts)  # pyright: ignore[reportArgumentType] - an int attribute of a module
        down = site.leaf == "w2"  # each expert multiplies by w1.T, v1.T and w2
        view = View(transposed=True, heads=count, heads_dim="in") if down else View(heads=count)
        return view, f"{count} stacked experts"
    if len(site.shape) != 3:
        return None
    if _is_one_of(_STACKS, site.module):
        return View(experts=True), f"stack of {site.shape[0]} matrices (out, in)"
    transposed = _stored_in_out(site)
    if transposed is None:
        return None
    view = View(experts=True, transposed=transposed)
    reason = f"{site.shape[0]} stacked experts, stored {'(in, out)' if transposed else '(out, in)'}"
    fan_out = site.shape[2] if transposed else site.shape[1]
    if site.leaf not in _GATE_UP or fan_out % 2:
        return view, reason
    gate_first = _gate_first(site)
    if gate_first is None:
        return view, f"{reason}, fused gate, up of unknown order kept whole"
    half = fan_out // 2
    split = View(experts=True, transposed=transposed, split=(half, half), interleave=1 if gate_first else half)
    return split, f"{reason}, gate, up fused" + ("" if gate_first else " in alternating rows")


def _stored_in_out(site: Site) -> bool | None:
    """Whether experts are stored (experts, in, out), as declared by the module or proven by the shapes of the pair.

    gate_up (E, a, b) feeds down (E, c, d): a = 2 d and b = c if stored (out, in), b = 2 c and a = d if stored
    (in, out). Both together would need a = 2 a, so the shapes decide even where a weight is square.
    """
    if site.leaf not in ("gate_up_proj", "up_proj", "gate_proj", "down_proj"):
        return None
    declared = getattr(site.module, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    pair = [getattr(site.module, leaf, None) for leaf in ("gate_up_proj", "down_proj")]
    sizes = [size for weight in pair if isinstance(weight, Tensor) and weight.ndim == 3 for size in weight.shape[1:]]
    if len(sizes) != 4:
        return None
    a, b, c, d = sizes
    if a == 2 * d and b == c:
        return False
    return True if b == 2 * c and a == d else None


def _gate_first(site: Site) -> bool | None:
    declared = getattr(site.module, "is_concatenated", None)
    if isinstance(declared, bool):
        return declared
    if _is_one_of(_GATE_THEN_UP, site.module):
        return True
    return False if _is_one_of(_GATE_UP_ALTERNATE, site.module) else None


def _is_one_of(names: Set[str], module: nn.Module | None) -> bool:
    """Whether the class of a module, or a base of it, is one of those in transformers; a namesake elsewhere is not."""
    return any(kind.__name__ in names and _is_of_transformers(kind) for kind in type(module).__mro__)


def _is_of_transformers(kind: type) -> bool:
    return kind.__module__.startswith("transformers.")
