"""A decoder-only transformer: pre-norm blocks, rotary attention with normalised queries and keys, ReLU squared.

By default the structure is that of the public optimizer benchmark "modded-nanogpt, track 3", at a size for one CPU
core: embedding -> norm -> blocks of [x + attention(norm(x)), x + mlp(norm(x))] -> norm -> untied head. Projections back
into the residual stream and the head start at zero, so the first loss is exactly ln(vocabulary). Options of the config
make other published models of it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["rms", "rms-plain", "layer"]
Activation = Literal["relu2", "gelu", "gelu-tanh"]
Positions = Literal["half-rotary", "rotary", "learned"]
Initial = Literal["scaled", "torch", "gpt2"]


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and parts of a `GPT`.

    Args:
        vocabulary: Number of tokens.
        layers: Number of blocks.
        width: Size of the residual stream; a multiple of `head_size`.
        head_size: Size of one attention head; a multiple of 4.
        softcap: Logits become softcap * z / sqrt(z² + softcap²), so |logit| < softcap; None leaves them as they are.
        tied: Whether the head is the table of the embedding, without a bias.
        biases: Whether linear maps, an untied head included, have biases.
        norm: RMSNorm with gains, RMSNorm without any, or LayerNorm with gains and biases.
        embedding_norm: Whether the embedding is normalised before the first block.
        query_norm: Whether queries and keys have unit RMS before they are rotated.
        activation: Of the MLP: ReLU squared, GELU, or GELU in its form with tanh.
        positions: Half of the pairs of each head rotated, all of them (base 10,000), or a table that is added.
        context: Rows of that table.
        attention_gain: What the output of attention is multiplied by before it is added.
        attention_scale: Of the products of queries and keys; None: head_size^-1/2.
        value_tables: Number of tables of further values by token: those of the first and of the last blocks, a learned
            mixture, which starts with one half of each, with the block's own.
        without_attention: Blocks, from 0, that have an MLP only.
        initial: How weights start; see `initialize_`.

    Raises:
        ValueError: If the heads do not fill the width, a head cannot be rotated, a table of positions has no rows, or
            there are more tables of values than halves of the blocks.
    """

    vocabulary: int
    layers: int
    width: int
    head_size: int = 32
    softcap: float | None = None
    tied: bool = False
    biases: bool = True
    norm: Norm = "rms"
    embedding_norm: bool = True
    query_norm: bool = True
    activation: Activation = "relu2"
    positions: Positions = "half-rotary"
    context: int = 0
    attention_gain: float = 1.0
    attention_scale: float | None = None
    value_tables: int = 0
    without_attention: tuple[int, ...] = ()
    initial: Initial = "scaled"

    def __post_init__(self) -> None:
        if self.head_size % 4:
            raise ValueError(f"head_size must be a multiple of 4 (half of its pairs rotate), got {self.head_size}.")
        if self.width % self.head_size:
            raise ValueError(f"width must be a multiple of head_size {self.head_size}, got {self.width}.")
        if (self.positions == "learned") != (self.context > 0):
            raise ValueError(f"context={self.context} goes with positions='learned' only, got {self.positions!r}.")
        if not 0 <= 2 * self.value_tables <= self.layers:
            raise ValueError(f"value_tables must be at most half of the {self.layers} layers, got {self.value_tables}.")


