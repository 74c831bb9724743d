import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from steepest.anatomy import route
from steepest.lab import methods
from steepest.lab.methods import (
    DERIVED,
    METHODS,
    CombinedOptimizer,
    build_optimizer,
    check_buildable,
    check_options,
    options_of,
    plain_options,
    resolve,
)
from steepest.lab.methods.tuned import TUNED, Tuned, Tuning
from steepest.lab.models.gpt import GPT, GPTConfig
from steepest.lab.tasks import TASKS, make_task, presets_of
from steepest.optim.recipes import RECIPES, SHAMPOO_RATIOS, SignDescent
from tests.cases import cases


def model_and_loss(rng: torch.Generator):
    model = GPT(GPTConfig(vocabulary=13, layers=2, width=16, head_size=8))
    tokens = torch.randint(13, (4, 9), generator=rng)

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return model, loss


@pytest.mark.slow
@cases("method", METHODS)
def test_every_method_lowers_the_loss_with_its_own_defaults(method, rng):
    model, loss = model_and_loss(rng)
    optimizer = build_optimizer(method, model, options_of(method))
    first = loss().item()

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.item()

    for _ in range(15):
        optimizer.step(closure)
    own = method.removesuffix("-momo") in DERIVED  # the recipe's default rate is for longer runs
    assert loss().item() < (1.0 if own else 0.8) * first


@cases("method", METHODS)
def test_every_parameter_is_in_exactly_one_group_with_its_learning_rate(method, rng):
    model, _ = model_and_loss(rng)
    optimizer = build_optimizer(method, model, {"lr": 0.25})
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(rates)
    inside = {id(p) for name, p in model.named_parameters() if name.startswith("blocks") and p.ndim == 2}
    other = options_of(method).get("other_lr", 0.25)
    rest = dict.fromkeys(SHAMPOO_RATIOS, other)
    if method.startswith("shampoo-muon"):
        rest = {role: 0.25 * ratio for role, ratio in SHAMPOO_RATIOS.items()}
    if "radius" in options_of(method):  # the rate is the part of the way to a ball's edge
        rates = {key: rate / (3000 if rate > 100 else 50) for key, rate in rates.items()}
    roles = {id(row.parameter): row.role for row in route(model)}
    assert rates == {id(p): 0.25 if id(p) in inside else rest[roles[id(p)]] for p in model.parameters()}


@cases("method", ["adamw", "muon", "parts"])
def test_tables_and_vectors_have_the_rates_that_are_asked_for(method, rng):
    model, _ = model_and_loss(rng)
    given = {"lr": 0.25, "other_lr": 0.1, "table_lr": 0.5, "vector_ratio": 2.0}
    optimizer = build_optimizer(method, model, given)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    wanted = {"matrix": 0.25, "embedding": 0.5, "head": 0.1, "vector": 0.2}
    assert rates == {id(row.parameter): pytest.approx(wanted[row.role]) for row in route(model)}
    with pytest.raises(ValueError, match="vector_ratio must be finite"):
        build_optimizer(method, model, {"vector_ratio": -1.0})


def test_every_recipe_is_a_method_with_its_own_rates_if_no_row_says_otherwise():
    assert options_of("sign-descent") == plain_options(SignDescent)
    momos = options_of("sign-descent-momo").keys() - plain_options(SignDescent).keys()
    assert momos == {"lower_bound", "estimate_bound", "dual"}
    assert options_of("pethick-scion")["radius"] == 50
    assert {"newton-muon-max", "newton-muon-max-momo", "pethick-scion-momo"} <= METHODS.keys()
    built = {type(build_optimizer(method, model_and_loss(torch.Generator())[0], {})) for method in METHODS}
    assert set(RECIPES.values()) <= built


def test_steepest_adam_is_adamw(rng):
    updates = []
    for method in ("adam", "adamw"):
        torch.manual_seed(0)
        model, loss = model_and_loss(torch.Generator().manual_seed(1))
        optimizer = build_optimizer(method, model, {"lr": 0.01, "other_lr": 0.02})
        for _ in range(3):
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
        updates.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(*updates, rtol=1e-4, atol=1e-5)


def test_the_four_variants_of_muon_differ_as_their_names_say():
    names = ("muon", "muon-plain", "muon-wd", "muon-plain-wd")
    variants = {(options_of(name)["nesterov"], options_of(name)["weight_decay"]) for name in names}
    assert variants == {(True, 0.0), (False, 0.0), (True, 0.1), (False, 0.1)}


def test_what_is_asked_for_comes_before_what_was_tuned_before_the_default(monkeypatch):
    record = Tuning(trials=6, source="results/tuning.json", edge=False)
    table = {("text", "demo"): {"muon": Tuned({"lr": 0.5}, record)}}
    monkeypatch.setattr(methods, "TUNED", table)
    tuned = resolve("muon", task="text", preset="demo", options={})
    assert tuned.options == {**options_of("muon"), "lr": 0.5}
    assert tuned.tuning == record
    assert resolve("muon", task="text", preset="demo", options={"lr": 0.5}).tuning == record
    asked = resolve("muon", task="text", preset="demo", options={"momentum": 0.5})
    assert asked.options == {**options_of("muon"), "lr": 0.5, "momentum": 0.5}
    assert asked.tuning is None  # nobody searched around this momentum


