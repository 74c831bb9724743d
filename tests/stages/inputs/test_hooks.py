"""What is done with a model besides training it: copies, files, exports; with hooks of ours as without."""

import copy
import gc
import io
import pickle
import pickletools
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from steepest import InputMoment
from tests.stages.inputs.watched import assert_kept, backward, data, moments, net, newton

# torch's own, which it meets where it first differentiates forward
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.(script|script_method). is deprecated:DeprecationWarning")
LATER = InputMoment(every=2, first=1, decay=0.0, structure="full")  # looks at every other step


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(model).module


COPIES = [copy.deepcopy, through_pickle, through_a_file, averaged]


def hooks(model):
    return [h for m in model.modules() for h in (*m._forward_pre_hooks, *m._forward_pre_hooks_with_kwargs)]


@pytest.mark.parametrize("make", COPIES)
@pytest.mark.parametrize("alive", [True, False])
def test_copies_have_no_hooks(make, alive):
    model = net(torch.float32)
    optimizer = newton(model)
    twin = make(model)
    if not alive:
        del optimizer
        gc.collect()
        assert hooks(model) == hooks(make(model)) == []
    assert hooks(twin) == []
    assert type(twin.first._forward_pre_hooks) is type(nn.Linear(1, 1)._forward_pre_hooks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that scripts and quantisation are old
        torch.jit.script(nn.Sequential(twin.first, twin.head))
        quantised = torch.ao.quantization.quantize_dynamic(twin, {nn.Linear}, dtype=torch.qint8)
    quantised(data(dtype=torch.float32))


@pytest.mark.parametrize("earlier", [True, False])
def test_a_file_of_the_model_does_not_need_this_library(earlier):
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(3, 2)).double()
    if earlier:
        model[0].register_forward_pre_hook(passed_by)
    optimizer = newton(model)
    for again in (model, copy.deepcopy(model)):
        names = " ".join(str(argument) for _, argument, _ in pickletools.genops(pickle.dumps(again)))
        assert "steepest" not in names
    twin = through_pickle(model)
    assert torch.equal(twin(data()), model(data()))
    assert len(hooks(copy.deepcopy(model)[0])) == (2 if earlier else 0)
    expected = moments(model, [data()])
    backward(twin, data(seed=2))
    backward(model, data())
    optimizer.step()
    assert_kept(model, optimizer, expected, names=["0.weight", "1.weight"])


def passed_by(module, arguments):
    """A hook of somebody else."""


def test_hooks_of_others_stay_theirs():
    model, calls = net(), []
    before = model.second.register_forward_pre_hook(lambda module, arguments: calls.append("before"))
    optimizer = newton(model)
    after = model.first.register_forward_pre_hook(lambda module, arguments: calls.append("after"))
    named = model.first.register_forward_pre_hook(lambda m, a, o: calls.append("named"), with_kwargs=True)
    model(data())
    copy.deepcopy(model)(data())
    assert calls == ["after", "named", "before"] * 2
    for handle in (before, after, named):
        handle.remove()
    expected = moments(model, [data()])
    backward(model, data())
    optimizer.step()
    assert_kept(model, optimizer, expected)
    del optimizer
    gc.collect()
    assert hooks(model) == []
    assert calls == ["after", "named", "before"] * 2


def quantised_in_place(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = net(torch.float32)
        optimizer = newton(twin)  # lives
        torch.ao.quantization.quantize_dynamic(twin, {nn.Linear}, dtype=torch.qint8, inplace=True)
        twin(data(dtype=torch.float32))
    assert optimizer is not None


def traced(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, data())


def forward_mode(model):
    with forward_ad.dual_level():
        forward_ad.unpack_dual(model(forward_ad.make_dual(data(), torch.ones_like(data()))))


def many_directions(model):
    torch.autograd.functional.jacobian(model, data(), vectorize=True, strategy="forward-mode")


def imagined(model):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(data())).sum().backward()
    model.zero_grad()


DONE = {
    "trace": traced,
    "export": lambda model: torch.export.export(model, (data(),)),
    "strict export": lambda model: torch.export.export(model, (data(),), strict=True),
    "forward mode": forward_mode,
    "many directions": many_directions,
    "jvp": lambda model: torch.func.jvp(model, (data(),), (data(),)),
    "jacfwd": lambda model: torch.func.jacfwd(model)(data()),
    "vmap": lambda model: torch.vmap(model)(data()),
    "hessian": lambda model: torch.autograd.functional.hessian(lambda x: model(x).square().sum(), data(size=1)),
    "batched gradients": lambda model: torch.autograd.functional.jacobian(model, data(), vectorize=True),
    "symbolic": lambda model: torch.fx.symbolic_trace(model)(data()),
    "fake": imagined,
    "quantised in place": quantised_in_place,
}


@pytest.mark.slow
@pytest.mark.parametrize("what", DONE)
def test_a_model_can_be_used_for_anything_before_any_step(what):
    model = net()
    optimizer = newton(model, LATER)
    for step in range(4):
        x = data(seed=step)
        DONE[what](model)
        optimizer.zero_grad()
        expected = moments(model, [x])
        backward(model, x)
        DONE[what](model) if what != "fake" else None  # which clears the gradients
        optimizer.step()
        if step % 2:
            assert_kept(model, optimizer, expected)


def test_an_exported_model_holds_nothing_of_ours():
    model = net()
    newton_optimizer = newton(model)
    program = torch.export.export(model, (data(),))
    assert "steepest" not in str(program.graph)
    assert torch.equal(program.module()(data()), model(data()))
    assert newton_optimizer is not None


def test_a_loss_of_tangents_sees_the_inputs():
    model, x = net(), data()
    optimizer, expected = newton(model), moments(model, [x])
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x))))
        (out.primal.square().mean() + out.tangent.square().mean()).backward()
    optimizer.step()
    assert_kept(model, optimizer, expected)
