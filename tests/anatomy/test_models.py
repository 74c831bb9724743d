"""Plans of published architectures, with every parameter's role and view written down by hand.

Models are built from small configs on the meta device: nothing is downloaded and no number is computed.
"""

from fnmatch import fnmatchcase

import pytest
import torch
import transformers

from steepest.anatomy import View, route

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
ATTENTION = {f"model.layers.*.self_attn.{p}_proj.weight": ("matrix", "linear") for p in "qkvo"}
MLP = {f"model.layers.*.mlp.{p}_proj.weight": ("matrix", "linear") for p in ("gate", "up", "down")}
ENDS = {
    "model.embed_tokens.weight": ("embedding", "transposed"),
    "model.layers.*layernorm.weight": ("vector", None),
    "model.norm.weight": ("vector", None),
    "lm_head.weight": ("head", "linear"),
}
QK_NORM = {f"model.layers.*.self_attn.{p}_norm.weight": ("vector", None) for p in "qk"}


def gpt2():
    config = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, bos_token_id=1, eos_token_id=2))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **GROUPED))


def qwen3():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, **GROUPED))


def qwen3_moe():
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}  # gate_up is square: 32 x 32
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SMALL, **GROUPED, **moe))


def mixtral():
    config = transformers.MixtralConfig(**SMALL, **GROUPED, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def gpt_oss():
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": rope}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**SMALL, **GROUPED, **moe))


def llama4():
    moe = {"num_local_experts": 4, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 48}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**SMALL, **GROUPED, **moe))


def phi3():
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**SMALL, num_key_value_heads=2))


def neox():
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL))


def dbrx():
    ffn = {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}
    config = transformers.DbrxConfig(
        d_model=32,
        n_heads=4,
        n_layers=2,
        vocab_size=64,
        ffn_config=ffn,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
    )
    return transformers.DbrxForCausalLM(config)


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )


def mamba():
    return transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2))


def vit():
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**config, image_size=8, patch_size=4, num_labels=5)
    )