def test_other_presets_take_the_options_of_demo_and_other_tasks_do_not(monkeypatch):
    record = Tuning(trials=6, source="results/tuning.json", edge=False)
    table = {("text", "demo"): {"muon": Tuned({"lr": 0.5}, record)}, ("text", "small"): {"muon": Tuned({}, record)}}
    monkeypatch.setattr(methods, "TUNED", table)
    for options, lr in (({}, 0.5), ({"lr": 0.25}, 0.25), ({"lr": 0.5}, 0.5)):
        tiny = resolve("muon", task="text", preset="tiny", options=options)
        assert tiny.options == {**options_of("muon"), "lr": lr}
        assert tiny.tuning is None  # nobody searched at this size
    searched = resolve("muon", task="text", preset="small", options={})
    assert (searched.options, searched.tuning) == (options_of("muon"), record)
    for method, task in (("muon", "digits"), ("adamw", "text")):
        plain = resolve(method, task=task, preset="tiny", options={})
        assert (plain.options, plain.tuning) == (options_of(method), None)


@pytest.mark.slow
def test_every_entry_of_the_table_is_valid():
    assert TUNED
    for (task, preset), entries in TUNED.items():
        assert task in TASKS
        assert preset in presets_of(task)
        for method, entry in entries.items():
            assert check_options(method, entry.options).keys() == entry.options.keys()


def test_whole_numbers_become_floats_where_floats_are_meant():
    options = resolve("adamw", task="text", preset="demo", options={"lr": 1}).options
    assert type(options["lr"]) is float


def test_unknown_names_are_answered_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"Unknown method 'adanw': did you mean 'adamw'\? Valid: adam, adamw, muon"):
        options_of("adanw")
    with pytest.raises(ValueError, match="Unknown option of the method 'sgd' 'momentun': did you mean 'momentum'"):
        check_options("sgd", {"momentun": 0.9})


@pytest.mark.parametrize(
    ("name", "value", "kind"), [("lr", "big", "float"), ("lr", True, "float"), ("nesterov", 1, "bool")]
)
def test_a_value_of_the_wrong_type_is_refused(name, value, kind):
    with pytest.raises(TypeError, match=f"option '{name}' of the method 'muon' takes a {kind}, got {value!r}"):
        check_options("muon", {name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
def test_a_number_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match=f"option 'lr' of the method 'muon' takes a finite number, got {value!r}"):
        check_options("muon", {"lr": value})


def test_what_cannot_be_built_is_found_out_beforehand():
    task = make_task("digits")
    check_buildable("muon", task, {})
    with pytest.raises(ValueError, match="'torch-muon' takes 2-D matrices only"):
        check_buildable("torch-muon", task, {})
    with pytest.raises(ValueError, match="lr must be finite and at least 0, got -1"):
        check_buildable("muon", task, {"lr": -1})
    with pytest.raises(TypeError, match="takes a float, got 'big'"):
        check_buildable("muon", task, {"lr": "big"})


def test_torch_muon_refuses_convolutions_by_name():
    model = make_task("digits").build_model(0)
    with pytest.raises(ValueError, match=r"2-D matrices only, features.0.weight is \(32, 1, 3, 3\). Use 'muon'"):
        build_optimizer("torch-muon", model, {})


def twins() -> tuple[nn.Linear, nn.Linear]:
    one, two = nn.Linear(4, 3), nn.Linear(4, 3)
    two.load_state_dict(one.state_dict())
    return one, two


def combine(model: nn.Linear) -> CombinedOptimizer:
    return CombinedOptimizer(SGD([model.weight], lr=0.1, momentum=0.9), AdamW([model.bias], lr=0.01))


def train(model: nn.Module, optimizers, schedulers, rng: torch.Generator, steps: int) -> None:
    for _ in range(steps):
        model(torch.randn(5, 4, generator=rng)).square().sum().backward()
        for part in (*optimizers, *schedulers):
            part.step()
        for part in optimizers:
            part.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [lambda o: CosineAnnealingLR(o, 10), lambda o: LambdaLR(o, lambda t: 1 / (1 + t))])
def test_it_is_its_parts_one_after_the_other(schedule):
    one, two = twins()
    whole = combine(one)
    parts = [SGD([two.weight], lr=0.1, momentum=0.9), AdamW([two.bias], lr=0.01)]
    train(one, [whole], [schedule(whole)], torch.Generator().manual_seed(1), 6)
    train(two, parts, [schedule(part) for part in parts], torch.Generator().manual_seed(1), 6)
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.bias, two.bias)


def test_a_restored_one_goes_on_exactly(rng):
    one, two = twins()
    first, second = combine(one), combine(two)
    train(one, [first], [scheduler := LambdaLR(first, lambda t: 0.9**t)], rng, 3)
    two.load_state_dict(one.state_dict())
    restored = LambdaLR(second, lambda t: 0.9**t)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch would share the tensors
    restored.load_state_dict(scheduler.state_dict())
    train(one, [first], [scheduler], torch.Generator().manual_seed(2), 3)
    train(two, [second], [restored], torch.Generator().manual_seed(2), 3)
    assert torch.equal(one.weight, two.weight)
    assert [g["lr"] for g in second.param_groups] == pytest.approx([0.1 * 0.9**6, 0.01 * 0.9**6])
    assert second.parts[1].param_groups[0] is second.param_groups[1]


def test_a_closure_runs_once_with_gradients():
    model, _ = twins()
    optimizer = combine(model)
    calls: list[float] = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 4)).square().sum()
        loss.backward()
        calls.append(loss.item())
        return calls[-1]

    before = model.bias.detach().clone()
    assert optimizer.step(closure) == calls[0]
    assert len(calls) == 1
    assert not torch.equal(model.bias, before)


def test_a_state_of_other_parts_is_refused():
    optimizer = combine(nn.Linear(2, 2))
    state = {"parts": optimizer.state_dict()["parts"][:1]}
    with pytest.raises(ValueError, match="The state is of 1 optimizers, this one combines 2"):
        optimizer.load_state_dict(state)
