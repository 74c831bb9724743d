"""NoiseScale in loops of one process: what it records is what torch.autograd.grad says, whatever the loop does."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import steepest
from steepest.batch_size.estimators import alignment, euclidean, l1, nested_sizes, nuclear
from steepest.batch_size.noise import NoiseScale
from tests.batch_size.noisy_loops import (
    ALL,
    MICRO,
    PER,
    STEPS,
    loss_of,
    mean_gradients,
    measured,
    network,
    sgd,
    train,
    train_step,
    values,
)
from tests.cases import cases

F64 = torch.float64


def test_every_number_is_the_estimators_of_the_micro_batches():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=ALL)
    samples = torch.full((MICRO,), float(PER), dtype=F64)
    expected = []
    for step in range(3):
        gradients = mean_gradients(model, step)
        train_step(model, optimizer, step)
        rows = []
        for name, p in model.named_parameters():
            g = gradients.get(name, torch.zeros(MICRO, *p.shape, dtype=F64))
            matrix = name.endswith("weight") and "table" not in name
            parts = nuclear(g, samples) if matrix else [torch.zeros((), dtype=F64)] * 4
            aligned = alignment(g, samples, lambda x: x / norm(x), nested_sizes(MICRO))
            rows.append(torch.stack([*euclidean(g, samples), *l1(g, samples), *parts, *aligned]))
        expected.append(torch.stack(rows))
    order = [layer.name for layer in noise._layers]
    places = [order.index(name) for name, _ in model.named_parameters()]
    torch.testing.assert_close(values(noise)[:, places], torch.stack(expected), rtol=1e-9, atol=1e-15)


def norm(x):
    length = x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
    return torch.where(length == 0, 1.0, length)


def clip(model):
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


@cases(
    "options",
    [
        {"divide": 1, "losses": "whole", "factor": 1.0},
        {"losses": "weighted"},
        {"factor": 1024.0, "scale": 1024.0},
        {"factor": 1024.0, "scale": lambda: 1024.0},
        {"to_none": False},
        {"store": "cpu"},
        {"samples": None, "told": True},
    ],
)
def test_how_losses_are_scaled_and_gradients_kept_changes_nothing(options):
    if options.pop("losses", "") == "whole":
        model = network()  # the step is the same if the learning rate is a quarter
        optimizer = sgd(model, 0.05 / MICRO)
        noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=ALL, losses="whole")
        train(model, optimizer, divide=1)
    elif "told" in options:
        model = network()
        optimizer = sgd(model)
        noise = NoiseScale(model, optimizer, every=1, kinds=ALL)
        for step in range(STEPS):
            for index in range(MICRO):
                noise.micro_batch(PER)
                (loss_of(model, step, index) / MICRO).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert noise.read().unit == "samples"
    elif "factor" in options:
        model = network()
        optimizer = sgd(model, 0.05 / 1024)
        noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=ALL, scale=options["scale"])
        train(model, optimizer, factor=1024.0)
    else:
        noise = measured(**options)
    torch.testing.assert_close(values(noise), values(measured()), rtol=1e-9, atol=1e-15)


def test_clipping_is_not_seen():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, samples=PER)
    train(model, optimizer, steps=1, after=lambda: clip(model))
    torch.testing.assert_close(values(noise), values(measured(kinds=("euclidean", "alignment")))[:1])


def test_a_common_factor_changes_no_scale():
    plain, unscaled = measured(), measured(scale=1 / 8.0)  # exact in every type
    for one, other in zip(plain.read().scales, unscaled.read().scales, strict=True):
        assert other.ratio.value == pytest.approx(one.ratio.value, rel=1e-9, nan_ok=True)
    for one, other in zip(plain.read().curves, unscaled.read().curves, strict=True):
        assert other.ratio.value == pytest.approx(one.ratio.value, rel=1e-9, nan_ok=True)
        assert other.values == pytest.approx([8 * value for value in one.values])


def test_measuring_changes_no_weight_and_leaves_no_hook():
    plain, watched = network(), network()
    optimizer = sgd(watched)
    with NoiseScale(watched, optimizer, every=2, kinds=ALL) as noise:
        train(watched, optimizer)
    train(plain, sgd(plain))
    assert noise.read().measurements == 2
    loss_of(watched, 0, 0).backward()
    assert len(noise._record) == 0
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_steps_in_between_have_no_hooks():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=3)
    seen = []
    for step in range(6):
        seen.append((noise.measuring, len(noise._record._handles)))
        train_step(model, optimizer, step)
    assert seen == [(False, 0), (False, 0), (True, 6)] * 2
    assert [record.step for record in noise._records] == [2, 5]


def test_batches_may_be_split_on_measured_steps_only():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=2, samples=PER)
    for step in range(4):
        pieces = MICRO if noise.measuring else 1
        for index in range(pieces):
            (loss_of(model, step, index) / pieces).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = noise.read()
    assert (report.measurements, report.batch) == (2, MICRO * PER)


@pytest.mark.parametrize("before", [0, 2])
def test_closures_are_measured_like_loops(before):
    """The last micro-batches, or all, run inside of step()."""
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=ALL)
    for step in range(STEPS):
        optimizer.zero_grad()
        for index in range(before):
            (loss_of(model, step, index) / MICRO).backward()

        def closure(step=step):
            losses = [loss_of(model, step, index) / MICRO for index in range(before, MICRO)]
            for loss in losses:
                loss.backward()
            return sum(losses)

        optimizer.step(closure)
    torch.testing.assert_close(values(noise), values(measured()), rtol=1e-9, atol=1e-15)


def test_adaptive_norms_use_the_second_moments_of_before_the_step():
    found = []
    for closure in (False, True):
        model = network()
        optimizer = steepest.Adam(model, lr=0.01)
        noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=("alignment",))
        for step in range(3):

            def backward(step=step, model=model):
                for index in range(MICRO):
                    (loss_of(model, step, index) / MICRO).backward()
                return 0.0

            if closure:
                optimizer.step(backward)
            else:
                backward()
                optimizer.step()
            optimizer.zero_grad()
        found.append(values(noise))
    torch.testing.assert_close(found[0], found[1])
    first = found[0][0, [layer.name for layer in noise._layers].index("down.weight")]
    gradients = mean_gradients(network(), 0)["down.weight"]
    samples = torch.full((MICRO,), float(PER), dtype=F64)
    torch.testing.assert_close(
        first, alignment(gradients, samples, torch.sign, nested_sizes(MICRO)), rtol=1e-4, atol=1e-9
    )  # without a past, Adam's step is the sign but for eps
    # given the past, the direction g / (√V + eps) is linear in the gradient: all sizes estimate the same
    state = steepest.Adam(model := network(), lr=0.01)
    for step in range(2):
        train_step(model, state, step)
    moment = state.state[model.down.weight]["second_moment"]
    weight = 1 - state.param_groups[0]["beta2"] ** 2
    gradients = mean_gradients(model, 2)["down.weight"]
    linear = alignment(gradients, samples, lambda g: g / ((moment / weight).sqrt() + 1e-8), nested_sizes(MICRO))
    place = [layer.name for layer in noise._layers].index("down.weight")
    torch.testing.assert_close(found[0][2, place], linear, rtol=1e-4, atol=1e-12)


def test_muon_is_measured_in_its_groups_norms():
    model = network()
    optimizer = steepest.Muon(model, lr=0.02, polar="svd", scale="none")
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=("nuclear", "alignment"))
    gradients = mean_gradients(model, 0)["up.weight"]
    train_step(model, optimizer, 0)
    names = [layer.name for layer in noise._layers]
    row = values(noise)[0, names.index("up.weight")]
    samples = torch.full((MICRO,), float(PER), dtype=F64)
    torch.testing.assert_close(row[:4], torch.stack(list(nuclear(gradients, samples))), rtol=1e-9, atol=0)
    expected = alignment(gradients, samples, lambda g: steepest.polar(g, method="svd"), nested_sizes(MICRO))
    torch.testing.assert_close(row[4:], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(row[2], row[-1])  # leave one out is the crossed signal
    weights = dict(zip(names, noise._records[0].weights.tolist(), strict=True))
    rates = {name: g["lr"] for g in optimizer.param_groups for name in g["param_names"]}
    assert weights == pytest.approx({name: rate / max(rates.values()) for name, rate in rates.items()})


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_torchs_adam_is_sign_descent(name):
    model = network()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=("l1", "alignment"))
    train_step(model, optimizer, 0)
    torch.testing.assert_close(values(noise)[0, :, 2], values(noise)[0, :, -1])


def test_an_unknown_optimizer_takes_a_norm():
    model = network()
    optimizer = torch.optim.Rprop(model.parameters())
    with pytest.raises(ValueError, match="in which norm Rprop descends is not known"):
        NoiseScale(model, optimizer)
    noise = NoiseScale(model, optimizer, norm="sign", every=1)
    train_step(model, optimizer, 0)
    assert noise.read().curve().batches == (1.0, 2.0, 3.0)


def test_convolutions_and_fused_weights_are_seen_as_matrices():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.Flatten(), nn.Linear(8 * 4, 5)).double()
    optimizer = steepest.Muon(model, lr=0.01)
    noise = NoiseScale(model, optimizer, every=1, kinds=("nuclear",))
    xs = torch.randn(3, 2, 3, 4, 4, dtype=F64)
    stacked = torch.stack([torch.autograd.grad(model(x).square().mean(), model[0].weight)[0] for x in xs])
    for x in xs:
        (model(x).square().mean() / 3).backward()
    optimizer.step()
    expected = nuclear(stacked.flatten(2), torch.ones(3, dtype=F64))
    names = [layer.name for layer in noise._layers]
    torch.testing.assert_close(values(noise)[0, names.index("0.weight")], torch.stack(list(expected)))


def test_gradients_that_are_not_finite_are_counted_and_the_next_step_is_measured():
    model = network()
    optimizer = sgd(model, lr=0.0)
    noise = NoiseScale(model, optimizer, every=2, kinds=ALL)
    for step in range(5):
        for index in range(MICRO):
            (loss_of(model, step, index) * (math.nan if (step, index) == (1, 2) else 1.0)).backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.nan_to_num_()  # so that weights survive; what is recorded came before
        optimizer.step()
        optimizer.zero_grad()
    assert [record.step for record in noise._records] == [2, 3]
    assert noise.read().discarded == 1
    assert "1 not finite" in str(noise.read())


def test_thrown_away_gradients_are_not_counted():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=ALL)
    for index in range(3):
        loss_of(model, 9, index).backward()  # and then no step, as a GradScaler decides
    optimizer.zero_grad()
    train(model, optimizer)
    torch.testing.assert_close(values(noise), values(measured()), rtol=1e-9, atol=1e-15)


def test_gradients_set_to_zero_are_forgotten_by_hand():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=ALL)
    for index in range(3):
        loss_of(model, 9, index).backward()
    optimizer.zero_grad(set_to_none=False)
    noise.forget()
    train(model, optimizer)
    torch.testing.assert_close(values(noise), values(measured()), rtol=1e-9, atol=1e-15)


def test_what_was_frozen_when_hooks_were_set_is_measured_one_step_later():
    model = network()
    optimizer = sgd(model)
    model.up.weight.requires_grad_(False)
    noise = NoiseScale(model, optimizer, every=1)
    model.up.weight.requires_grad_(True)
    train(model, optimizer, steps=2)
    assert [record.step for record in noise._records] == [1]
    assert noise.read().scale("euclidean", "up.weight").noise > 0


def test_unequal_micro_batches_are_weighed():
    model, sizes = nn.Linear(3, 1, bias=False).double(), (1, 2, 5)
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, losses="weighted", unit="sequences")
    data = [torch.randn(size, 3, dtype=F64) for size in sizes]
    stacked = torch.stack([torch.autograd.grad(model(x).square().mean(), model.weight)[0] for x in data])
    for x in data:
        (model(x).square().sum() / sum(sizes)).backward()
        noise.micro_batch(len(x))
    optimizer.step()
    expected = euclidean(stacked, torch.tensor(sizes, dtype=F64))
    torch.testing.assert_close(values(noise)[0, 0, :2], torch.stack(list(expected)))
    assert noise.read().batch == 8
    assert noise.read().unit == "sequences"


@cases(
    "options, message",
    [
        ({"every": 0}, "NoiseScale: every must be at least 1, got 0"),
        ({"every": 2.5}, "every must be a whole number, got 2.5"),
        ({"level": 1.0}, r"level must be in \(0, 1\), got 1.0"),
        ({"samples": 0}, "samples must be finite and above 0, got 0"),
        ({"losses": "hole"}, "did you mean 'whole'"),
        ({"store": "gpu"}, "NoiseScale: Unknown store 'gpu'"),
        ({"polar": "svdd"}, "did you mean 'svd'"),
        ({"kinds": ("euclidian",)}, "did you mean 'euclidean'"),
        ({"kinds": ()}, "kinds is empty"),
        (
            {"kinds": "euclidean"},
            r"NoiseScale: kinds must be a list of .*, got 'euclidean'\. Write kinds=\('euclidean',\)",
        ),
        ({"kinds": None}, "NoiseScale: kinds must be a list of some of .*, got None"),
        ({"kinds": [1]}, r"NoiseScale: kinds must be a list of some of .*, got \[1\]"),
        ({"kinds": ("l1", "l1")}, r"each once, got \('l1', 'l1'\)"),
        ({"scale": 0}, "NoiseScale: scale must be finite and above 0, got 0"),
        ({"scale": -1.0}, "NoiseScale: scale must be finite and above 0, got -1.0"),
        ({"scale": float("nan")}, "NoiseScale: scale must be finite and above 0, got nan"),
        ({"scale": "2"}, r"NoiseScale: scale must be a number, got '2'\. Write scale=2.0, without quotes"),
        ({"process_group": 3}, r"NoiseScale: process_group must be a process group, as .*new_group\(\) .*, got 3"),
        ({"norm": "spectral"}, "is one of matrices, but 'gain' of shape"),
    ],
)
def test_options_are_checked(options, message):
    model = network()
    with pytest.raises((ValueError, TypeError), match=message):
        NoiseScale(model, sgd(model), **options)


@cases("value", [0, -1.0, float("nan"), "2", None, torch.ones(2)])
def test_what_a_function_says_of_the_scale_is_checked_when_it_is_asked(value):
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, scale=lambda: value)
    with pytest.raises((ValueError, TypeError), match=r"NoiseScale: what scale\(\) returns must be "):
        train(model, optimizer, steps=1)
    noise.close()


def test_a_function_may_return_the_tensor_that_a_scaler_keeps():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, scale=lambda: torch.tensor([1.0]))
    train(model, optimizer, steps=1)
    assert noise.read().measurements == 1
    noise.close()


@cases("kind", ["two", "meta", "array", "in a list"])
@cases("key", ["format", "samples", "layers", "kinds", "unit"])
def test_a_saved_option_that_is_a_tensor_is_refused_by_name(key, kind):
    tensors = {"two": torch.ones(2), "meta": torch.tensor(1.0, device="meta"), "array": np.ones(2)}
    model = network()
    noise = NoiseScale(model, sgd(model))
    state = noise.state_dict()
    tensors["in a list"] = [np.ones(2)] * len(state[key] if isinstance(state[key], list) else "x")
    with pytest.raises(ValueError, match=f"The saved noise scale has {key}="):
        noise.load_state_dict({**state, key: tensors[kind]})
    noise.close()


@pytest.mark.parametrize("key", ["values", "weights"])
def test_a_saved_measurement_without_numbers_is_refused_by_name(key):
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1)
    train(model, optimizer, steps=1)
    state = noise.state_dict()
    state["records"][0][key] = state["records"][0][key].to("meta")
    with pytest.raises(ValueError, match=f"Measurement 0 of the saved noise scale: {key} is on the meta device"):
        noise.load_state_dict(state)
    noise.close()


def test_what_cannot_be_measured_says_so():
    model, other, table = network(), nn.Linear(2, 2, bias=False), nn.Embedding(3, 2)
    with pytest.raises(ValueError, match=r"shape \(2, 2\) that is not in the model"):
        NoiseScale(model, sgd(other))
    with pytest.raises(ValueError, match="has none: embeddings, heads and vectors do not count"):
        NoiseScale(table, sgd(table), kinds=("nuclear",))
    optimizer = sgd(other)
    noise = NoiseScale(other, optimizer, every=1)
    with pytest.raises(ValueError, match="Nothing was measured in 0 steps"):
        noise.read()
    with pytest.raises(ValueError, match="last must be at least 1"):
        noise.read(last=0)
    with pytest.raises(ValueError, match="samples must be finite and above 0, got -1"):
        noise.micro_batch(-1)
    other(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match=r"saw 1 micro-batch on one rank.*split the batch"):
        optimizer.step()
    noise.micro_batch(3)
    other(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match="micro_batch was called 1 times in a step with 2 calls of backward"):
        optimizer.step()
    noise.close()
    sparse = nn.Embedding(4, 2, sparse=True)
    with NoiseScale(sparse, sgd(sparse), every=1), pytest.raises(ValueError, match=r"has layout torch\.sparse_coo"):
        sparse(torch.tensor([1])).sum().backward()


def test_parameters_added_later_are_not_passed_over():
    model, more = network(), nn.Parameter(torch.ones(3, dtype=F64))
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1)
    optimizer.add_param_group({"params": [more]})
    with pytest.raises(ValueError, match="had 7 parameters when NoiseScale was built, and has 8 now"):
        train(model, optimizer, steps=1)
    noise.close()


def test_activation_checkpoints_are_fine_without_reentry_and_refused_with_it():
    for reentrant in (False, True):
        inner = [nn.Linear(3, 3).double() for _ in range(2)]
        model = nn.ModuleList([nn.Linear(3, 3).double(), *inner, nn.Linear(3, 1).double()])
        optimizer = sgd(model)
        noise = NoiseScale(model, optimizer, every=1)

        def run(model=model, inner=inner, reentrant=reentrant, optimizer=optimizer):
            for seed in range(2):
                x = model[0](torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=F64))
                for layer in inner:
                    x = checkpoint(layer, x, use_reentrant=reentrant)
                model[3](x).square().mean().backward()
            optimizer.step()

        if reentrant:
            with pytest.raises(ValueError, match="use_reentrant=False"):
                run()
        else:
            run()
            assert noise.read().measurements == 1


def test_backward_of_parts_of_the_model_is_no_micro_batch():
    model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1)
    for part in model:
        part(torch.ones(3, 2)).sum().backward()
    with pytest.raises(ValueError, match="have no parameter in common"):
        optimizer.step()
    noise.close()


def backward(model, step, count):
    for index in range(count):
        (loss_of(model, step, index) / count).backward()


@pytest.mark.parametrize("count", [0, 1])
def test_a_rest_of_too_few_micro_batches_is_counted_once_something_was_measured(count):
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=2, samples=PER)
    for step, pieces in enumerate((MICRO, MICRO, MICRO, count, MICRO, MICRO)):
        backward(model, step, pieces)
        optimizer.step()
        optimizer.zero_grad()
    assert [record.step for record in noise._records] == [1, 4, 5]
    assert noise.read().skipped == noise.read().to_dict()["skipped"] == 1
    assert "1 with too few micro-batches" in str(noise.read())


def test_no_micro_batch_at_all_says_why():
    model = network()
    optimizer = sgd(model)
    backward(model, 0, MICRO)
    noise = NoiseScale(model, optimizer, every=1)
    with pytest.raises(ValueError, match=r"saw 0 micro-batches.*set by hand or made before NoiseScale was built"):
        optimizer.step()
    noise.close()


def test_one_gradient_thrown_away_between_micro_batches_leaves_the_others():
    model = network()
    optimizer = sgd(model, lr=0.0)
    noise = NoiseScale(model, optimizer, every=1, samples=PER)
    for index in range(MICRO):
        (loss_of(model, 0, index) / MICRO).backward()
        model.gain.grad = None
    optimizer.step()
    whole = measured(kinds=("euclidean", "alignment"))
    torch.testing.assert_close(values(noise)[0], values(whole)[0])


def test_gradients_that_are_only_looked_at_are_no_micro_batches():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=ALL)
    for step in range(STEPS):
        for index in range(MICRO):
            loss = loss_of(model, step, index) / MICRO
            torch.autograd.grad(loss, model.up.weight, retain_graph=True)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(values(noise), values(measured()), rtol=1e-9, atol=1e-15)


def test_a_step_that_was_not_told_has_no_unit():
    model = network()
    optimizer = sgd(model)
    noise = NoiseScale(model, optimizer, every=1)
    noise.micro_batch(PER)
    backward(model, 0, 1)
    noise.micro_batch(PER)
    backward(model, 0, 1)
    optimizer.step()
    optimizer.zero_grad()
    backward(model, 1, MICRO)
    with pytest.raises(ValueError, match=r"was called before, but not in a measured step with 4 calls.*pass samples="):
        optimizer.step()
    noise.close()


def test_telling_after_measurements_in_micro_batches_is_too_late():
    noise = measured(samples=None)
    with pytest.raises(ValueError, match="for the first time after 4 measurements, whose unit is the micro-batch"):
        noise.micro_batch(PER)
    measured().micro_batch(PER)  # a constructor's samples are the same unit


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own, when it compiles
def test_a_compiled_step_is_measured_outside_of_its_graph():
    """Both hooks break the graph: nothing of the estimators is traced."""
    model = nn.Linear(4, 2)
    optimizer = sgd(model, lr=0.0)
    noise = NoiseScale(model, optimizer, every=2, kinds=("euclidean",))
    traced = []

    def watch(graph, _):
        traced.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    step = torch.compile(lambda: optimizer.step(), backend=watch)
    for _ in range(4):
        for _ in range(2):
            model(torch.randn(3, 4)).square().mean().backward()
        step()
        optimizer.zero_grad()
    assert noise.read().measurements == 2
    assert not [target for target in traced if "square" in target or "stack" in target]


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about torch.jit.script, which it uses
    from torch.distributed.optim import PostLocalSGDOptimizer


class Accelerated(torch.optim.Optimizer):
    """As accelerate's: everything is forwarded, nothing is initialised."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Lightened:
    """As Lightning's and Fabric's: a class made on the fly, over the optimizer's, with its attributes."""

    def __init__(self, optimizer):
        self.__dict__ = {key: value for key, value in vars(optimizer).items() if key != "step"}
        self.__class__ = type(f"Lightning{type(optimizer).__name__}", (Lightened, type(optimizer)), {})
        self._optimizer = optimizer

    @property
    def optimizer(self):
        return self._optimizer

    def step(self, closure=None):
        return self._optimizer.step(closure)


