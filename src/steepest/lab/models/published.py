"""Published models as shapes: names, shapes and layout of parameters as `transformers` has them.

For plans, on torch's meta device: nothing is computed, so there is no forward pass. The sizes are those of the models'
public configs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from steepest.names import unknown_name


@dataclass(frozen=True)
class Sizes:
    """Numbers of a config.

    Args:
        vocabulary: Rows of the token table.
        width: Of the residual stream.
        layers: Number of blocks.
        inner: Features between the maps of an MLP, or of one expert.
        heads: Of attention, for queries.
        key_value_heads: For keys and values.
        head_size: Of each.
        experts: Of a layer; 0: one MLP instead.
        experts_per_token: How many of them a token goes through.
        positions: Rows of the table of positions; 0: they are rotated.
    """

    vocabulary: int
    width: int
    layers: int
    inner: int
    heads: int
    key_value_heads: int
    head_size: int
    experts: int = 0
    experts_per_token: int = 0
    positions: int = 0


@dataclass(frozen=True)
class Published:
    """A model.

    Args:
        title: What it is called.
        source: Where its config is.
        sizes: Of the config.
        build: The modules of these sizes, on the current device.
    """

    title: str
    source: str
    sizes: Sizes
    build: Callable[[Sizes], nn.Module]

    def on_meta(self) -> nn.Module:
        """The model without numbers."""
        with torch.device("meta"):
            return self.build(self.sizes)


def published(name: str) -> Published:
    """A model by its name.

    Args:
        name: A key of `PUBLISHED`.

    Raises:
        ValueError: If there is none of this name.
    """
    if name not in PUBLISHED:
        raise ValueError(unknown_name("model", name, PUBLISHED))
    return PUBLISHED[name]


class Conv1D(nn.Module):
    """GPT-2's linear map, whose weight is stored (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf, device="meta"))
        self.bias = nn.Parameter(torch.empty(nf, device="meta"))


def gpt2(sizes: Sizes) -> nn.Module:
    """Learned positions, fused query, key and value maps, biases everywhere, and a head tied to the token table."""
    width, linear = sizes.width, Conv1D
    blocks = [
        _named(
            ln_1=nn.LayerNorm(width),
            attn=_named(c_attn=linear(3 * width, width), c_proj=linear(width, width)),
            ln_2=nn.LayerNorm(width),
            mlp=_named(c_fc=linear(sizes.inner, width), c_proj=linear(width, sizes.inner)),
        )
        for _ in range(sizes.layers)
    ]
    table = nn.Embedding(sizes.vocabulary, width)
    head = nn.Linear(width, sizes.vocabulary, bias=False)
    head.weight = table.weight
    body = _named(
        wte=table, wpe=nn.Embedding(sizes.positions, width), h=nn.ModuleList(blocks), ln_f=nn.LayerNorm(width)
    )
    return _named(transformer=body, lm_head=head)


def decoder(sizes: Sizes, *, norms_of_heads: bool) -> nn.Module:
    """Llama, and what has its structure: grouped key and value heads, gated MLPs or experts, no biases, untied head.

    Args:
        sizes: Of the config.
        norms_of_heads: Whether queries and keys are normalised.
    """
    width, heads, pairs = sizes.width, sizes.heads * sizes.head_size, sizes.key_value_heads * sizes.head_size
    linear = partial(nn.Linear, bias=False)

    def attention() -> nn.Module:
        norms = {f"{name}_norm": nn.RMSNorm(sizes.head_size) for name in ("q", "k") if norms_of_heads}
        maps = {"q_proj": linear(width, heads), "k_proj": linear(width, pairs), "v_proj": linear(width, pairs)}
        return _named(**maps, o_proj=linear(heads, width), **norms)

    def mlp() -> nn.Module:
        if sizes.experts:
            return _named(experts=Experts(sizes), gate=TopKRouter(sizes))
        maps = {"gate_proj": linear(width, sizes.inner), "up_proj": linear(width, sizes.inner)}
        return _named(**maps, down_proj=linear(sizes.inner, width))

    blocks = [
        _named(
            self_attn=attention(),
            mlp=mlp(),
            input_layernorm=nn.RMSNorm(width),
            post_attention_layernorm=nn.RMSNorm(width),
        )
        for _ in range(sizes.layers)
    ]
    table = nn.Embedding(sizes.vocabulary, width)
    body = _named(embed_tokens=table, layers=nn.ModuleList(blocks), norm=nn.RMSNorm(width))
    return _named(model=body, lm_head=linear(width, sizes.vocabulary))


class Experts(nn.Module):
    """Gated MLPs in two stacks (experts, out, in), gate rows before up rows."""

    is_transposed, is_concatenated = False, True

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(sizes.experts, 2 * sizes.inner, sizes.width, device="meta"))
        self.down_proj = nn.Parameter(torch.empty(sizes.experts, sizes.width, sizes.inner, device="meta"))


class TopKRouter(nn.Module):
    """One row per expert."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sizes.experts, sizes.width, device="meta"))


class Named(nn.Module):
    """Modules by name, in order; what a model is called does not matter to what its parameters are."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def _named(**parts: nn.Module) -> nn.Module:
    return Named(parts)


_llama = partial(decoder, norms_of_heads=False)
_qwen = partial(decoder, norms_of_heads=True)
_HUB = "https://huggingface.co"

PUBLISHED: Mapping[str, Published] = {
    "gpt2": Published(
        "GPT-2 124M",
        f"{_HUB}/openai-community/gpt2",
        Sizes(50_257, 768, 12, inner=3_072, heads=12, key_value_heads=12, head_size=64, positions=1_024),
        gpt2,
    ),
    "llama-8b": Published(
        "Llama 3.1 8B",
        f"{_HUB}/meta-llama/Llama-3.1-8B",
        Sizes(128_256, 4_096, 32, inner=14_336, heads=32, key_value_heads=8, head_size=128),
        _llama,
    ),
    "llama-70b": Published(
        "Llama 3.1 70B",
        f"{_HUB}/meta-llama/Llama-3.1-70B",
        Sizes(128_256, 8_192, 80, inner=28_672, heads=64, key_value_heads=8, head_size=128),
        _llama,
    ),
    "qwen3-moe": Published(
        "Qwen3 30B-A3B",
        f"{_HUB}/Qwen/Qwen3-30B-A3B",
        Sizes(151_936, 2_048, 48, 768, 32, 4, head_size=128, experts=128, experts_per_token=8),
        _qwen,
    ),
    "qwen3-moe-235b": Published(
        "Qwen3 235B-A22B",
        f"{_HUB}/Qwen/Qwen3-235B-A22B",
        Sizes(151_936, 4_096, 94, 1_536, 64, 4, head_size=128, experts=128, experts_per_token=8),
        _qwen,
    ),
}
