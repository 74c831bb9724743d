"""Who reads, in what structure, and who is expected to read the same; then what small published models really read."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

from steepest import NewtonMuon
from steepest.anatomy import route
from steepest.stages import InputMoment
from steepest.stages.inputs import find_readers

EACH = InputMoment(every=1, first=0, structure="auto")


def matrices(model, **options):
    return [row for row in route(model, **options) if row.role == "matrix" and row.trainable]


def shared(model):
    """Names of the parameters, in the groups that are expected to read the same."""
    groups = {}
    for reader in find_readers(matrices(model), EACH):
        groups.setdefault(reader.group, []).append(reader.row.name)
    return list(groups.values())


class Layers(nn.Module):
    """Linear maps by name, nested under `attn`, and a head."""

    def __init__(self, **shapes):
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()})
        self.head = nn.Linear(8, 16)


@pytest.mark.parametrize(
    "names",
    [
        ("q_proj", "k_proj", "v_proj"),
        ("query", "key", "value"),
        ("q", "k", "v"),
        ("to_q", "to_k", "to_v"),
        ("wq", "wk", "wv"),
        ("w_q", "w_k", "w_v"),
        ("q_lin", "k_lin", "v_lin"),
        ("query_proj", "key_proj", "value_proj"),
        ("gate_proj", "up_proj"),
        ("w1", "w3"),
        ("wi_0", "wi_1"),
    ],
    ids=lambda names: names[0],
)
def test_siblings_whose_names_say_so_are_expected_to_share(names):
    model = Layers(**dict.fromkeys(names, (8, 8)), o_proj=(8, 8))
    assert shared(model) == [[f"attn.{name}.weight" for name in names], ["attn.o_proj.weight"]]


@pytest.mark.parametrize("names", [("w1", "w2"), ("up", "down"), ("q_proj", "gate_proj"), ("qa", "kb"), ("qkv", "o")])
def test_other_names_are_not(names):
    model = Layers(**dict.fromkeys(names, (8, 8)))
    assert shared(model) == [[f"attn.{name}.weight"] for name in names]


def test_a_sibling_of_another_width_does_not_share():
    model = Layers(q_proj=(8, 8), k_proj=(6, 8), v_proj=(6, 8))
    assert shared(model) == [["attn.q_proj.weight"], ["attn.k_proj.weight", "attn.v_proj.weight"]]


def test_cousins_and_tied_weights_do_not_share():
    model = nn.ModuleList([Layers(q_proj=(8, 8), k_proj=(8, 8)) for _ in range(2)])
    model[1].attn.k_proj.weight = model[0].attn.k_proj.weight
    groups = [names for names in shared(model) if "attn" in names[0]]
    assert groups == [["0.attn.q_proj.weight"], ["0.attn.k_proj.weight"], ["1.attn.q_proj.weight"]]


def structures(model, options):
    return {reader.row.name: str(reader.layout) for reader in find_readers(matrices(model), options)}


def test_the_fan_out_that_counts_is_that_of_all_who_share():
    model = Layers(q_proj=(8, 8), k_proj=(8, 2), v_proj=(8, 2), o_proj=(8, 8), lone=(8, 2), down=(16, 8))
    expected = dict.fromkeys((f"attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")), "full 8")
    expected |= {"attn.lone.weight": "diagonal 8", "attn.down.weight": "diagonal 16"}
    assert structures(model, EACH) == expected
    wide = {name: layout for name, layout in expected.items() if layout.startswith("diagonal")}
    assert structures(model, InputMoment()) == wide


def test_what_is_left_to_muon_is_no_reader_but_its_siblings_are():
    model = Layers(q_proj=(8, 8), k_proj=(8, 8))
    assert list(structures(model, InputMoment(structure={"*": "auto", "*.k_proj.*": "none"}))) == ["attn.q_proj.weight"]
    assert structures(model, InputMoment(structure="none")) == {}


def test_a_pattern_that_names_no_matrix_is_refused():
    text = r"^InputMoment: the structure of 'attn.q_prj.weight' is given, but no matrix has such a name. Did you mean "
    with pytest.raises(ValueError, match=text + r"'attn.q_proj.weight'\?$"):
        NewtonMuon(Layers(q_proj=(8, 8)), precondition=InputMoment(structure={"attn.q_prj.weight": "none"}))


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_is_fed_by_the_copied_modules(again):
    model = Layers(q_proj=(8, 8))
    twin, (reader,) = again((model, find_readers(matrices(model), EACH)))
    ((module, feed),) = reader.feeds
    assert module is twin.attn["q_proj"]
    assert reader.parameter is twin.attn["q_proj"].weight
    assert reader.layout == find_readers(matrices(model), EACH)[0].layout
    assert feed.pick((torch.ones(2, 8),), {}) is not None


SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return transformers.GPT2LMHeadModel(config)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def qwen3_moe():
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SMALL, **moe))


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=4))


def gpt_oss():
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": rope}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**SMALL, **moe))


BLOCK = ["self_attn.q_proj", "self_attn.o_proj"]
LEADERS = {
    gpt2: ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    llama: [*BLOCK, "mlp.gate_proj", "mlp.down_proj"],
    qwen3_moe: [*BLOCK, "mlp.experts.gate_up_proj"],
    mixtral: [*BLOCK, "mlp.experts.gate_up_proj"],
    gpt_oss: [*BLOCK, "mlp.experts.gate_up_proj"],
}
MODELS = pytest.mark.parametrize("build", LEADERS, ids=lambda build: build.__name__)


def layer(model, number):
    return (model.transformer.h if hasattr(model, "transformer") else model.model.layers)[number]


def captured(model, ids):
    """What each module of the first layer was called with."""
    calls = {}

    def keep(name):
        return lambda module, arguments, options: calls.setdefault(name, (*arguments, *options.values())) and None

    handles = [
        module.register_forward_pre_hook(keep(name), with_kwargs=True)
        for name, module in layer(model, 0).named_modules()
        if name
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return calls


@MODELS
def test_the_moments_of_published_models_are_those_of_what_their_layers_read(build):
    torch.manual_seed(0)
    model = build().train()
    ids = torch.randint(3, 64, (2, 7))
    calls = captured(model, ids)
    options = InputMoment(every=1, first=0, structure="full", missing="muon")
    optimizer = NewtonMuon(model, lr=0.01, precondition=options)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    kept, seen = {}, set()
    for name, parameter in layer(model, 0).named_parameters():
        state = optimizer.state[parameter]
        if state.get("input_mass", torch.zeros(1)).any() and state["input_moment"].data_ptr() not in seen:
            seen.add(state["input_moment"].data_ptr())
            kept[name.removesuffix(".weight")] = state["input_moment"]
    assert list(kept) == LEADERS[build]
    for name, moment in kept.items():
        if not name.endswith("gate_up_proj"):
            z = calls[name][0].detach().flatten(0, -2)
            expected = (z.T @ z).unsqueeze(0) / len(z)
        else:
            z, index = (calls[name.removesuffix(".gate_up_proj")][place].detach() for place in (0, 1))
            own = [z.flatten(0, -2)[(index == expert).any(-1)] for expert in range(4)]
            assert all(map(len, own)), "each expert must have a token"
            expected = torch.stack([x.T @ x / len(x) for x in own])
        torch.testing.assert_close(moment, 0.05 * expected, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: n + text)


@MODELS
def test_only_the_inner_maps_of_experts_are_out_of_sight(build):
    unseen = {reader.row.name: reader.unseen for reader in find_readers(matrices(build()), EACH) if reader.unseen}
    reason = "it reads what other experts' weights of the same module made"
    inner = [f"model.layers.{number}.mlp.experts.down_proj" for number in range(2)]
    assert unseen == (dict.fromkeys(inner, reason) if "mlp.experts.gate_up_proj" in LEADERS[build] else {})
