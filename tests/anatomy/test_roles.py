"""Roles of torch's own modules, of heads and of ties."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, weight_norm

from steepest.anatomy import View, route
from tests.anatomy.routed import Block, LanguageModel, role_of, summary


def test_attention_in_projection_is_three_matrices():
    plan = route(nn.MultiheadAttention(8, 2, add_bias_kv=True))
    assert plan.row("in_proj_weight").blocks() == ((1, 8, 8),) * 3
    assert plan.row("in_proj_weight").reason == "weight of MultiheadAttention, q, k, v fused"
    assert plan.row("out_proj.weight").role == "matrix"
    assert plan.counts() == {"matrix": 2, "embedding": 0, "head": 0, "vector": 4}


def test_attention_with_other_key_width_has_separate_matrices():
    found = summary(nn.MultiheadAttention(8, 2, kdim=6, vdim=4))
    weights = ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    assert found == dict.fromkeys(weights, ("matrix", "linear"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.LSTM(6, 4), {"weight_ih_l0": "split=4+4+4+4", "weight_hh_l0": "split=4+4+4+4"}),
        (nn.GRU(6, 4), {"weight_ih_l0": "split=4+4+4", "weight_hh_l0": "split=4+4+4"}),
        (nn.RNN(6, 4), {"weight_ih_l0": "linear", "weight_hh_l0": "linear"}),
        (nn.LSTMCell(6, 4), {"weight_ih": "split=4+4+4+4", "weight_hh": "split=4+4+4+4"}),
        (nn.GRUCell(6, 4), {"weight_ih": "split=4+4+4", "weight_hh": "split=4+4+4"}),
        (nn.RNNCell(6, 4), {"weight_ih": "linear", "weight_hh": "linear"}),
        (
            nn.LSTM(6, 4, proj_size=3),
            {"weight_ih_l0": "split=4+4+4+4", "weight_hh_l0": "split=4+4+4+4", "weight_hr_l0": "linear"},
        ),
    ],
    ids=str,
)
def test_recurrent_weights_fall_into_gates(layer, expected):
    assert summary(layer) == {name: ("matrix", view) for name, view in expected.items()}


def test_gates_of_an_lstm_are_rows_in_torch_order(rng):
    """The first two blocks of a two-gate step by hand: i and f; c' = f c + i g, h' = o tanh(c')."""
    cell = nn.LSTMCell(3, 4, bias=False)
    plan = route(cell)
    x, h, c = (torch.randn(1, size, generator=rng) for size in (3, 4, 4))
    ih, hh = (plan.row(name).view.split_tensor(getattr(cell, name)) for name in ("weight_ih", "weight_hh"))
    i, f, g, o = (x @ a[0].mT + h @ b[0].mT for a, b in zip(ih, hh, strict=True))
    expected = f.sigmoid() * c + i.sigmoid() * g.tanh()
    torch.testing.assert_close(cell(x, (h, c)), (o.sigmoid() * expected.tanh(), expected))


def test_a_stack_of_encoder_layers_has_no_head():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    plan = route(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    plan.assert_counts(matrix=8, head=0, embedding=0)
    assert route(layer).counts()["head"] == 0
    assert plan.row("layers.1.self_attn.in_proj_weight").view == View(split=(8, 8, 8))


def test_convolutions():
    model = nn.ModuleDict({
        "plain": nn.Conv2d(3, 8, 3),
        "gray": nn.Conv2d(1, 8, 3),
        "grouped": nn.Conv2d(8, 12, 3, groups=4),
        "depthwise": nn.Conv1d(8, 8, 5, groups=8),
        "multiplied": nn.Conv2d(8, 16, 3, groups=8),
        "up": nn.ConvTranspose2d(8, 6, 2),
        "up_grouped": nn.ConvTranspose1d(8, 6, 2, groups=2),
        "up_depthwise": nn.ConvTranspose1d(8, 16, 2, groups=8),
        "volume": nn.Conv3d(2, 4, 2),
    })  # fmt: skip
    plan = route(model, overrides={"volume.weight": "matrix"})
    expected = {
        "plain": ("matrix", ((1, 8, 27),)),
        "gray": ("matrix", ((1, 8, 9),)),
        "grouped": ("matrix", ((4, 3, 18),)),
        "depthwise": ("vector", ()),
        "multiplied": ("vector", ()),
        "up": ("matrix", ((1, 6, 32),)),
        "up_grouped": ("matrix", ((2, 3, 8),)),
        "up_depthwise": ("vector", ()),
        "volume": ("matrix", ((1, 4, 16),)),
    }
    assert {name: (plan.row(f"{name}.weight").role, plan.row(f"{name}.weight").blocks()) for name in model} == expected
    assert plan.row("depthwise.weight").reason == "depthwise filters of Conv1d: each sees one channel"


def test_bilinear_joins_its_two_inputs():
    row = route(nn.Bilinear(3, 4, 5)).row("weight")
    assert (row.role, row.blocks()) == ("matrix", ((1, 5, 12),))


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm((4, 6)), nn.RMSNorm(8), nn.GroupNorm(2, 8), nn.BatchNorm2d(8), nn.InstanceNorm1d(8, affine=True)],
)
def test_gains_are_vectors_whatever_their_shape(norm):
    plan = route(norm)
    assert {row.role for row in plan} == {"vector"}
    assert {row.reason for row in plan} <= {f"gain of {type(norm).__name__}", f"bias of {type(norm).__name__}"}