EXPECTED = {
    gpt2: {
        "transformer.wte.weight": ("embedding", "transposed"),
        "transformer.wpe.weight": ("embedding", "transposed"),
        "transformer.h.*.ln_?.*": ("vector", None),
        "transformer.h.*.bias": ("vector", None),
        "transformer.h.*.attn.c_attn.weight": ("matrix", "transposed split=32+32+32"),
        "transformer.h.*.c_proj.weight": ("matrix", "transposed"),
        "transformer.h.*.mlp.c_fc.weight": ("matrix", "transposed"),
        "transformer.ln_f.*": ("vector", None),
    },
    llama: {**ENDS, **ATTENTION, **MLP},
    qwen3: {**ENDS, **ATTENTION, **MLP, **QK_NORM},
    qwen3_moe: {
        **ENDS,
        **ATTENTION,
        **QK_NORM,
        "model.layers.*.mlp.gate.weight": ("vector", None),
        "model.layers.*.mlp.experts.gate_up_proj": ("matrix", "experts split=16+16"),
        "model.layers.*.mlp.experts.down_proj": ("matrix", "experts"),
    },
    mixtral: {
        **ENDS,
        **ATTENTION,
        "model.layers.*.mlp.gate.weight": ("vector", None),
        "model.layers.*.mlp.experts.gate_up_proj": ("matrix", "experts split=48+48"),
        "model.layers.*.mlp.experts.down_proj": ("matrix", "experts"),
    },
    gpt_oss: {
        **ENDS,
        **ATTENTION,
        "model.layers.*.self_attn.?_proj.bias": ("vector", None),
        "model.layers.*.self_attn.sinks": ("vector", None),
        "model.layers.*.mlp.router.*": ("vector", None),
        "model.layers.*.mlp.experts.gate_up_proj": ("matrix", "transposed experts split=48+48 interleave=48"),
        "model.layers.*.mlp.experts.down_proj": ("matrix", "transposed experts"),
        "model.layers.*.mlp.experts.*_bias": ("vector", None),
    },
    llama4: {
        **ENDS,
        **ATTENTION,
        "model.layers.*.feed_forward.router.weight": ("vector", None),
        "model.layers.*.feed_forward.shared_expert.*_proj.weight": ("matrix", "linear"),
        "model.layers.*.feed_forward.experts.gate_up_proj": ("matrix", "transposed experts split=48+48"),
        "model.layers.*.feed_forward.experts.down_proj": ("matrix", "transposed experts"),
    },
    phi3: {
        **ENDS,
        "model.layers.*.self_attn.qkv_proj.weight": ("matrix", "split=32+16+16"),
        "model.layers.*.self_attn.o_proj.weight": ("matrix", "linear"),
        "model.layers.*.mlp.gate_up_proj.weight": ("matrix", "split=48+48"),
        "model.layers.*.mlp.down_proj.weight": ("matrix", "linear"),
    },
    neox: {
        "gpt_neox.embed_in.weight": ("embedding", "transposed"),
        "gpt_neox.layers.*layernorm.*": ("vector", None),
        "gpt_neox.layers.*.bias": ("vector", None),
        "gpt_neox.layers.*.attention.query_key_value.weight": ("matrix", "split=32+32+32 interleave=4"),
        "gpt_neox.layers.*.dense*.weight": ("matrix", "linear"),
        "gpt_neox.final_layer_norm.*": ("vector", None),
        "lm_head.weight": ("head", "linear"),
    },
    dbrx: {
        "transformer.wte.weight": ("embedding", "transposed"),
        "transformer.blocks.*norm_?.weight": ("vector", None),
        "transformer.blocks.*.Wqkv.weight": ("matrix", "split=32+16+16"),
        "transformer.blocks.*.out_proj.weight": ("matrix", "linear"),
        "transformer.blocks.*.ffn.router.layer.weight": ("vector", None),
        "transformer.blocks.*.ffn.experts.mlp.[wv]1": ("matrix", "heads=4"),
        "transformer.blocks.*.ffn.experts.mlp.w2": ("matrix", "transposed heads=4@in"),
        "transformer.norm_f.weight": ("vector", None),
        "lm_head.weight": ("head", "linear"),
    },
    t5: {
        "shared.weight": ("embedding", "transposed"),
        "*coder.block.*.[qkvo].weight": ("matrix", "linear"),
        "*coder.block.*.w[io].weight": ("matrix", "linear"),
        "*coder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": ("embedding", "transposed"),
        "*layer_norm.weight": ("vector", None),
    },
    mamba: {
        "backbone.embeddings.weight": ("embedding", "transposed"),
        "backbone.layers.*.mixer.conv1d.weight": ("vector", None),
        "backbone.layers.*.mixer.*_proj.weight": ("matrix", "linear"),
        "backbone.layers.*.mixer.A_log": ("vector", None),
        "backbone.layers.*.mixer.D": ("vector", None),
        "backbone.layers.*.bias": ("vector", None),
        "backbone.*norm*.weight": ("vector", None),
    },
    vit: {
        "vit.embeddings.cls_token": ("vector", None),
        "vit.embeddings.position_embeddings": ("embedding", None),
        "vit.embeddings.patch_embeddings.projection.weight": ("matrix", "linear"),
        "vit.layers.*.attention.?_proj.weight": ("matrix", "linear"),
        "vit.layers.*.mlp.fc?.weight": ("matrix", "linear"),
        "vit.*norm*.weight": ("vector", None),
        "*.bias": ("vector", None),
        "classifier.weight": ("head", "linear"),
    },
}


def build(make):
    with torch.device("meta"):
        return make()


@pytest.mark.slow
@pytest.mark.parametrize("make", EXPECTED, ids=lambda make: make.__name__)
def test_every_parameter_has_the_role_and_view_written_here(make):
    plan = route(build(make), strict=True)
    patterns = EXPECTED[make]
    used = set()
    for row in plan:
        matching = [pattern for pattern in patterns if fnmatchcase(row.name, pattern)]
        assert matching, f"{row.name} is not in the table of this test"
        used.update(matching)
        for pattern in matching:
            assert (row.role, str(row.view) if row.view else None) == patterns[pattern], row
    assert used == set(patterns), "a line of the table is about no parameter"
    assert plan.unknown == ()
    assert [row.name for row in plan] == [name for name, _ in build(make).named_parameters()]


