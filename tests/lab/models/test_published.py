"""Published models as shapes: the numbers that their cards state, and what transformers builds of the same config."""

from dataclasses import replace

import pytest
import torch
import transformers

from steepest.anatomy import route
from steepest.lab.models.published import PUBLISHED, published
from tests.cases import cases

# As stated by the indices of the published weights.
PARAMETERS = {
    "gpt2": 124_439_808,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "qwen3-moe": 30_532_122_624,
    "qwen3-moe-235b": 235_093_634_560,
}


@cases("name", PUBLISHED)
def test_models_have_as_many_parameters_as_published(name):
    assert sum(one.numel() for one in published(name).on_meta().parameters()) == PARAMETERS[name]


def test_an_unknown_model_is_refused_with_a_near_one():
    with pytest.raises(ValueError, match="Unknown model 'lama-8b': did you mean 'llama-8b'"):
        published("lama-8b")


def of_transformers(name, sizes):
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if name == "gpt2":
        shape = {"n_embd": sizes.width, "n_layer": sizes.layers, "n_head": sizes.heads, "n_positions": sizes.positions}
        config = transformers.GPT2Config(vocab_size=sizes.vocabulary, n_inner=sizes.inner, **shape, **ends)
        return transformers.GPT2LMHeadModel(config)
    shape = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_value_heads,
        "head_dim": sizes.head_size,
        "tie_word_embeddings": False,
    }
    if not sizes.experts:
        config = transformers.LlamaConfig(**shape, intermediate_size=sizes.inner, **ends)
        return transformers.LlamaForCausalLM(config)
    moe = {"num_experts": sizes.experts, "moe_intermediate_size": sizes.inner}
    config = transformers.Qwen3MoeConfig(**shape, **moe, num_experts_per_tok=sizes.experts_per_token, **ends)
    return transformers.Qwen3MoeForCausalLM(config)


@pytest.mark.slow
@cases("name", PUBLISHED)
def test_names_shapes_roles_and_views_are_those_of_transformers(name):
    one = PUBLISHED[name]
    sizes = replace(one.sizes, vocabulary=160, layers=2)
    with torch.device("meta"):
        ours, theirs = one.build(sizes), of_transformers(name, sizes)
    plans = [
        {row.name: (row.shape, row.role, str(row.view), len(row.sites)) for row in route(model)}
        for model in (ours, theirs)
    ]
    assert plans[0] == plans[1]
