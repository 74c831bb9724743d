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


def mamba2():
    config = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "expand": 2, "state_size": 6, "n_groups": 2}
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**config, num_heads=8, head_dim=8, chunk_size=8))


DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "layer_types": ["linear_attention", "full_attention"],
}


def qwen3_next():
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = transformers.Qwen3NextConfig(**SMALL, **GROUPED, **DELTA, **moe, shared_expert_intermediate_size=16)
    return transformers.Qwen3NextForCausalLM(config)


def qwen3_5():
    return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**SMALL, **GROUPED, **DELTA))


def whisper():
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8, "vocab_size": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = transformers.WhisperConfig(**sizes, **heads, **tokens, max_source_positions=16, max_target_positions=16)
    return transformers.WhisperForConditionalGeneration(config)


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
    mamba2: {
        "backbone.embeddings.weight": ("embedding", "transposed"),
        "backbone.layers.*.mixer.conv1d.weight": ("vector", None),
        "backbone.layers.*.mixer.in_proj.weight": ("matrix", "split=64+64+12+12+8"),
        "backbone.layers.*.mixer.out_proj.weight": ("matrix", "linear"),
        "backbone.layers.*.mixer.A_log": ("vector", None),
        "backbone.layers.*.mixer.D": ("vector", None),
        "backbone.layers.*bias": ("vector", None),
        "backbone.*norm*.weight": ("vector", None),
        "lm_head.weight": ("head", "linear"),
    },
    qwen3_next: {
        **ENDS,
        **QK_NORM,
        "model.layers.*.linear_attn.in_proj_qkvz.weight": ("matrix", "split=16+16+24+24 interleave=2"),
        "model.layers.*.linear_attn.in_proj_ba.weight": ("matrix", "split=4+4 interleave=2"),
        "model.layers.*.linear_attn.out_proj.weight": ("matrix", "linear"),
        "model.layers.*.linear_attn.conv1d.weight": ("vector", None),
        "model.layers.*.linear_attn.A_log": ("vector", None),
        "model.layers.*.linear_attn.dt_bias": ("vector", None),
        "model.layers.*.linear_attn.norm.weight": ("vector", None),
        "model.layers.*.self_attn.q_proj.weight": ("matrix", "split=32+32 interleave=4"),
        "model.layers.*.self_attn.[kvo]_proj.weight": ("matrix", "linear"),
        "model.layers.*.mlp.gate.weight": ("vector", None),
        "model.layers.*.mlp.experts.gate_up_proj": ("matrix", "experts split=16+16"),
        "model.layers.*.mlp.experts.down_proj": ("matrix", "experts"),
        "model.layers.*.mlp.shared_expert.*_proj.weight": ("matrix", "linear"),
        "model.layers.*.mlp.shared_expert_gate.weight": ("vector", None),
    },
    qwen3_5: {
        **ENDS,
        **MLP,
        **QK_NORM,
        "model.layers.*.linear_attn.in_proj_qkv.weight": ("matrix", "split=16+16+24"),
        "model.layers.*.linear_attn.in_proj_[zba].weight": ("matrix", "linear"),
        "model.layers.*.linear_attn.out_proj.weight": ("matrix", "linear"),
        "model.layers.*.linear_attn.conv1d.weight": ("vector", None),
        "model.layers.*.linear_attn.A_log": ("vector", None),
        "model.layers.*.linear_attn.dt_bias": ("vector", None),
        "model.layers.*.linear_attn.norm.weight": ("vector", None),
        "model.layers.*.self_attn.q_proj.weight": ("matrix", "split=32+32 interleave=4"),
        "model.layers.*.self_attn.[kvo]_proj.weight": ("matrix", "linear"),
    },
    whisper: {
        "model.encoder.conv?.weight": ("matrix", "linear"),
        "model.encoder.embed_positions.weight": ("embedding", "transposed"),
        "model.decoder.embed_positions.weight": ("embedding", "transposed"),
        "model.decoder.embed_tokens.weight": ("embedding", "transposed"),
        "model.*coder.layers.*_proj.weight": ("matrix", "linear"),
        "model.*coder.layers.*.fc?.weight": ("matrix", "linear"),
        "model.*norm.weight": ("vector", None),
        "*.bias": ("vector", None),
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


# Tensors of each role, two layers each.
COUNTS = {
    gpt2: {"matrix": 8, "embedding": 2, "head": 0, "vector": 18},
    llama: {"matrix": 14, "embedding": 1, "head": 1, "vector": 5},
    phi3: {"matrix": 8, "embedding": 1, "head": 1, "vector": 5},
    qwen3_moe: {"matrix": 12, "embedding": 1, "head": 1, "vector": 11},
    mixtral: {"matrix": 12, "embedding": 1, "head": 1, "vector": 7},
    gpt_oss: {"matrix": 12, "embedding": 1, "head": 1, "vector": 23},
    vit: {"matrix": 13, "embedding": 1, "head": 1, "vector": 25},
    t5: {"matrix": 32, "embedding": 3, "head": 0, "vector": 12},
    whisper: {"matrix": 34, "embedding": 3, "head": 0, "vector": 52},
    mamba2: {"matrix": 4, "embedding": 1, "head": 1, "vector": 15},
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


@pytest.mark.slow
@pytest.mark.parametrize("make", COUNTS, ids=lambda make: make.__name__)
def test_as_many_tensors_have_each_role_as_are_counted_here(make):
    route(build(make)).assert_counts(**COUNTS[make])


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


@pytest.mark.parametrize("make", [gpt2, phi3, neox, mixtral, gpt_oss, mamba2, qwen3_next])
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


def test_rows_of_a_gated_delta_rule_are_those_that_it_takes_apart():
    """The module itself says which rows of its fused projections are whose."""
    model = qwen3_next()
    name = "model.layers.0.linear_attn"
    mixer, plan = model.get_submodule(name), route(model)
    rows = [
        torch.arange(n, dtype=torch.float32) for n in (mixer.in_proj_qkvz.out_features, mixer.in_proj_ba.out_features)
    ]
    expected = [part.flatten() for part in mixer.fix_query_key_value_ordering(*(own.view(1, 1, -1) for own in rows))]
    found = [
        part.flatten()
        for leaf, own in zip(("in_proj_qkvz", "in_proj_ba"), rows, strict=True)
        for part in plan.row(f"{name}.{leaf}.weight").view.split_tensor(own.view(-1, 1))
    ]
    assert [part.tolist() for part in found] == [part.tolist() for part in expected]


@pytest.mark.parametrize("make", [qwen3_next, qwen3_5], ids=lambda make: make.__name__)
def test_rows_of_a_gated_query_are_the_queries_and_the_gates(make):
    name = "model.layers.1.self_attn"
    model = make()
    attention = model.get_submodule(name)
    rows = torch.arange(attention.q_proj.out_features, dtype=torch.float32)
    query, gate = rows.view(-1, attention.head_dim * 2).chunk(2, dim=-1)  # as in its forward
    found = route(model).row(f"{name}.q_proj.weight").view.split_tensor(rows.view(-1, 1))
    assert [part.flatten().tolist() for part in found] == [query.flatten().tolist(), gate.flatten().tolist()]


STATE_SPACES = {
    "Mamba2": {"num_heads": 8, "head_dim": 8, "chunk_size": 8, "expand": 2, "state_size": 6, "n_groups": 2},
    "Bamba": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 6,
        "mamba_n_groups": 2,
        "attn_layer_indices": [1],
    },
    "FalconH1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 6, "mamba_n_groups": 2, "mamba_d_ssm": 64},
    "Zamba2": {"n_mamba_heads": 8, "mamba_d_state": 6, "mamba_ngroups": 2, "layers_block_type": ["mamba", "hybrid"]},
}


@pytest.mark.parametrize("name", STATE_SPACES)
def test_what_a_state_space_reads_is_five_maps(name):
    """Sizes are those by which its forward takes the projection apart: gate, conv_dim (inputs, B, C), a step a head."""
    common = {k: v for k, v in SMALL.items() if k != "tie_word_embeddings"}
    config = getattr(transformers, f"{name}Config")(**{**common, **STATE_SPACES[name]})
    with torch.device("meta"):
        model = getattr(transformers, f"{name}Model")(config)
    found = 0
    for path, module in model.named_modules():
        if hasattr(module, "conv_dim") and hasattr(module, "in_proj"):
            gate, x, b, c, dt = route(model).row(f"{path}.in_proj.weight").view.split
            state = module.n_groups * module.ssm_state_size
            assert [gate, x + b + c, dt] == [module.intermediate_size, module.conv_dim, module.num_heads]
            assert [x, b, c] == [module.intermediate_size, state, state]
            found += 1
    assert found


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