class Forwarding:
    """As hosts' of their own, which are no optimizers."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


class NeverAverages:
    def average_parameters(self, params):
        pass


WRAPPERS = {
    "accelerate": Accelerated,
    "lightning": Lightened,
    "forwarding": Forwarding,
    "twice": lambda optimizer: Accelerated(Lightened(optimizer)),
    "torch": lambda optimizer: PostLocalSGDOptimizer(optimizer, NeverAverages()),
}


@cases("wrap", WRAPPERS)
def test_a_wrapped_optimizer_is_measured_like_the_one_inside(wrap):
    model = network()
    optimizer = WRAPPERS[wrap](sgd(model))
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=ALL)
    train(model, optimizer)
    torch.testing.assert_close(values(noise), values(measured()), rtol=0, atol=0)
    noise.close()
    train(model, optimizer, steps=1)


@pytest.mark.parametrize("wrap", ["accelerate", "lightning", "forwarding", "twice"])
def test_the_norm_is_that_of_the_optimizer_inside(wrap):
    model = network()
    plain, wrapped = (
        NoiseScale(model, make(steepest.Muon(model))) for make in (lambda optimizer: optimizer, WRAPPERS[wrap])
    )
    assert [str(layer.norm) for layer in plain._layers] == [str(layer.norm) for layer in wrapped._layers]


class Alone(torch.optim.Optimizer):
    def __init__(self, parameters):
        self.param_groups = [{"params": list(parameters), "lr": 0.1}]

    def step(self, closure=None):
        pass


def test_an_optimizer_that_calls_no_hooks_says_what_to_pass():
    model = network()
    message = (
        r"^NoiseScale takes the torch.optim.Optimizer .* got {}, which calls no hooks when it steps\. .*wrapper\.opt"
    )
    for optimizer in (Alone(model.parameters()), object(), None, model):
        with pytest.raises(TypeError, match=message.format(type(optimizer).__name__)):
            NoiseScale(model, optimizer, norm="frobenius")
