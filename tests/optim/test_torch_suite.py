"""What torch's own tests ask of every optimizer, asked of ours and, so that the questions are right, of torch's AdamW.

torch installs the descriptions of its optimizers that these tests run on (`OptimizerInfo`), not the tests themselves;
they are written here anew, after what torch's test suite checks. What ours do otherwise stands in `OTHERWISE`, with the
reason; each of these is seen to fail. What asks about options that ours do not have is in `NOT_ASKED`.
"""

import copy
import io
import itertools
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import steepest
from tests.cases import cases

pytest.importorskip("expecttest", reason="torch's descriptions of its optimizers need it")


def described():
    """torch's descriptions; importing them closes flags and changes how scripts are called, for all other tests."""
    calls = [(kind, kind.__call__) for kind in (torch._C.ScriptFunction, torch._C.ScriptMethod)]
    from torch.testing._internal import common_optimizers

    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    for kind, call in calls:
        kind.__call__ = call
    return common_optimizers.OptimizerInfo, common_optimizers.OptimizerInput, common_optimizers.optim_db


OptimizerInfo, OptimizerInput, optim_db = described()
pytestmark = pytest.mark.slow  # torch's descriptions take seconds to import


def inputs(**others):
    """Options to try: those of torch's AdamW that ours have, and a few of ours."""

    def made(device, dtype=None):
        del device, dtype
        options = [
            {},
            {"lr": 0.01},
            {"lr": torch.tensor(0.001)},
            {"weight_decay": 0.1},
            {"weight_decay": 0.1, "lr": torch.tensor(0.01)},
            others,
        ]
        return [OptimizerInput(params=None, kwargs=copy.deepcopy(one), desc=str(one)) for one in options]

    return made


OURS = {
    name: OptimizerInfo(
        kind, optim_inputs_func=made, supported_impls=(), not_og_supported_flags=(), supports_complex=False
    )
    for name, kind, made in (
        ("Adam", steepest.Adam, inputs(betas=(0.5, 0.9), eps=1e-6)),
        ("Muon", steepest.Muon, inputs(nesterov=False, polar="svd", adam_lr=0.01)),
        ("MuonMax", steepest.MuonMax, inputs(dual="stale", adam_lr=0.01)),
    )
}
INFOS = {"torch AdamW": next(info for info in optim_db if info.optim_cls is torch.optim.AdamW), **OURS}
# By test: what ours do otherwise, and why.
OTHERWISE = {
    "test_complex_parameters_move_like_their_real_and_imaginary_parts": (
        "complex parameters are refused: norms are of real matrices; optimise torch.view_as_real of them"
    ),
    "test_a_parameter_twice_in_a_group_is_warned_of": "it is an error: it would be moved twice",
    "test_names_of_some_parameters_only_are_refused": "they are taken; the others are named after their places",
}
NOT_ASKED = {
    "foreach, fused": "parameters are stepped together wherever that is faster; there is no other form to compare with",
    "capturable": "steps can always be captured; a rate that changes is given as a tensor",
    "differentiable": "no gradient flows through a step",
    "maximize": "negate the loss",
    "amsgrad": "there is no such variant",
}


def every(test):
    """Run it for each optimizer; where ours differ, it must fail for them."""
    chosen = [
        pytest.param(
            info,
            id=name,
            marks=[pytest.mark.xfail(strict=True, reason=OTHERWISE[test.__name__])]
            if test.__name__ in OTHERWISE and name in OURS
            else [],
        )
        for name, info in INFOS.items()
    ]
    return pytest.mark.parametrize("info", chosen)(test)


def options(info):
    """Keyword arguments, one set after the other, each made anew."""
    for one in info.optim_inputs_func(device="cpu"):
        yield one.kwargs


def problem(seed=0, dtype=torch.float32, *, dense=True):
    """A weight, a bias, and what makes their gradients and returns the loss."""
    generator = torch.Generator().manual_seed(seed)
    if dense:
        weight = Parameter(torch.randn(10, 5, generator=generator).to(dtype))
    else:
        weight = Parameter(torch.randn(10, 5, 2, generator=generator).to(dtype)[..., 0])
    bias = Parameter(torch.randn(10, generator=generator).to(dtype))
    x = torch.randn(5, generator=generator).to(dtype)

    def closure():
        for parameter in (weight, bias):
            parameter.grad = None
        loss = (weight.mv(x) + bias).square().sum()
        loss.backward()
        return loss.detach()

    return weight, bias, closure


