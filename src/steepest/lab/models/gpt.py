"""A small decoder-only transformer: pre-norm blocks, rotary attention with normalised queries and keys, ReLU squared.

The structure is that of the public optimizer benchmark "modded-nanogpt, track 3", at a size for one CPU core:
embedding -> norm -> blocks of [x + attention(norm(x)), x + mlp(norm(x))] -> norm -> untied head. Projections back
into the residual stream and the head start at zero, so the first loss is exactly ln(vocabulary).
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a `GPT`.

    Args:
        vocabulary: Number of tokens.
        layers: Number of blocks.
        width: Size of the residual stream; a multiple of `head_size`.
        head_size: Size of one attention head; a multiple of 4.
        softcap: Logits become softcap * z / sqrt(z² + softcap²), so |logit| < softcap; None leaves them as they are.

    Raises:
        ValueError: If the heads do not fill the width, or a head cannot be rotated.
    """

    vocabulary: int
    layers: int
    width: int
    head_size: int = 32
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.head_size % 4:
            raise ValueError(f"head_size must be a multiple of 4 (half of its pairs rotate), got {self.head_size}.")
        if self.width % self.head_size:
            raise ValueError(f"width must be a multiple of head_size {self.head_size}, got {self.width}.")


class GPT(nn.Module):
    """Tokens (batch, time) to logits (batch, time, vocabulary); a token sees itself and the past only."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.softcap = config.softcap
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.embedding_norm = nn.RMSNorm(config.width)
        self.blocks = nn.ModuleList([Block(config.width, config.head_size) for _ in range(config.layers)])
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary)
        initialize_(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: (batch, time), int64.

        Returns:
            (batch, time, vocabulary), natural-log units.
        """
        x = self.embedding_norm(self.embedding(tokens))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if self.softcap is not None:
            logits = self.softcap * logits * torch.rsqrt(logits.square() + self.softcap**2)
        return logits


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): (batch, time, width) to the same shape."""

    def __init__(self, width: int, head_size: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, head_size)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape in, shape out."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Causal attention with separate query, key and value maps; queries and keys have unit RMS, then are rotated."""

    def __init__(self, width: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape in, shape out."""
        heads = (-1, self.head_size)  # under tensor parallelism, those of this rank
        q, k, v = (f(x).unflatten(-1, heads).transpose(1, 2) for f in (self.query, self.key, self.value))
        q, k = (rotate(F.rms_norm(part, (self.head_size,))) for part in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """proj(relu(up(x))²), four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape in, shape out."""
        return self.proj(F.relu(self.up(x)).square())


def rotate(x: Tensor, *, base: float = 1024.0) -> Tensor:
    """Turn each pair (x_i, x_{i + d/2}) by time * frequency_i, so that dot products see differences of time only.

    Half of the pairs have frequency zero and carry content without position.

    Args:
        x: (..., time, d), d a multiple of 4.
        base: Frequencies fall geometrically from 1 to 1 / base radians per token.

    Returns:
        Shape and dtype of `x`.

    Source:
        Su et al., arXiv:2104.09864, eq. 34; the zero half as in modded-nanogpt.
    """
    time, size = x.shape[-2:]
    exponents = torch.linspace(0, 1, size // 4, device=x.device)
    frequencies = torch.cat([base**-exponents, torch.zeros(size // 4, device=x.device)])
    angles = torch.outer(torch.arange(time, device=x.device, dtype=torch.float32), frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


@torch.no_grad()
def initialize_(model: GPT) -> None:
    """Draw the weights: embedding N(0, 1), maps N(0, 0.33 / fan_in), biases 0, and every `proj` and the head 0.

    Args:
        model: Its parameters are overwritten; draws come from torch's global generator, in module order.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(cast("Tensor", module.bias))
            if name == "head" or name.endswith("proj"):
                nn.init.zeros_(module.weight)
            else:
                nn.init.normal_(module.weight, std=(0.33 / module.in_features) ** 0.5)
