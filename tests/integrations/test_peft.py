"""Adapters of PEFT, the real ones: which matrices they are, and LoRA+."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer as of_peft

import steepest
from steepest.integrations.peft import create_loraplus_optimizer
from tests.integrations.tiny import batches, llama, loss_of, texts

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
RATES = {"lr": 0.01, "loraplus_lr_ratio": 16.0, "loraplus_weight_decay": 0.1}


def adapted(**options):
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options)
    return get_peft_model(llama(), config).train()


def trained(model, optimizer, steps=4):
    for batch in batches(texts())[:steps]:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_and_b_of_an_adapter_are_matrices_of_their_own_and_nothing_else_moves_or_keeps_state():
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = steepest.Muon(model, lr=0.02)
    moving = [row for row in optimizer.plan if row.trainable]
    assert {row.role for row in moving} == {"matrix"}
    assert sorted({row.blocks()[0] for row in moving}) == [(1, 2, 16), (1, 2, 40), (1, 16, 2)]
    after = trained(model, optimizer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {row.name for row in moving} == {name for name in before if "lora_" in name}
    assert {id(p) for p in optimizer.state if optimizer.state[p]} == {id(row.parameter) for row in moving}


def test_row_loraplus_of_peft_takes_a_recipe_and_ours_knows_the_model_besides():
    model, other = adapted(), adapted()
    with pytest.warns(UserWarning, match="groups with and without weight decay"):
        bare = of_peft(model, steepest.Muon, **RATES)
    ours = create_loraplus_optimizer(other, steepest.Muon, **RATES)
    rates = {row.name.split(".lora_")[1][0]: row.lr for row in ours.plan}
    assert rates == pytest.approx({"A": 0.01, "B": 0.16})
    assert {group["weight_decay"] for group in ours.param_groups} == {0.1}
    assert not any(row.name.startswith("parameter group") for row in ours.plan)
    one, two = trained(model, bare), trained(other, ours)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_loraplus_gives_what_is_trained_besides_adapters_the_role_that_it_has():
    model = adapted(modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match="taken for matrices"):
        assert {row.role for row in of_peft(model, steepest.Muon, **RATES).plan} == {"matrix"}
    optimizer = create_loraplus_optimizer(model, steepest.Muon, **RATES)
    optimizer.plan.assert_counts(matrix=8, head=1)
    assert [group["name"] for group in optimizer.param_groups] == ["matrix", "head", "matrix 2"]
    assert trained(model, optimizer)


def test_adapters_that_come_after_the_optimizer_are_told_of_and_can_be_added():
    model = llama().train()
    optimizer = steepest.Muon(model, lr=0.02)
    config = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(model, config)
    with pytest.warns(UserWarning, match=r"will never be trained: 'model\.layers\.0\.self_attn\.q_proj\.lora_A"):
        trained(model, optimizer, 1)
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.lora_B["default"].weight.detach().clone()
    optimizer.add_module(layer)
    trained(model, optimizer)
    assert not torch.equal(layer.lora_B["default"].weight, before)
