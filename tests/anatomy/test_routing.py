"""Wrappers, sharding, overrides, and everything that routing refuses."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from steepest.anatomy import LINEAR, Rule, View, route
from tests.anatomy.routed import LanguageModel


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def rows(plan):
    return [(row.name, row.shape, row.role, str(row.view), row.reason) for row in plan]


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_blocks(model):
    for number, block in enumerate(model.blocks):
        model.blocks[number] = compiled(block)
    return model


def checkpointed_blocks(model):
    for number, block in enumerate(model.blocks):
        model.blocks[number] = checkpoint_wrapper(block)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        compiled,
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        compiled_blocks,
        checkpointed_blocks,
        lambda model: nn.DataParallel(compiled(checkpointed_blocks(model))),
    ],
)
def test_wrappers_do_not_change_the_plan(wrap, tied):
    model = LanguageModel(tied=tied)
    assert rows(route(wrap(copy.deepcopy(model)))) == rows(route(model))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_without_memory_has_the_same_plan(tied):
    with torch.device("meta"):
        model = LanguageModel(tied=tied)
    assert rows(route(model)) == rows(route(LanguageModel(tied=tied)))


def test_a_submodule_that_is_called_module_keeps_its_name():
    outer = nn.Module()
    outer.module = nn.Linear(3, 4)
    assert [row.name for row in route(outer)] == ["module.weight", "module.bias"]


@pytest.mark.parametrize("tied", [False, True])
def test_ddp_and_fsdp_do_not_change_the_plan(one_rank, tied):
    plain = LanguageModel(tied=tied)
    expected = rows(route(plain))
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    assert rows(route(wrapped)) == expected
    mesh = init_device_mesh("cpu", (1,))
    for block in plain.blocks:
        for part in (block.up, block):
            fully_shard(part, mesh=mesh)
    fully_shard(plain, mesh=mesh)
    plan = route(plain)
    assert rows(plan) == expected
    assert all(isinstance(parameter, torch.distributed.tensor.DTensor) for parameter in plan.parameters())


def test_ddp_around_submodules_does_not_change_the_plan(one_rank):
    layers = [nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)), nn.Linear(6, 4)]
    expected = [(row.shape, row.role) for row in route(nn.ModuleList(layers))]
    found = route(nn.ModuleList(map(nn.parallel.DistributedDataParallel, layers)))
    assert [(row.shape, row.role) for row in found] == expected


def test_parameters_of_zero_3_keep_their_full_shape():
    layer = nn.Linear(6, 4, bias=False)
    layer.weight.data = torch.empty(0)
    layer.weight.ds_shape = torch.Size((4, 6))
    row = route(layer).row("weight")
    assert (row.shape, row.role) == ((4, 6), "matrix")


def test_frozen_parameters_are_listed_and_not_handed_out():
    model = LanguageModel()
    model.tokens.requires_grad_(False)
    plan = route(model)
    assert not plan.row("tokens.weight").trainable
    assert "frozen; lookup table" in str(plan)
    assert len(plan.parameters("embedding")) == 1
    assert plan.counts()["embedding"] == 2
    assert len(plan.parameters()) == len(plan) - 1


def test_lazy_parameters_are_refused():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=re.escape("Parameters without a shape yet: 0.weight, 0.bias. Send one batch")):
        route(model)


def test_flattened_shards_are_refused():
    class FlatParameter(nn.Parameter):
        pass

    model = nn.Module()
    model._flat_param = FlatParameter(torch.zeros(12))
    with pytest.raises(ValueError, match=re.escape("_flat_param with shape (12,) is a flattened FSDP1 shard")):
        route(model)
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(torch.zeros(12))
    with pytest.raises(ValueError, match=re.escape("weight is the weight of a Linear but has shape (12,). Route the")):
        route(layer)


def test_a_view_that_does_not_fit_its_module_names_the_parameter():
    layer = nn.MultiheadAttention(8, 2)
    layer.in_proj_weight = nn.Parameter(torch.zeros(20, 8))  # somebody else's layout
    with pytest.raises(ValueError, match=r"in_proj_weight: View 'split=8\+8\+8' does not fit shape \(20, 8\)"):
        route(layer)


def test_only_models_are_routed():
    with pytest.raises(
        TypeError, match=r"route takes a torch.nn.Module, got list. Pass the model, not its parameters."
    ):
        route(list(nn.Linear(2, 2).parameters()))


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.mixing = nn.Parameter(torch.zeros(8, 12))
        self.kernel = nn.Parameter(torch.zeros(2, 3, 4))


def test_what_nobody_understands_is_a_vector_and_counted():
    plan = route(Custom())
    assert [row.name for row in plan.unknown] == ["mixing", "kernel"]
    assert plan.row("kernel").role == "vector"
    assert plan.row("kernel").reason == "unknown: 3-D parameter of Custom, whose layout is not known"
    assert "2 unknown" in str(plan)


def test_strict_lists_all_unknown_parameters():
    message = (
        "2 parameters are of unknown layout:\n"
        "  mixing (8, 12): 2-D parameter of Custom, whose layout is not known\n"
        "  kernel (2, 3, 4): 3-D parameter of Custom, whose layout is not known\n"
        "Say what they are, for example overrides={'mixing': 'vector'} or a View, or pass strict=False"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        route(Custom(), strict=True)
    frozen = Custom()
    frozen.mixing.requires_grad_(False)
    frozen.kernel.requires_grad_(False)
    assert len(route(frozen, strict=True).unknown) == 2


def test_overrides_set_role_and_view():
    overrides = {
        "mix*": View(split=(4, 4)),
        "kernel": Rule(role="matrix", view=View(experts=True, transposed=True)),
        "first.*": "vector",
        "first.weight": "head",
    }
    plan = route(Custom(), overrides=overrides, strict=True)
    assert plan.row("mixing").blocks() == ((1, 4, 12), (1, 4, 12))
    assert plan.row("mixing").reason == "override 'mix*'"
    assert plan.row("kernel").blocks() == ((2, 4, 3),)
    assert plan.row("first.bias").role == "vector"
    assert (plan.row("first.weight").role, plan.row("first.weight").view) == ("head", LINEAR)


def test_an_exact_name_wins_then_the_later_pattern():
    assert role_after({"weight": "vector", "*": "matrix", "w*": "head"}) == "vector"
    assert role_after({"*": "matrix", "w*": "head"}) == "head"
    assert role_after({"w*": "head", "*": "matrix"}) == "matrix"
    model = nn.Module()
    model.register_parameter("w[0]", nn.Parameter(torch.zeros(2, 2)))  # a name that is no pattern of itself
    assert route(model, overrides={"w[0]": "matrix"})[0].role == "matrix"


def role_after(overrides):
    return route(nn.Linear(4, 4, bias=False), overrides=overrides).row("weight").role


def test_a_rule_keeps_what_it_does_not_set():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    plan = route(model, overrides={"0.in_proj_weight": Rule(role="matrix"), "1.weight": Rule(view=View(heads=2))})
    assert plan.row("0.in_proj_weight").view == View(split=(8, 8, 8))
    assert plan.row("1.weight").blocks() == ((2, 4, 8),)


def test_an_override_reaches_a_tied_parameter_by_any_name():
    plan = route(LanguageModel(tied=True), overrides={"head.weight": Rule(role="head", view=LINEAR)})
    assert (plan.row("tokens.weight").role, plan.row("tokens.weight").view) == ("head", LINEAR)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"first.wieght": "vector"}, ValueError, "'first.wieght' matches no parameter. Did you mean 'first.weight'?"),
        ({"zzz": "vector"}, ValueError, "'zzz' matches no parameter. The model has mixing, kernel, first.weight"),
        ({"kernel": "matrx"}, ValueError, "asks for the role 'matrx'. Roles are matrix, embedding, head, vector."),
        ({"kernel": "matrx"}, ValueError, "Did you mean 'matrix'?"),
        ({"kernel": 3}, TypeError, "The override 'kernel' must be a role, a View or a Rule, got 3."),
        ({"f*": View(split=(3, 4))}, ValueError, "The override 'f*' for first.weight: View 'split=3+4' does not fit"),
        ({"first.bias": "matrix"}, ValueError, "for first.bias: View 'linear' does not fit shape (8,)"),
        ({"kernel": Rule("vector", LINEAR)}, ValueError, "gives a vector the view 'linear'. Leave out one of them."),
    ],
)
def test_overrides_that_cannot_be_meant_are_refused(overrides, error, message):
    with pytest.raises(error, match=re.escape(message)):
        route(Custom(), overrides=overrides)