class GPT(nn.Module):
    """Tokens (batch, time) to logits (batch, time, vocabulary); a token sees itself and the past only."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.softcap = config.softcap
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.context, config.width)
        if config.embedding_norm:
            self.embedding_norm = _norm(config)
        if config.value_tables:
            tables = [nn.Embedding(config.vocabulary, config.width) for _ in range(config.value_tables)]
            self.value_tables = nn.ModuleList(tables)
        self.blocks = nn.ModuleList([Block(config, number) for number in range(config.layers)])
        self.norm = _norm(config)
        if not config.tied:
            self.head = nn.Linear(config.width, config.vocabulary, bias=config.biases)
        initialize_(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: (batch, time), int64.

        Returns:
            (batch, time, vocabulary), natural-log units.
        """
        config = self.config
        x = self.embedding(tokens)
        if config.positions == "learned":
            x = x + self.positions(torch.arange(tokens.size(1), device=tokens.device))
        if config.embedding_norm:
            x = self.embedding_norm(x)
        values = [table(tokens) for table in self.value_tables] if config.value_tables else []
        for number, block in enumerate(self.blocks):
            x = block(x) if (place := _table_of(number, config)) is None else block(x, values[place])
        x = self.norm(x)
        logits = F.linear(x, self.embedding.weight) if config.tied else self.head(x)
        if self.softcap is not None:
            logits = self.softcap * logits * torch.rsqrt(logits.square() + self.softcap**2)
        return logits


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): (batch, time, width) to the same shape.

    Args:
        config: Of the model.
        number: Which block, from 0.
    """

    def __init__(self, config: GPTConfig, number: int) -> None:
        super().__init__()
        self.gain = config.attention_gain
        self.attends = number not in config.without_attention
        if self.attends:
            self.attention_norm = _norm(config)
            self.attention = Attention(config, mixes=_table_of(number, config) is not None)
        self.mlp_norm = _norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, values: Tensor | None = None) -> Tensor:
        """Shape in, shape out; `values` of the tokens likewise, where there is a table."""
        if self.attends:
            given = () if values is None else (values,)  # tensor parallelism prepares x alone
            moved = self.attention(self.attention_norm(x), *given)
            x = x + (moved if self.gain == 1 else self.gain * moved)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Causal attention with separate query, key and value maps; queries and keys have unit RMS, then are rotated.

    Args:
        config: Of the model.
        mixes: Whether values by token are mixed in.
    """

    def __init__(self, config: GPTConfig, *, mixes: bool) -> None:
        super().__init__()
        width, self.head_size = config.width, config.head_size
        self.query_norm, self.positions, self.scale = config.query_norm, config.positions, config.attention_scale
        self.query = nn.Linear(width, width, bias=config.biases)
        self.key = nn.Linear(width, width, bias=config.biases)
        self.value = nn.Linear(width, width, bias=config.biases)
        self.proj = nn.Linear(width, width, bias=config.biases)
        if mixes:
            self.mixture = nn.Parameter(torch.full((2,), 0.5, device=self.query.weight.device))

    def forward(self, x: Tensor, values: Tensor | None = None) -> Tensor:
        """Shape in, shape out."""
        heads = (-1, self.head_size)  # under tensor parallelism, those of this rank
        q, k, v = (f(x).unflatten(-1, heads).transpose(1, 2) for f in (self.query, self.key, self.value))
        if values is not None:
            v = self.mixture[0] * v + self.mixture[1] * values.unflatten(-1, heads).transpose(1, 2)
        if self.query_norm:
            q, k = (F.rms_norm(part, (self.head_size,)) for part in (q, k))
        if self.positions != "learned":
            turned = rotate if self.positions == "half-rotary" else rotate_all
            q, k = turned(q), turned(k)
        y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True, scale=self.scale)
        return self.proj(y.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """proj(relu(up(x))²), or with another activation; four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.up = nn.Linear(config.width, 4 * config.width, bias=config.biases)
        self.proj = nn.Linear(4 * config.width, config.width, bias=config.biases)

    def forward(self, x: Tensor) -> Tensor:
        """Shape in, shape out."""
        x = self.up(x)
        if self.activation == "relu2":
            return self.proj(F.relu(x).square())
        return self.proj(F.gelu(x, approximate="tanh" if self.activation == "gelu-tanh" else "none"))


def _norm(config: GPTConfig) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(config.width)
    if config.norm == "rms-plain":
        return nn.RMSNorm(config.width, eps=1e-6, elementwise_affine=False)
    return nn.RMSNorm(config.width)


def _table_of(number: int, config: GPTConfig) -> int | None:
    """Which table of values a block has: 0, 1, ... from the first block on, and again up to the last."""
    tables, left = config.value_tables, config.layers - config.value_tables
    if number in config.without_attention:
        return None
    return number if number < tables else number - left if number >= left else None


def rotate(x: Tensor, *, base: float = 1024.0) -> Tensor:
    """Turn each pair (x_i, x_{i + d/2}) by time * frequency_i, so that dot products see differences of time only.

    Half of the pairs have frequency zero and carry content without position.

    Args:
        x: (..., time, d), d a multiple of 4.
        base: Frequencies fall geometrically from 1 to 1 / base radians per token.

    Returns:
        Shape and dtype of `x`; computed in float32 or wider.

    Source:
        Su et al., arXiv:2104.09864, eq. 34; the zero half as in modded-nanogpt.
    """
    quarter = x.size(-1) // 4
    exponents = torch.linspace(0, 1, quarter, device=x.device)
    return _turned(x, torch.cat([base**-exponents, torch.zeros(quarter, device=x.device)]))


def rotate_all(x: Tensor, *, base: float = 10_000.0) -> Tensor:
    """Turn each pair (x_i, x_{i + d/2}) by time * base^(-2i / d).

    Args:
        x: (..., time, d), d even.
        base: Of the frequencies.

    Returns:
        Shape and dtype of `x`; computed in float32 or wider.

    Source:
        Su et al., arXiv:2104.09864, eq. 15 and 34.
    """
    size = x.size(-1)
    return _turned(x, base ** (-torch.arange(0, size, 2, device=x.device, dtype=torch.float32) / size))


def _turned(x: Tensor, frequencies: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(x.size(-2), device=x.device, dtype=torch.float32), frequencies)
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1).to(x.dtype)


@torch.no_grad()
def initialize_(model: GPT) -> None:
    """Draw the weights; biases start at 0, but for "torch".

    "scaled": tables N(0, 1), maps N(0, 0.33 / fan_in), and every `proj` and the head 0. "gpt2": all N(0, 0.02²), but
    every `proj` N(0, 0.02² / (2 layers)). "torch": maps as torch draws them, U(-1, 1) / √fan_in, and the tables
    likewise with the width for the fan-in, as of a head that they are tied to.

    Args:
        model: Its parameters are overwritten; draws come from torch's global generator, in module order.

    Source:
        "gpt2": Radford et al., 2019, section 2.3. "torch": the script of record 4 of modded-nanogpt.
    """
    initial, layers = model.config.initial, model.config.layers
    for name, module in model.named_modules():
        back = name.endswith("proj")
        if isinstance(module, nn.Embedding):
            if initial == "torch":
                bound = module.embedding_dim**-0.5
                nn.init.uniform_(module.weight, -bound, bound)
            else:
                nn.init.normal_(module.weight, std=1.0 if initial == "scaled" else 0.02)
        elif isinstance(module, nn.Linear) and initial != "torch":
            if module.bias is not None:  # pyright: ignore[reportUnnecessaryComparison] - torch's type leaves it out
                nn.init.zeros_(module.bias)
            if initial == "gpt2":
                nn.init.normal_(module.weight, std=0.02 / (2 * layers) ** 0.5 if back else 0.02)
            elif name == "head" or back:
                nn.init.zeros_(module.weight)
            else:
                nn.init.normal_(module.weight, std=(0.33 / module.in_features) ** 0.5)