def test_odd_shapes():
    model = nn.Module()
    model.row = nn.Linear(7, 1)
    model.column = nn.Linear(1, 7)
    model.narrow = nn.Linear(512, 2)
    model.empty = nn.Linear(5, 4)
    model.empty.weight = nn.Parameter(torch.zeros(0, 5))
    model.scale = nn.Parameter(torch.tensor(1.0))
    model.token = nn.Parameter(torch.zeros(1, 1, 8))
    model.counter = nn.Parameter(torch.zeros(3, 4, dtype=torch.int32), requires_grad=False)
    model.phase = nn.Parameter(torch.zeros(3, 4, dtype=torch.complex64))
    model.last = nn.Linear(4, 4)
    plan = route(model)
    reasons = {row.name: (row.role, row.reason) for row in plan if "bias" not in row.name}
    assert reasons == {
        "scale": ("vector", "scalar of Module"),
        "token": ("vector", "1-D but for unit dimensions, in Module"),
        "counter": ("vector", "not real floating point: torch.int32"),
        "phase": ("vector", "not real floating point: torch.complex64"),
        "row.weight": ("vector", "weight of Linear, but of one row or column"),
        "column.weight": ("vector", "weight of Linear, but of one row or column"),
        "narrow.weight": ("matrix", "weight of Linear"),
        "empty.weight": ("vector", "empty"),
        "last.weight": ("head", "output head: the last matrix of the model"),
    }


def test_a_head_of_one_row_is_a_head():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    assert summary(model) == {"0.weight": ("matrix", "linear"), "2.weight": ("head", "linear")}


def test_lookalikes_are_told_by_their_declared_sizes():
    class Dense(nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.in_features, self.out_features = 3, 5
            self.weight = nn.Parameter(torch.zeros(shape))

    class Table(nn.Module):
        num_embeddings, embedding_dim = 9, 4

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(9, 4))

    assert summary(Dense((5, 3))) == {"weight": ("matrix", "linear")}
    assert summary(Dense((3, 5))) == {"weight": ("matrix", "transposed")}
    assert summary(Table()) == {"weight": ("embedding", "transposed")}
    assert len(route(Dense((4, 4))).unknown) == 1