@pytest.mark.parametrize(
    ("make", "name", "blocks"),
    [
        (gpt2, "transformer.h.0.attn.c_attn.weight", ((1, 32, 32),) * 3),
        (gpt2, "transformer.h.1.mlp.c_fc.weight", ((1, 128, 32),)),
        (phi3, "model.layers.0.self_attn.qkv_proj.weight", ((1, 32, 32), (1, 16, 32), (1, 16, 32))),
        (phi3, "model.layers.1.mlp.gate_up_proj.weight", ((1, 48, 32), (1, 48, 32))),
        (qwen3_moe, "model.layers.0.mlp.experts.gate_up_proj", ((4, 16, 32), (4, 16, 32))),
        (qwen3_moe, "model.layers.0.mlp.experts.down_proj", ((4, 32, 16),)),
        (gpt_oss, "model.layers.0.mlp.experts.gate_up_proj", ((4, 48, 32), (4, 48, 32))),
        (gpt_oss, "model.layers.0.mlp.experts.down_proj", ((4, 32, 48),)),
        (dbrx, "transformer.blocks.0.ffn.experts.mlp.w2", ((4, 32, 24),)),
        (vit, "vit.embeddings.patch_embeddings.projection.weight", ((1, 32, 48),)),
    ],
)
def test_blocks_of_fused_and_stacked_weights(make, name, blocks):
    assert route(build(make)).row(name).blocks() == blocks


@pytest.mark.parametrize("make", [gpt2, phi3, neox, mixtral, gpt_oss])
def test_without_splitting_a_fused_weight_is_one_matrix(make):
    views = {row.view for row in route(build(make), split_fused=False) if row.role == "matrix"}
    assert views <= {View(), View(transposed=True), View(experts=True), View(experts=True, transposed=True)}


@pytest.mark.parametrize("make", [phi3, neox], ids=lambda make: make.__name__)
def test_split_rows_are_the_rows_of_q_k_and_v(make, rng):
    """The view's parts, multiplied with the input, are what the attention itself takes as q, k and v."""
    model = make()
    name = {phi3: "model.layers.0.self_attn.qkv_proj", neox: "gpt_neox.layers.0.attention.query_key_value"}[make]
    linear = model.get_submodule(name)
    x = torch.randn(5, 32, generator=rng)
    fused = linear(x) - (0 if linear.bias is None else linear.bias)
    parts = route(model).row(f"{name}.weight").view.split_tensor(linear.weight)
    q, k, v = (x @ part[0].mT for part in parts)
    if make is phi3:
        expected = fused.split((32, 16, 16), dim=-1)
    else:  # as in GPTNeoXAttention.forward: (heads, 3 * head_dim), then chunks of the last dimension
        expected = [part.flatten(1) for part in fused.unflatten(1, (4, 24)).chunk(3, dim=-1)]
    for got, want in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("make", [mixtral, gpt_oss, llama4], ids=lambda make: make.__name__)
