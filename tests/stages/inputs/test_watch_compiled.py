"""Compiled models are seen as eager ones are, and compiled once: refreshes change no graph."""

import copy
import gc
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from steepest import InputMoment, Muon
from tests.stages.inputs.watched import assert_kept, backward, data, kept, moments, net, newton

# Of torch's compilers, about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated. Methods on autograd functions:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]
EVERY_OTHER = InputMoment(every=2, first=0, decay=0.5, structure="full")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(model, call, optimizer, steps=4):
    """Moments after each step; a pass without backward and one without gradients come in between."""
    history = []
    for step in range(steps):
        x = data(seed=step)
        optimizer.zero_grad()
        call(data(seed=50 + step, size=4))
        for part in x.split(4):
            call(part).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            call(x[:4])
        history.append({name: moment.clone() for name, moment in kept(model, optimizer).items()})
    return history


def eager(**options):
    model = net(**options)
    return run(model, model, newton(model, EVERY_OTHER))


def assert_same(ours, theirs, tolerance=1e-13):
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys() != set()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance)


def test_tables_are_seen_in_one_graph():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, padding_idx=1), nn.Tanh(), nn.Linear(4, 9))
    options = InputMoment(roles=("embedding",), on="gradient", every=2, first=1, decay=0.0)
    optimizer = Muon(model, precondition=options)
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(3):
        seen = torch.randint(9, (6, 4), generator=torch.Generator().manual_seed(step // 2))
        optimizer.zero_grad()
        for part in seen.chunk(2):
            call(part).square().mean().backward()
        optimizer.step()
    counts = torch.bincount(torch.randint(9, (6, 4), generator=torch.Generator().manual_seed(0)).flatten(), minlength=9)
    counts[1] = 0
    torch.testing.assert_close(optimizer.state[model[0].weight]["input_moment"], (counts / counts.sum())[None])
    assert counter.frame_count == 1


needs_hook_guards = pytest.mark.skipif(
    torch.__version__.startswith("2.9."),
    reason="torch 2.9 does not notice hooks that come or go after compiling; the step says that inputs are missing",
)


# How a model is compiled, and in how many graphs: one with gradients and one without, in general.
WAYS = {
    "whole": (None, lambda model, backend: torch.compile(model, backend=backend), 2),
    "checkpoint inside": (False, lambda model, backend: torch.compile(model, backend=backend), 2),
    "reentrant checkpoint inside": (True, lambda model, backend: torch.compile(model, backend=backend), 2),
    "checkpoint outside": (
        None,
        lambda model, backend: wrapped(torch.compile(model, backend=backend), use_reentrant=False),
        2,
    ),
    "reentrant checkpoint outside": (
        None,
        lambda model, backend: wrapped(torch.compile(model, backend=backend), use_reentrant=True),
        3,  # its first pass is without gradients though its input has one
    ),
}


def wrapped(call, *, use_reentrant):
    return lambda x: checkpoint(call, x.requires_grad_(torch.is_grad_enabled()), use_reentrant=use_reentrant)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "backend"), [*((way, "aot_eager") for way in WAYS), ("whole", "eager"), ("checkpoint inside", "eager")]
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of a checkpoint under no_grad
def test_moments_are_those_of_eager_and_no_step_compiles_again(way, backend):
    reentrant, compiled, graphs = WAYS[way]
    model = net(reentrant=reentrant)
    counter = CompileCounterWithBackend(backend)
    ours = run(model, compiled(model, counter), newton(model, EVERY_OTHER))
    assert_same(ours, eager())
    assert counter.frame_count == graphs


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_inductor():
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)).double()
    optimizer, x = newton(model), data()
    compiled = torch.compile(model)
    rows = x.flatten(0, -2)
    backward(compiled, x)
    optimizer.step()
    assert_kept(model, optimizer, {"0.weight": rows.T @ rows / 24}, names=["0.weight"])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        return x + self.q(x).tanh() * self.k(x).sigmoid() + self.v(x)