def test_routers_by_class_and_by_place():
    class SomeRouter(nn.Linear):
        pass

    class TopKRouter(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.score = nn.Linear(8, 4)

    class Moe(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 4, bias=False)
            self.experts = nn.ModuleList([Block(), Block()])

    class Glu(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 4, bias=False)

    assert route(SomeRouter(8, 4)).row("weight").reason == "router weight, one row per expert (SomeRouter)"
    assert [row.reason for row in route(TopKRouter())] == [
        "gain of LayerNorm",
        "bias of LayerNorm",
        "router weight, one row per expert (Linear)",
        "bias of Linear",
    ]
    assert role_of(Moe(), "gate.weight") == "vector"
    assert role_of(Glu(), "gate.weight") == "matrix"


def test_tables_held_by_the_model_itself():
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
            self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
            self.query_tokens = nn.Parameter(torch.zeros(1, 4, 8))

    plan = route(Vision(), strict=True)
    assert [(row.role, row.view) for row in plan] == [("embedding", None), ("vector", None), ("embedding", None)]


def test_the_head_has_a_row_per_token():
    plan = route(LanguageModel())
    plan.assert_counts(matrix=4, embedding=2, head=1)
    assert plan.row("head.weight").reason == "output head: one row per row of the token table, 16"


def test_a_tied_head_is_its_embedding_and_one_row():
    plan = route(LanguageModel(tied=True))
    assert plan.row("tokens.weight").reason == "lookup table of Embedding, tied with head.weight"
    plan.assert_counts(matrix=4, embedding=2, head=0)
    assert "head.weight" not in [row.name for row in plan]


def test_a_tie_is_seen_in_either_order_of_registration():
    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 16, bias=False)
            self.tokens = nn.Embedding(16, 8)
            self.tokens.weight = self.head.weight
            self.mix = nn.Linear(8, 8)

    assert summary(HeadFirst()) == {"head.weight": ("embedding", "transposed"), "mix.weight": ("matrix", "linear")}


def test_what_the_model_names_goes_first():
    class Named(LanguageModel):
        def __init__(self):
            super().__init__()
            self.readout = nn.Linear(8, 20)
            self.extra = nn.Linear(8, 20)

        def get_output_embeddings(self):
            return self.readout

    class Several(Named):
        def get_output_embeddings(self):
            return nn.ModuleList([self.readout, self.extra])

    class Speechless(LanguageModel):
        def get_output_embeddings(self):
            raise NotImplementedError

    assert [row.name for row in route(Named()) if row.role == "head"] == ["readout.weight"]
    assert [row.name for row in route(Several()) if row.role == "head"] == ["readout.weight", "extra.weight"]
    assert [row.name for row in route(Speechless()) if row.role == "head"] == ["head.weight"]


def test_the_last_matrix_is_the_head_unless_it_is_the_only_one_or_in_a_block():
    convnet = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 10))
    assert [row.name for row in route(convnet) if row.role == "head"] == ["2.weight"]
    assert summary(nn.Linear(3, 4)) == {"weight": ("matrix", "linear")}
    assert route(nn.Sequential(nn.Linear(3, 8), Block(), Block())).counts()["head"] == 0
    assert route(nn.ModuleList([Block()])).counts()["head"] == 0
    other = Block()
    other.shortcut = nn.Linear(8, 8)  # blocks of one class are alike, whatever is in them
    assert route(nn.Sequential(Block(), other)).counts()["head"] == 0
    assert route(nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2)])).row("1.weight").role == "head"
    layers = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)]
    assert route(nn.Sequential(*layers, nn.Sequential(nn.Linear(4, 2)))).row("3.0.weight").role == "head"
    assert route(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))).counts()["head"] == 0


def test_parametrized_weights_keep_their_role():
    model = nn.Sequential(orthogonal(nn.Linear(4, 6)), nn.ReLU(), orthogonal(nn.Linear(6, 3)))
    assert summary(model) == {
        "0.parametrizations.weight.original": ("matrix", "linear"),
        "2.parametrizations.weight.original": ("head", "linear"),
    }
    assert route(model)[1].reason == "weight of Linear"
    (factor,) = route(weight_norm(nn.Linear(4, 6))).unknown
    assert factor.name == "parametrizations.weight.original1"


def test_an_inner_layer_as_wide_as_the_vocabulary_is_no_head():
    class ByteModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(256, 64)
            self.up = nn.Linear(64, 256)
            self.down = nn.Linear(256, 64)
            self.out = nn.Linear(64, 256)

    roles = {row.name: row.role for row in route(ByteModel())}
    assert roles["up.weight"] == roles["down.weight"] == "matrix"
    assert roles["out.weight"] == "head"


def test_a_name_that_contains_a_word_of_tables_is_no_table():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.w_query = nn.Parameter(torch.zeros(8, 8))
            self.token_mix = nn.Parameter(torch.zeros(16, 16))
            self.cls_token = nn.Parameter(torch.zeros(4, 8))

    plan = route(Attention())
    assert [row.name for row in plan.unknown] == ["w_query", "token_mix"]
    assert plan.row("cls_token").role == "embedding"