def test_expert_matrices_compute_what_the_experts_compute(make, rng):
    """gate, up and down taken from the views, applied by hand, reproduce the module's own forward for one expert."""
    model = make()
    name = "feed_forward" if make is llama4 else "mlp"
    experts = model.get_submodule(f"model.layers.0.{name}.experts")
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, generator=rng, std=0.3)
    plan = route(model)
    rows = {leaf: plan.row(f"model.layers.0.{name}.experts.{leaf}") for leaf in ("gate_up_proj", "down_proj")}
    gate, up = (t[1] for t in rows["gate_up_proj"].view.split_tensor(experts.gate_up_proj))
    (down,) = (t[1] for t in rows["down_proj"].view.split_tensor(experts.down_proj))
    x = torch.randn(3, 32, generator=rng)
    if make is gpt_oss:
        bias = experts.gate_up_proj_bias[1]
        g, u = (x @ gate.mT + bias[::2]).clamp(max=experts.limit), (x @ up.mT + bias[1::2])
        hidden = (u.clamp(-experts.limit, experts.limit) + 1) * g * torch.sigmoid(g * experts.alpha)
        expected = hidden @ down.mT + experts.down_proj_bias[1]
    else:
        expected = (torch.nn.functional.silu(x @ gate.mT) * (x @ up.mT)) @ down.mT
    if make is llama4:  # takes the tokens of each expert, sorted by expert
        got = experts(torch.cat([torch.zeros(3, 32), x, torch.zeros(6, 32)]))[3:6]
    else:
        index, weight = torch.full((3, 1), 1), torch.ones(3, 1)
        got = experts(x, index, weight)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_experts_of_an_older_transformers_declare_nothing():
    experts = gpt_oss().model.layers[0].mlp.experts
    expected = route(experts)
    del experts.is_transposed, experts.is_concatenated
    assert route(experts) == expected


@pytest.mark.parametrize(
    ("path", "arguments", "view"),
    [
        ("jetmoe.modeling_jetmoe.JetMoeParallelExperts", (4, 32, 48), "experts"),
        ("moshi.modeling_moshi.MoshiFlexibleLinear", (32, 48, 4), "experts"),
    ],
)
def test_stacks_of_matrices_are_known_by_class(path, arguments, view):
    module, _, name = path.rpartition(".")
    imported = __import__(f"transformers.models.{module}", fromlist=[name])
    row = route(getattr(imported, name)(*arguments)).row("weight")
    assert (row.role, str(row.view), row.blocks()) == ("matrix", view, ((4, 48, 32),))


class Experts(torch.nn.Module):
    """Experts of somebody else: no declaration, no known class."""

    def __init__(self, gate_up, down):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.empty(gate_up))
        self.down_proj = torch.nn.Parameter(torch.empty(down))


@pytest.mark.parametrize(
    ("gate_up", "down", "view"),
    [
        ((4, 32, 32), (4, 32, 16), "experts"),  # 2 i = h: gate_up is square, the pair decides
        ((4, 32, 32), (4, 16, 32), "transposed experts"),
        ((4, 96, 32), (4, 32, 48), "experts"),
        ((4, 32, 96), (4, 48, 32), "transposed experts"),
    ],
)
def test_shapes_of_the_pair_prove_the_layout_of_unknown_experts(gate_up, down, view):
    plan = route(Experts(gate_up, down))
    assert [(row.role, str(row.view)) for row in plan] == [("matrix", view)] * 2
    assert plan[0].reason.endswith("fused gate, up of unknown order kept whole")


@pytest.mark.parametrize("shapes", [((4, 32, 48), (4, 32, 48)), ((4, 32, 20), (4, 32, 16)), ((4, 32, 48), (32, 16))])
def test_experts_that_fit_no_layout_are_unknown(shapes):
    plan = route(Experts(*shapes))
    assert len(plan.unknown) == 2
    assert {row.role for row in plan} == {"vector"}


class Phi3Attention(torch.nn.Module):
    """A namesake of the class in transformers, about whose order of rows nothing is known."""

    def __init__(self, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv = torch.nn.Linear(32, 96)
        self.gate_up_proj = torch.nn.Linear(32, 96)
        self.proj = torch.nn.Linear(32, 32)


@pytest.mark.parametrize("heads", [4, 7, None])
def test_fused_qkv_of_an_unknown_class_is_kept_whole_and_says_so(heads):
    row = route(Phi3Attention(heads)).row("qkv.weight")
    assert str(row.view) == "linear"
    assert row.reason == "weight of Linear, fused q, k, v of unknown order kept whole"


def test_fused_gate_and_up_of_an_unknown_class_are_kept_whole_and_say_so():
    row = route(Phi3Attention(4)).row("gate_up_proj.weight")
    assert str(row.view) == "linear"
    assert row.reason == "weight of Linear, fused gate, up of unknown order kept whole"