@needs_hook_guards
@pytest.mark.slow
def test_blocks_compiled_one_by_one_share_their_graphs_and_moments():
    torch.manual_seed(7)
    model = nn.Sequential(*(Block() for _ in range(10)), nn.Linear(5, 3)).double()
    counter, optimizer = CompileCounterWithBackend("aot_eager"), newton(model)
    expected = moments(model, [x := data()])
    for block in model[:-1]:
        block.compile(backend=counter)
    backward(model, x)
    optimizer.step()
    assert counter.frame_count == 2  # inputs of the first block have no gradient; more than 8 would run uncompiled
    names = [f"{number}.q.weight" for number in range(10)]
    assert_kept(model, optimizer, expected, names=names)
    assert [row.inputs for row in optimizer.plan if row.inputs][:3] == ["full 5"] + ["as 0.q.weight"] * 2


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.lift, self.attention, self.head = nn.Linear(5, 6), nn.MultiheadAttention(6, 2), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(self.lift(x))
        return self.head(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.slow
def test_an_input_given_three_times():
    torch.manual_seed(7)
    model = Attention().double()
    optimizer, x = newton(model, InputMoment(every=1, first=0, decay=0.0, structure="full", missing="muon")), data()
    rows = torch.tanh(model.lift(x)).detach().flatten(0, -2)
    backward(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    optimizer.step()
    moment = kept(model, optimizer)["attention.in_proj_weight"]
    torch.testing.assert_close(moment, rows.T @ rows / 24, rtol=1e-12, atol=1e-13)


def test_clearing_gradients_between_forward_and_backward():
    model, x = net(), data()
    optimizer, expected = newton(model), moments(model, [x])
    loss = torch.compile(model, backend="aot_eager")(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert_kept(model, optimizer, expected)


def attack(call, model):
    x = data(seed=2).requires_grad_()
    call(x).sum().backward(inputs=[x])


def saliency(call, model):
    x = data(seed=2).requires_grad_()
    torch.autograd.grad(call(x).sum(), x)


def thrown_away(call, model):
    backward(call, data(seed=2))
    model.zero_grad()


def zeroed(call, model):
    backward(call, data(seed=2))
    model.zero_grad(set_to_none=False)


@pytest.mark.slow
@pytest.mark.parametrize("discard", [attack, saliency, thrown_away, zeroed])
def test_gradients_that_are_thrown_away_take_their_inputs_along(discard):
    model, x = net(), data()
    optimizer, expected = newton(model), moments(model, [x])
    compiled = torch.compile(model, backend="aot_eager")
    discard(compiled, model)
    for part in x.split(4):
        backward(compiled, part)
    optimizer.step()
    assert_kept(model, optimizer, expected)


def test_a_model_that_is_converted_after_the_optimizer_was_built():
    model = net(torch.float32)
    optimizer, x = newton(model), data()
    model.double()
    expected = moments(model, [x])
    backward(torch.compile(model, backend="aot_eager"), x)
    optimizer.step()
    assert_kept(model, optimizer, expected)


@pytest.mark.slow
def test_compiled_autograd_sees_the_same():
    model, x = net(), data()
    optimizer, expected = newton(model), moments(model, [x])
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(backward, backend="eager")(model, x)
    optimizer.step()
    assert_kept(model, optimizer, expected)


@pytest.mark.slow
def test_shapes_that_vary_are_seen_too():
    model, sizes = net(), (8, 3, 5, 6)
    optimizer, expected = newton(model), moments(model, [data(size=size) for size in sizes])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, dynamic=True)
    for size in sizes:
        (compiled(data(size=size)).square().sum() / 50).backward()
    optimizer.step()
    assert_kept(model, optimizer, expected)
    assert counter.frame_count == 1


def test_a_copy_of_a_compiled_model_is_not_seen():
    model, x = net(), data()
    optimizer, expected = newton(model), moments(model, [x])
    compiled = torch.compile(model, backend="eager")
    backward(compiled, x)
    twin = copy.deepcopy(model)
    backward(torch.compile(twin, backend="eager"), data(seed=2))
    optimizer.step()
    assert_kept(model, optimizer, expected)


@pytest.mark.slow
def test_a_mask_must_be_in_force_in_the_backward_pass():
    model, x, mask = net(), data(), torch.arange(24).view(8, 3) % 2
    optimizer, expected = newton(model), moments(model, [x], [mask])
    compiled = torch.compile(model, backend="aot_eager")
    with optimizer.input_mask(mask):
        loss = compiled(x).square().mean()
    with pytest.raises(RuntimeError, match=r"^input_mask was used in a forward pass .* Call backward\(\) within"):
        loss.backward()
    optimizer.zero_grad()
    with optimizer.input_mask(mask):
        backward(compiled, x)
    optimizer.step()
    assert_kept(model, optimizer, expected)


@needs_hook_guards
def test_a_model_compiled_before_the_optimizer_was_built_is_compiled_anew():
    model, x = net(), data()
    compiled = torch.compile(model, backend="aot_eager")
    backward(compiled, data(seed=2))
    optimizer, expected = newton(model), moments(model, [x])
    optimizer.zero_grad()
    backward(compiled, x)
    optimizer.step()
    assert_kept(model, optimizer, expected)


@needs_hook_guards
def test_models_of_one_class_with_and_without_hooks_in_turns():
    """What compilers made of one is not taken for another; each is compiled once."""
    counter = CompileCounterWithBackend("aot_eager")
    models = [net() for _ in range(4)]
    plain, *others = (list(model.parameters()) for model in models[::2])
    optimizers = [torch.optim.SGD(plain), newton(models[1]), torch.optim.SGD(others[0]), newton(models[3])]
    compiled = [torch.compile(model, backend=counter) for model in models]
    for step in range(3):
        for model, optimizer, call in zip(models, optimizers, compiled, strict=True):
            x = data(seed=step)
            optimizer.zero_grad()
            expected = moments(model, [x])
            backward(call, x)
            optimizer.step()
            if model in models[1::2]:
                assert_kept(model, optimizer, expected)
    assert counter.frame_count == 2


@needs_hook_guards
@pytest.mark.slow
def test_a_model_compiled_for_an_optimizer_that_is_gone_is_seen_by_the_next():
    model = net()
    compiled = torch.compile(model, backend="aot_eager")
    for step in range(3):
        x = data(seed=step)
        backward(compiled, x)  # without an optimizer
        optimizer = newton(model)
        optimizer.zero_grad()
        expected = moments(model, [x])
        backward(compiled, x)
        optimizer.step()
        assert_kept(model, optimizer, expected)
        del optimizer
        gc.collect()
        model.zero_grad()
