"""Rows against the module itself: what it computes must be the rows times the matrices of the view, plus the bias."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from steepest.anatomy import EXPERTS, EXPERTS_TRANSPOSED, Rule, View, route
from steepest.stages import InputMoment
from steepest.stages.inputs import find_readers
from tests.cases import cases

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums of at most a hundred products


def reader_of(model, name="weight", **options):
    plan = route(model, **options)
    return find_readers([plan.row(name)], InputMoment(structure="full"))[0]


def rows_of(reader, *arguments, **options):
    ((_, feed),) = reader.feeds
    tensors = feed.pick(arguments, options)
    return None if tensors is None else feed.rows(tensors)


def products(reader, rows):
    """(*tokens, S, m): rows times the matrices of the view."""
    (matrices,) = reader.view.split_tensor(reader.parameter.detach())
    return torch.einsum("...sn,smn->...sm", rows.values.expand(*rows.values.shape[:-2], len(matrices), -1), matrices)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shape", [(3,), (7, 3), (2, 5, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("kind", [lambda: nn.Linear(3, 4), lambda: Conv1D(4, 3)], ids=["Linear", "Conv1D"])
def test_linear_maps(kind, shape):
    module, x = kind(), torch.randn(shape)
    reader = reader_of(nn.Sequential(module), "0.weight", overrides={"0.weight": "matrix"})
    expected = module(x)
    assert reader.unseen is None
    torch.testing.assert_close(products(reader, rows_of(reader, x)).squeeze(-2) + module.bias, expected, **EXACT)


def test_the_input_of_a_linear_map_may_come_by_name():
    module, x = nn.Linear(3, 4), torch.randn(5, 3)
    reader = reader_of(nn.Sequential(module), "0.weight", overrides={"0.weight": "matrix"})
    assert torch.equal(rows_of(reader, input=x).values, x.unsqueeze(-2))
    assert rows_of(reader, "nothing") is None


GEOMETRIES = [
    {},
    {"stride": 2},
    {"padding": 2},
    {"dilation": 2},
    {"padding": "same", "dilation": 2},
    {"padding": "valid"},
    {"groups": 2},
    {"stride": 2, "padding": 1, "dilation": 2, "groups": 2},
    *({"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
    {"padding": "same", "padding_mode": "circular"},
]


@cases("geometry", GEOMETRIES)
@cases("dims, kernel", [(1, 3), (1, 4), (2, 3), (2, (2, 3)), (3, (1, 2, 3))])
def test_convolutions(dims, kernel, geometry):
    module = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1](4, 6, kernel, **geometry)
    reader = reader_of(nn.Sequential(module), "0.weight", overrides={"0.weight": "matrix"})
    for shape in ((2, 4, *(9, 8, 7)[:dims]), (4, *(9, 8, 7)[:dims])):
        x = torch.randn(shape)
        expected = module(x)
        rows = rows_of(reader, x)
        outputs = products(reader, rows).flatten(-2)  # channels are group by group
        outputs = outputs.movedim(-1, 1).reshape(expected.shape) + module.bias.reshape(-1, *(1,) * dims)
        assert rows.values.shape[-2] == module.groups
        torch.testing.assert_close(outputs, expected, **EXACT)


def test_a_convolution_in_bfloat16_keeps_its_inputs_exact():
    module = nn.Conv1d(2, 3, 2, dtype=torch.bfloat16)
    x = torch.randn(1, 2, 5).bfloat16()
    rows = rows_of(reader_of(nn.Sequential(module), "0.weight", overrides={"0.weight": "matrix"}), x)
    assert rows.values.dtype == torch.bfloat16
    assert torch.equal(rows.values[0, 3, 0], x[0, :, 3:5].reshape(-1))


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_fused_projection_of_self_attention(batch_first):
    module, x = nn.MultiheadAttention(4, 2, batch_first=batch_first), torch.randn(3, 5, 4)
    reader = reader_of(module, "in_proj_weight")
    q, k, v = (products(reader, rows_of(reader, x, x, value=x)).squeeze(-2) + module.in_proj_bias).chunk(3, -1)
    if not batch_first:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in (q, k, v))
    heads = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
    expected = module(x, x, x)[0] if batch_first else module(x, x, x)[0].transpose(0, 1)
    torch.testing.assert_close(module.out_proj(heads), expected, **EXACT)


def test_cross_attention_does_not_feed_the_fused_projection_one_input():
    module, x, y = nn.MultiheadAttention(4, 2), torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    reader = reader_of(module, "in_proj_weight")
    assert rows_of(reader, x, y, y) is None
    assert rows_of(reader, x, x, x.clone()) is None
    assert rows_of(reader, x) is None


class RoutedExperts(nn.Module):
    """Each token goes to a few of the experts, one after the other."""

    def __init__(self, experts=3, width=4, hidden=5, transposed=False):
        super().__init__()
        self.transposed = transposed
        shape = (experts, width, hidden) if transposed else (experts, hidden, width)
        self.gate_up_proj = nn.Parameter(torch.randn(shape))

    def forward(self, hidden_states, top_k_index):
        flat = hidden_states.reshape(-1, hidden_states.size(-1))
        weights = self.gate_up_proj.mT if self.transposed else self.gate_up_proj
        return torch.stack(
            [torch.stack([weights[e] @ x for e in which]) for x, which in zip(flat, top_k_index, strict=True)]
        )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [(7,), (3, 2)], ids=str)  # as many sequences as experts: not the dense layout
def test_routed_experts(transposed, tokens):
    model = RoutedExperts(transposed=transposed)
    view = EXPERTS_TRANSPOSED if transposed else EXPERTS
    reader = reader_of(model, "gate_up_proj", overrides={"gate_up_proj": view})
    x = torch.randn(*tokens, 4)
    index = torch.tensor(list(itertools.islice(itertools.cycle(([0, 2], [2, 1], [0, 1])), x[..., 0].numel())))
    rows = rows_of(reader, x, index, torch.rand(index.shape))
    outputs = products(reader, rows)
    assert torch.equal(rows.chosen.sum(-1), torch.full((len(index),), 2))
    for token, experts in enumerate(index):
        assert rows.chosen[token].nonzero().flatten().tolist() == sorted(experts.tolist())
        torch.testing.assert_close(outputs[token, experts], model(x, index)[token], **EXACT)


def test_an_expert_index_beyond_the_stack_chooses_none():
    reader = reader_of(RoutedExperts(), "gate_up_proj", overrides={"gate_up_proj": EXPERTS})
    rows = rows_of(reader, torch.randn(2, 4), torch.tensor([[0, 3], [3, 3]]))
    assert rows.chosen.tolist() == [[True, False, False], [False, False, False]]


def test_dense_experts_take_their_own_rows():
    reader = reader_of(RoutedExperts(), "gate_up_proj", overrides={"gate_up_proj": EXPERTS})
    x = torch.randn(3, 6, 4)
    expected = torch.bmm(x, reader.parameter.detach().mT).transpose(0, 1)
    torch.testing.assert_close(products(reader, rows_of(reader, x)), expected, **EXACT)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.randn(6, 4),),  # which rows are whose?
        (torch.randn(6, 5), torch.zeros(6, 1, dtype=torch.int64)),
        (torch.randn(6, 4), torch.zeros(5, 1, dtype=torch.int64)),
        (torch.randn(6, 4), torch.ones(6, 3)),
        (),
    ],
    ids=["no index", "other width", "other count", "scores only", "nothing"],
)
def test_calls_of_experts_that_say_too_little_feed_nothing(arguments):
    reader = reader_of(RoutedExperts(), "gate_up_proj", overrides={"gate_up_proj": EXPERTS})
    assert rows_of(reader, *arguments) is None


def two_stacks():
    model = RoutedExperts()
    model.down_proj = nn.Parameter(torch.randn(3, 4, 5))
    return model


def parametrized():
    model = nn.Sequential(nn.Linear(4, 4))
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    return model


UNSEEN = {
    "the weight is computed by a parametrization": (parametrized, "0.parametrizations.weight.original", "matrix"),
    "MultiheadAttention multiplies with it without calling the module": (
        lambda: nn.MultiheadAttention(4, 2),
        "out_proj.weight",
        "matrix",
    ),
    "it reads what other experts' weights of the same module made": (two_stacks, "down_proj", EXPERTS),
    "no rule says what Bilinear multiplies 'weight' with": (lambda: nn.Sequential(nn.Bilinear(3, 4, 5)), "0.weight", 0),
    "no rule says what GRU multiplies 'weight_hh_l0' with": (lambda: nn.GRU(3, 4), "weight_hh_l0", "matrix"),
    "no rule says what ConvTranspose1d multiplies 'weight' with": (
        lambda: nn.Sequential(nn.ConvTranspose1d(3, 4, 2)),
        "0.weight",
        0,
    ),
    "the view 'transposed' is not the one that Linear multiplies with": (
        lambda: nn.Sequential(nn.Linear(4, 4)),  # square: the shape alone would not tell
        "0.weight",
        View(transposed=True),
    ),
    "the view 'linear' is not the one that Conv1D multiplies with": (
        lambda: nn.Sequential(Conv1D(5, 4)),
        "0.weight",
        Rule(role="matrix", view=View()),
    ),
    "the view 'linear' is not the one that Conv2d multiplies with": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)),
        "0.weight",
        View(),
    ),
}


@pytest.mark.parametrize("reason", UNSEEN)
def test_hooks_that_would_show_nothing_or_the_wrong_thing_say_why(reason):
    build, name, override = UNSEEN[reason]
    reader = reader_of(build(), name, overrides={name: override} if override else None)
    assert (reader.unseen, reader.feeds) == (reason, ())


def test_without_a_module_there_is_nothing_to_hook():
    model = nn.Sequential(nn.Linear(3, 4))
    rows = [route(model, overrides={"0.weight": "matrix"}).row("0.weight")]
    (reader,) = find_readers(rows, InputMoment(structure="full", hooks=False))
    assert (reader.unseen, reader.feeds) == ("no module is known for it", ())
