"""Which rows of which weights make the queries and keys of each head."""

import pytest
import torch
from torch import nn

from steepest.anatomy import Attention, Rows, attentions


class Separate(nn.Module):
    def __init__(self, heads=4, key_heads=2, dim=3, width=5, norm=False):
        super().__init__()
        self.num_heads, self.num_key_value_heads = heads, key_heads
        self.q_proj, self.k_proj = nn.Linear(width, heads * dim), nn.Linear(width, key_heads * dim, bias=False)
        self.v_proj = nn.Linear(width, key_heads * dim)
        if norm:
            self.q_norm = nn.LayerNorm(dim)


class Phi3Attention(nn.Module):  # rows: all of q, then k, then v
    __module__ = "transformers.models.phi3"

    def __init__(self):
        super().__init__()
        self.num_heads, self.num_key_value_heads = 4, 2
        self.qkv_proj = nn.Linear(5, 8 * 3)


class GPTNeoXAttention(nn.Module):  # rows: q, k and v of the first head, then of the second
    __module__ = "transformers.models.gpt_neox"

    def __init__(self):
        super().__init__()
        self.num_attention_heads = 2
        self.query_key_value = nn.Linear(6, 18)


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attn, self.mlp = attention, nn.Linear(5, 5)


def products(attention, x):
    """Queries and keys (heads, tokens, head_dim), from rows alone."""
    found = []
    for weight, *bias in (attention.query, attention.key):
        out = x @ weight.parameter[weight.index.flatten()].T
        if bias:
            out = out + bias[0].parameter[bias[0].index.flatten()]
        found.append(out.view(len(x), *weight.index.shape).transpose(0, 1))
    return found


def test_separate_projections_are_found_with_their_heads_and_biases():
    model = nn.Sequential(Block(Separate()), Block(Separate(norm=True)))
    (found,) = attentions(model)  # queries that are normed need no clip
    own = model[0].attn
    assert (found.name, found.heads, found.key_heads) == ("0.attn", 4, 2)
    assert [rows.parameter for rows in (*found.query, *found.key)] == [
        own.q_proj.weight,
        own.q_proj.bias,
        own.k_proj.weight,
    ]
    x = torch.randn(7, 5)
    query, key = products(found, x)
    assert torch.allclose(query, own.q_proj(x).view(7, 4, 3).transpose(0, 1))
    assert torch.allclose(key, own.k_proj(x).view(7, 2, 3).transpose(0, 1))


def test_rows_of_fused_weights_are_those_of_the_module():
    x = torch.randn(7, 5)
    fused = Phi3Attention()
    (found,) = attentions(nn.Sequential(Block(fused)))
    out = fused.qkv_proj(x)
    query, key = products(found, x)
    assert torch.allclose(query, out[:, :12].view(7, 4, 3).transpose(0, 1))
    assert torch.allclose(key, out[:, 12:18].view(7, 2, 3).transpose(0, 1))
    heads_first, x = GPTNeoXAttention(), torch.randn(7, 6)
    (found,) = attentions(nn.Sequential(Block(heads_first)))
    out = heads_first.query_key_value(x).view(7, 2, 3, 3)
    query, key = products(found, x)
    assert torch.allclose(query, out[:, :, 0].transpose(0, 1))
    assert torch.allclose(key, out[:, :, 1].transpose(0, 1))


@pytest.mark.parametrize("options", [{}, {"kdim": 4, "vdim": 4}, {"bias": False}])
def test_multihead_attention_is_known(options):
    module = nn.MultiheadAttention(6, 2, **options)
    (found,) = attentions(module)
    assert (found.name, found.heads, found.key_heads, found.outputs) == ("attention", 2, 2, None)
    weights = (module.q_proj_weight, module.k_proj_weight) if options.get("kdim") else module.in_proj_weight.chunk(3)
    for own, weight in zip((found.query, found.key), weights, strict=False):
        assert torch.equal(own[0].parameter[own[0].index.flatten()], weight)
        assert len(own) == (1 if options.get("bias") is False else 2)


def test_what_cannot_be_is_refused():
    query, key = nn.Linear(4, 6), nn.Linear(4, 4)
    with pytest.raises(ValueError, match="heads must be a divisor of the 6 rows of a weight of shape"):
        Attention.of("x", query, key, heads=4)
    with pytest.raises(TypeError, match="must be two linear layers"):
        Attention.of("x", nn.ReLU(), key, heads=2)
    with pytest.raises(ValueError, match="3 heads of queries cannot share 2 heads of keys"):
        Attention.of("x", query, key, heads=3, key_heads=2)
    with pytest.raises(ValueError, match="need rows, alike in heads"):
        Attention(
            "x", (Rows(query.weight, torch.arange(6).view(2, 3)), Rows(query.bias, torch.arange(6).view(3, 2))), ()
        )