def run(optimizer, closure, steps):
    for _ in range(steps):
        closure()
        optimizer.step()


def same(one, other):
    """Of state dicts: the same keys, numbers and bits."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            same(mine, theirs)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


SCHEDULERS = [
    [],
    [lambda o: StepLR(o, step_size=10, gamma=0.9)],
    [lambda o: ReduceLROnPlateau(o)],
    [lambda o: ExponentialLR(o, gamma=0.99), lambda o: LinearLR(o, total_iters=4)],
]


@pytest.mark.parametrize("dense", [True, False], ids=["contiguous", "strided"])
@every
def test_steps_go_downhill_with_and_without_schedulers(info, dense):
    for kwargs, made in itertools.product(options(info), SCHEDULERS):
        if kwargs.get("maximize"):
            continue
        weight, bias, closure = problem(dense=dense)
        optimizer = info.optim_cls([weight, bias], **copy.deepcopy(kwargs))
        schedulers = [make(optimizer) for make in made]
        first = closure()
        for _ in range(20):
            loss = optimizer.step(closure)
            for scheduler in schedulers:
                scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
        assert closure() < first


@every
def test_a_group_moves_at_its_own_rate(info):
    for kwargs in options(info):
        weight, bias, closure = problem()
        still = Parameter(torch.randn(2))
        before = [p.detach().clone() for p in (weight, still)]
        groups = [{"params": [weight], "lr": 0.0}, {"params": [still]}, {"params": [bias], "lr": 0.02}]
        kwargs.pop("weight_decay", None)
        optimizer = info.optim_cls(groups, **kwargs)
        first = closure()
        run(optimizer, closure, 20)
        assert torch.equal(weight, before[0])
        assert torch.equal(still, before[1])
        assert closure() < first or kwargs.get("maximize")
        assert [float(group["lr"]) for group in optimizer.param_groups][::2] == [0.0, pytest.approx(0.02)]


@every
def test_a_group_has_its_own_weight_decay(info):
    weight, twin = Parameter(torch.ones(4, 4)), Parameter(torch.ones(4, 4))
    groups = [{"params": [weight], "weight_decay": 0.5}, {"params": [twin]}]
    optimizer = info.optim_cls(groups, lr=0.1, weight_decay=0.0)
    for parameter in (weight, twin):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 4), 0.95))
    assert torch.equal(twin, torch.ones(4, 4))


@every
def test_schedulers_change_the_rates_of_all_groups(info):
    for kwargs in options(info):
        weight, bias, closure = problem()
        optimizer = info.optim_cls([{"params": [weight]}, {"params": [bias], "lr": 0.02}], **kwargs)
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        scheduler = ExponentialLR(optimizer, gamma=0.5)
        run(optimizer, closure, 1)
        scheduler.step()
        halves = [pytest.approx(rate / 2) for rate in rates]
        assert [float(group["lr"]) for group in optimizer.param_groups] == halves
        again = info.optim_cls([{"params": [weight]}, {"params": [bias], "lr": 0.02}], **kwargs)
        other = ExponentialLR(again, gamma=0.5)
        other.load_state_dict(scheduler.state_dict())
        again.load_state_dict(optimizer.state_dict())
        assert [float(group["lr"]) for group in again.param_groups] == halves


@pytest.mark.parametrize("dimensions", [0, 1])
@every
def test_a_rate_as_a_tensor_is_the_same_rate(info, dimensions):
    for kwargs in options(info):
        kwargs.pop("lr", None)
        if kwargs.keys() & {"adam_lr"}:
            continue
        found = []
        for rate in (0.01, torch.tensor(0.01, dtype=torch.float64).reshape([1] * dimensions)):
            weight, bias, closure = problem(dtype=torch.float64)
            optimizer = info.optim_cls([weight, bias], lr=rate, **kwargs)
            scheduler = StepLR(optimizer, step_size=3, gamma=0.5)
            for _ in range(8):
                run(optimizer, closure, 1)
                scheduler.step()
            found.append([weight.detach(), bias.detach()])
        torch.testing.assert_close(*found)


@every
def test_complex_parameters_move_like_their_real_and_imaginary_parts(info):
    parameter = torch.randn(6, dtype=torch.complex64, requires_grad=True)
    parts = torch.view_as_real(parameter.detach().clone()).requires_grad_()
    one, other = info.optim_cls([parameter], lr=0.1), info.optim_cls([parts], lr=0.1)
    for _ in range(3):
        parameter.grad = torch.randn(6, dtype=torch.complex64)
        parts.grad = torch.view_as_real(parameter.grad).clone()
        one.step()
        other.step()
    torch.testing.assert_close(torch.view_as_real(parameter.detach()), parts.detach())


@every
def test_without_gradients_nothing_happens(info):
    for kwargs in options(info):
        weight, bias, closure = problem()
        optimizer = info.optim_cls([weight, bias], **kwargs)
        before = [weight.detach().clone(), bias.detach().clone()]
        optimizer.step()
        optimizer.step(lambda: torch.tensor(1.0))
        same([weight.detach(), bias.detach()], before)
        closure()
        bias.grad = None  # and of those that have none, nothing, when others move
        optimizer.step()
        assert torch.equal(bias, before[1])
        assert not torch.equal(weight, before[0])


@every
def test_gradients_of_zero_move_nothing_but_by_decay(info):
    for kwargs in options(info):
        kwargs.pop("weight_decay", None)
        weight, bias, _ = problem()
        optimizer = info.optim_cls([weight, bias], weight_decay=0.0, **kwargs)
        before = [weight.detach().clone(), bias.detach().clone()]
        for parameter in (weight, bias):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        same([weight.detach(), bias.detach()], before)


@every
def test_it_prints_its_class_and_groups(info):
    for kwargs in options(info):
        weight, bias, _ = problem()
        shown = repr(info.optim_cls([{"params": [weight]}, {"params": [bias]}], **kwargs))
        assert info.optim_cls.__name__ in shown
        assert "lr" in shown


@every
def test_the_state_dict_is_a_part_of_a_run_that_goes_on(info):
    for kwargs in options(info):
        weight, bias, closure = problem()
        optimizer = info.optim_cls([weight, bias], **copy.deepcopy(kwargs))
        run(optimizer, closure, 10)
        found = []
        for _ in range(2):
            own, other, again = problem()
            with torch.no_grad():
                own.copy_(weight)
                other.copy_(bias)
            resumed = info.optim_cls([own, other], **copy.deepcopy(kwargs))
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            run(resumed, again, 10)
            found.append([own.detach(), other.detach(), resumed.state_dict()])
        same(*found)
        run(optimizer, closure, 10)
        same([weight.detach(), bias.detach(), optimizer.state_dict()], found[0])


@every
def test_a_state_dict_survives_a_file_that_holds_nothing_but_tensors(info):
    for kwargs in options(info):
        weight, bias, closure = problem()
        optimizer = info.optim_cls([weight, bias], **kwargs)
        run(optimizer, closure, 3)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        read = torch.load(file, weights_only=True)
        other = info.optim_cls([weight, bias], **copy.deepcopy(kwargs))
        other.load_state_dict(read)
        same(other.state_dict(), optimizer.state_dict())


@every
def test_a_count_may_be_a_number(info):
    """As in checkpoints of old versions."""
    for kwargs in options(info):
        weight, bias, closure = problem()
        optimizer = info.optim_cls([weight, bias], **kwargs)
        run(optimizer, closure, 3)
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            state["step"] = float(state["step"])
        other = info.optim_cls([weight, bias], **copy.deepcopy(kwargs))
        other.load_state_dict(saved)
        same(other.state_dict(), optimizer.state_dict())
        run(other, closure, 1)
        assert isinstance(other.state[weight]["step"], torch.Tensor)
        assert int(other.state[weight]["step"]) == 4


@every
def test_a_state_dict_without_options_that_came_later_is_gone_on_from(info):
    """Keys that a group of an older version did not have stay what they are here."""
    weight, bias, closure = problem()
    optimizer = info.optim_cls([weight, bias])
    run(optimizer, closure, 2)
    late = {"torch AdamW": ["foreach", "fused", "capturable", "differentiable", "maximize", "decoupled_weight_decay"]}
    ours = ["nesterov", "weight_decay", "decay_kind", "view", "skipped_steps", "steps_taken", "name", "optimizer"]
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for key in late["torch AdamW"] if info is INFOS["torch AdamW"] else ours:
            group.pop(key, None)
    other = info.optim_cls([weight, bias])
    other.load_state_dict(saved)
    run(other, closure, 1)
    assert not torch.isnan(weight).any()


@every
def test_state_is_there_after_a_step(info):
    for kwargs in options(info):
        weight, bias, closure = problem()
        optimizer = info.optim_cls([weight, bias], **kwargs)
        run(optimizer, closure, 1)
        assert all(optimizer.state[p] for p in (weight, bias))
        assert all(isinstance(v, torch.Tensor) for p in (weight, bias) for v in optimizer.state[p].values())


@every
def test_hooks_around_a_step(info):
    weight, bias, closure = problem()
    optimizer, other = info.optim_cls([weight, bias]), info.optim_cls([Parameter(torch.ones(2))])
    heard = []

    def note(word):
        return lambda own, args, kwargs: heard.append((word, own is optimizer, len(args), sorted(kwargs)))

    handles = [
        register_optimizer_step_pre_hook(note("all before")),
        register_optimizer_step_post_hook(note("all after")),
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
    ]
    try:
        optimizer.step(closure)
        order = ["all before", "before", "after", "all after"]
        assert sorted(word for word, *_ in heard) == sorted(order)
        assert [word for word, *_ in heard].index("before") < [word for word, *_ in heard].index("after")
        assert all(own for _, own, *_ in heard)
        del heard[:]
        other.step()
        assert [word for word, *_ in heard] == ["all before", "all after"]
    finally:
        for handle in handles:
            handle.remove()
    del heard[:]
    optimizer.step(closure)
    assert heard == []


@every
def test_a_hook_before_a_step_may_change_its_arguments(info):
    weight, bias, closure = problem()
    optimizer = info.optim_cls([weight, bias])
    handle = optimizer.register_step_pre_hook(lambda _, args, kwargs: ((args[0], lambda: torch.tensor(7.0)), kwargs))
    assert float(optimizer.step(closure)) == 7.0
    handle.remove()
    assert float(optimizer.step(closure)) != 7.0


@every
def test_hooks_around_state_dict(info):
    weight, bias, _ = problem()
    optimizer, other = info.optim_cls([weight, bias]), info.optim_cls([weight, bias])
    before = optimizer.register_state_dict_pre_hook(lambda own: own.param_groups[0].update(lr=0.5))
    after = optimizer.register_state_dict_post_hook(lambda _, saved: saved.update(mine=1))
    first = optimizer.register_state_dict_post_hook(lambda _, saved: saved.update(mine=0), prepend=True)
    saved = optimizer.state_dict()
    assert saved["mine"] == 1
    assert float(saved["param_groups"][0]["lr"]) == 0.5
    assert "mine" not in other.state_dict()
    replaced = optimizer.register_state_dict_post_hook(lambda *_: {"all": "mine"})
    assert optimizer.state_dict() == {"all": "mine"}
    for handle in (before, after, first, replaced):
        handle.remove()
    assert "mine" not in optimizer.state_dict()


@every
def test_hooks_around_load_state_dict(info):
    weight, bias, _ = problem()
    optimizer = info.optim_cls([weight, bias], lr=0.01)
    saved = optimizer.state_dict()
    heard = []

    def other_rate(_, given):
        heard.append("before")
        return {**given, "param_groups": [{**group, "lr": 0.125} for group in given["param_groups"]]}

    def tell(own):
        heard.append("after")
        own.mine = 1

    handles = [
        optimizer.register_load_state_dict_pre_hook(other_rate),
        optimizer.register_load_state_dict_pre_hook(lambda *_: heard.append("first") or None, prepend=True),
        optimizer.register_load_state_dict_post_hook(tell),
        optimizer.register_load_state_dict_post_hook(lambda _: heard.append("then first"), prepend=True),
    ]
    optimizer.load_state_dict(saved)
    assert heard == ["first", "before", "then first", "after"]
    assert optimizer.mine == 1
    assert all(float(group["lr"]) == 0.125 for group in optimizer.param_groups)
    for handle in handles:
        handle.remove()
    optimizer.load_state_dict(saved)
    assert len(heard) == 4
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)


@every
def test_a_copy_has_all_public_attributes_and_goes_on_alone(info):
    for kwargs in options(info):
        weight, bias, closure = problem()
        optimizer = info.optim_cls([weight, bias], **kwargs)
        run(optimizer, closure, 2)
        for made in (copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
            other = made(optimizer)
            assert {n for n in vars(optimizer) if not n.startswith("_")} <= {*vars(other)}
            same(other.state_dict(), optimizer.state_dict())
            twin = other.param_groups[0]["params"][0]
            assert twin is not weight
            twin.grad = torch.ones_like(twin)
            before = copy.deepcopy(optimizer.state_dict())
            other.step()
            same(optimizer.state_dict(), before)


@every
def test_closures_have_gradients_enabled_and_their_loss_comes_back(info):
    weight, bias, closure = problem()
    optimizer = info.optim_cls([weight, bias])
    seen = []

    def told():
        seen.append(torch.is_grad_enabled())
        return closure()

    with torch.no_grad():
        loss = optimizer.step(told)
    assert seen == [True]
    assert loss == pytest.approx(float(problem()[2]()))
    assert optimizer.step() is None


NAMED = list(itertools.product([True, False], repeat=2))


@pytest.mark.parametrize(("there", "here"), NAMED)
@every
def test_names_go_with_groups_and_states_go_between_named_and_not(info, there, here):
    def made(named):
        groups = [
            {"params": [("weight", weight)] if named else [weight]},
            {"params": [("bias", bias)] if named else [bias]},
        ]
        return info.optim_cls(groups, lr=0.01)

    weight, bias, closure = problem()
    optimizer = made(there)
    run(optimizer, closure, 2)
    saved = optimizer.state_dict()
    if there:
        assert [group["param_names"] for group in saved["param_groups"]] == [["weight"], ["bias"]]
    other = made(here)
    other.load_state_dict(saved)
    same(other.state_dict()["state"], saved["state"])
    if here:
        assert [group["param_names"] for group in other.param_groups] == [["weight"], ["bias"]]
    run(other, closure, 1)


@every
def test_a_state_of_other_groups_is_refused(info):
    weight, bias, closure = problem()
    optimizer = info.optim_cls([{"params": [weight]}, {"params": [bias]}])
    run(optimizer, closure, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    for groups in ([{"params": [weight]}], [{"params": [weight]}, {"params": [bias, Parameter(torch.ones(2))]}]):
        other = info.optim_cls(groups)
        with pytest.raises(ValueError, match=r"different number|match the size"):
            other.load_state_dict(saved)
    same(optimizer.state_dict(), saved)


@every
def test_loading_copies_the_state(info):
    weight, bias, closure = problem()
    optimizer, other = info.optim_cls([weight, bias], lr=0.01), info.optim_cls([weight, bias], lr=0.01)
    run(optimizer, closure, 2)
    saved = optimizer.state_dict()
    other.load_state_dict(saved)
    before = copy.deepcopy(saved)
    run(other, closure, 2)
    same(saved["param_groups"], before["param_groups"])
    assert other.state[weight] is not optimizer.state[weight]


@every
def test_parameters_may_come_as_any_iterable(info):
    weight, bias, closure = problem()
    plain = [[weight, bias], (weight, bias), iter([weight, bias]), {0: weight, 1: bias}.values()]
    named = [[("w", weight), ("b", bias)], iter({"w": weight, "b": bias}.items())]
    grouped = [
        [{"params": weight}, {"params": bias}],
        [{"params": iter([weight])}, {"params": (bias,)}],
        [{"params": [("w", weight)]}, {"params": iter([("b", bias)])}],
    ]
    for params in (*plain, *named, *grouped):
        optimizer = info.optim_cls(params, lr=0.01)
        before = [weight.detach().clone(), bias.detach().clone()]
        run(optimizer, closure, 1)
        assert not torch.equal(weight, before[0])
        assert not torch.equal(bias, before[1])


@every
def test_a_group_can_be_added(info):
    weight, bias, closure = problem()
    optimizer = info.optim_cls([weight], lr=0.01)
    run(optimizer, closure, 2)
    optimizer.add_param_group({"params": [bias], "lr": 0.02})
    before = bias.detach().clone()
    run(optimizer, closure, 1)
    assert not torch.equal(bias, before)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [pytest.approx(0.01), 0.02]


@every
def test_gradients_are_cleared(info):
    weight, bias, closure = problem()
    optimizer = info.optim_cls([weight, bias])
    closure()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in (weight, bias))
    optimizer.zero_grad()
    assert weight.grad is bias.grad is None


@every
def test_steps_do_not_depend_on_the_default_dtype(info):
    found = []
    for dtype in (torch.float32, torch.float64):
        weight, bias, closure = problem()
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            run(info.optim_cls([weight, bias], lr=0.01), closure, 3)
        finally:
            torch.set_default_dtype(before)
        found.append([weight.detach(), bias.detach()])
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@every
def test_parameters_of_other_dtypes_move_and_stay_what_they_are(info, dtype):
    weight, bias, closure = problem(dtype=dtype)
    optimizer = info.optim_cls([weight, bias], lr=0.01, **({"eps": 0.1} if dtype == torch.float16 else {}))
    first = closure()
    run(optimizer, closure, 5)
    assert weight.dtype == bias.dtype == dtype
    assert closure() < first


@every
def test_gradients_of_any_strides_are_taken(info):
    found = []
    for turned in (False, True):
        weight, bias, closure = problem(dtype=torch.float64)
        optimizer = info.optim_cls([weight, bias], lr=0.01)
        for _ in range(3):
            closure()
            if turned:
                weight.grad = weight.grad.t().contiguous().t()
            optimizer.step()
        found.append([weight.detach(), bias.detach()])
    torch.testing.assert_close(*found)


@every
def test_an_instance_can_be_used_while_gradients_are_off_or_in_inference_mode(info):
    weight, bias, closure = problem()
    optimizer = info.optim_cls([weight, bias], lr=0.01)
    first = closure()
    with torch.no_grad():
        optimizer.step()
    assert torch.is_grad_enabled()
    run(optimizer, closure, 3)
    assert closure() < first


@every
def test_wrong_arguments_are_refused(info):
    one = Parameter(torch.randn(3, 3))
    wrong = [
        (one, {}, TypeError),
        ([], {}, ValueError),
        ([{"params": one}, {"params": one}], {}, ValueError),
        ([one], {"lr": torch.tensor([0.1, 0.1])}, (ValueError, TypeError)),
        ([one], {"lr": -1.0}, ValueError),
        ([one], {"weight_decay": -1.0}, ValueError),
        ([one], {"betas": (1.0, 0.0)}, ValueError),
        ([one], {"eps": -1.0}, ValueError),
        ([one.detach() * one], {}, ValueError),
        (["weight"], {}, TypeError),
        ([{"parameters": [one]}], {}, (KeyError, ValueError)),
    ]
    for params, kwargs, error in wrong:
        with pytest.raises(error):
            info.optim_cls(params, **kwargs)
    optimizer = info.optim_cls([one])
    for group in (7, {"params": [one]}, {"params": ["weight"]}):
        with pytest.raises((TypeError, ValueError)):
            optimizer.add_param_group(group)


@every
def test_names_of_some_parameters_only_are_refused(info):
    with pytest.raises(ValueError, match="names"):
        info.optim_cls([("weight", Parameter(torch.randn(3, 3))), Parameter(torch.randn(3, 3))])


@every
def test_a_parameter_twice_in_a_group_is_warned_of(info):
    parameter = Parameter(torch.randn(3, 3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        info.optim_cls([parameter, parameter])


@cases("name, option", [(name, option) for name in OURS for group in NOT_ASKED for option in group.split(", ")])
def test_options_that_ours_do_not_have_are_refused_by_name(name, option):
    with pytest.raises(TypeError, match=re.escape(repr(option))):
        OURS[name].optim_cls([Parameter(torch.ones(2, 2))], **{option: True})


def test_the_page_lists_what_differs():
    page = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
    listed = [" ".join(cell.split()) for cell in re.findall(r"^\| [^|]+ \| ([^|]+) \|$", page, flags=re.MULTILINE)]
    for reason in (*OTHERWISE.values(), *NOT_ASKED.values()):
        assert reason in listed, reason
