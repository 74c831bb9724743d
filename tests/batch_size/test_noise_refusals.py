"""What NoiseScale refuses, and what it passes over once it has measured."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from steepest.batch_size.noise import NoiseScale
from tests.batch_size.noisy_loops import ALL, MICRO, PER, STEPS, loss_of, measured, network, sgd, train, values
from tests.cases import cases

F64 = torch.float64


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
