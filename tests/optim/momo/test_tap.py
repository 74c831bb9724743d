"""The loss reaches a step in three ways, and a loss that cannot be the right one is caught."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import steepest
from steepest import Momo, Muon, MuonAdam, MuonMax
from steepest.optim.momo.tap import LossTap, check_loss
from tests.optim.training import backward, batch, network

OPTIONS = {"lr": 5.0, "step_size": Momo(0.5)}  # so long that Momo cuts every step


def weights_after(model, optimizer, step, count=4):
    for index in range(count):
        optimizer.zero_grad()
        step(index)
    assert optimizer.diagnostics()["t"] < 1
    return [p.detach().clone() for p in model.parameters()]


def build(dtype=torch.float32, **options):
    model = network(dtype)
    return model, MuonAdam(model, **{**OPTIONS, **options})


def test_three_ways_are_one():
    def explicit(index):
        optimizer.step(loss=backward(model, index))

    def recorded(index):
        optimizer.record_loss(backward(model, index))
        optimizer.step()

    def closure(index):
        optimizer.step(lambda: backward(model, index))

    def closure_float(index):
        optimizer.step(lambda: backward(model, index).item())

    trajectories = []
    for way in (explicit, recorded, closure, closure_float):
        model, optimizer = build()
        trajectories.append(weights_after(model, optimizer, way))
    for other in trajectories[1:]:
        for a, b in zip(trajectories[0], other, strict=True):
            assert torch.equal(a, b)


def test_micro_batches_of_any_size_are_one_batch():
    wide = torch.float64  # a polar factor enlarges what two orders of summation differ by
    model, optimizer = build(wide)
    whole = weights_after(model, optimizer, lambda index: optimizer.step(loss=backward(model, index, wide)))
    model, optimizer = build(wide)

    def in_parts(index):
        x, y = batch(index, wide)
        for part in (slice(0, 2), slice(2, 8)):
            loss, weight = nn.functional.cross_entropy(model(x[part]), y[part]), len(y[part]) / len(y)
            optimizer.record_loss(loss, weight=weight)
            (loss * weight).backward()
        optimizer.step()

    for a, b in zip(whole, weights_after(model, optimizer, in_parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_order_of_trust_is_explicit_then_recorded_then_closure():
    model, optimizer = build(lr=1e9)

    def closure():
        optimizer.record_loss(3.0)  # read after the closure ran
        backward(model, 0)
        return 4.0

    optimizer.step(closure)
    assert optimizer.diagnostics()["gap"] == pytest.approx(3.0 - 0.5)
    model, optimizer = build(lr=1e9)
    optimizer.step(closure, loss=2.0)
    assert optimizer.diagnostics()["gap"] == pytest.approx(2.0 - 0.5)


def test_a_missing_loss_names_the_three_remedies_and_changes_nothing():
    model, optimizer = build()
    backward(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    for way in ("step(loss=loss)", "record_loss(loss, weight=1 / micro_batches)", "step(closure)"):
        with pytest.raises(ValueError, match=r"Momo needs the loss") as caught:
            optimizer.step()
        assert way in str(caught.value)
    assert not optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_step_that_can_change_nothing_needs_no_loss():
    model, optimizer = build()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(ValueError, match="Momo needs the loss"):
        optimizer.step()


@pytest.mark.parametrize(
    ("loss", "kind", "message"),
    [
        (torch.ones(3), ValueError, r"one number as loss, got shape \(3,\)\. Reduce it"),
        (torch.ones(()).long(), TypeError, r"takes a real loss, got a tensor of torch\.int64"),
        ("2", TypeError, r"takes a number or a tensor as loss, got '2'"),
        (True, TypeError, r"takes a number or a tensor as loss, got True"),
    ],
)
def test_what_cannot_be_a_loss_is_refused(loss, kind, message):
    model, optimizer = build()
    backward(model, 0)
    with pytest.raises(kind, match=r"^step .*" + message):
        optimizer.step(loss=loss)
    with pytest.raises(kind, match=r"^record_loss .*" + message):
        optimizer.record_loss(loss)
    with pytest.raises(kind, match=r"^the closure of step .*" + message):
        optimizer.step(lambda: loss)
    assert not optimizer.state


@pytest.mark.parametrize("weight", [0.0, -0.5, 1.5, float("nan")])
def test_a_weight_is_a_part_of_the_batch(weight):
    with pytest.raises(ValueError, match=r"record_loss takes a weight in \(0, 1\]"):
        LossTap().record(1.0, weight)


def test_a_weight_is_a_number():
    with pytest.raises(TypeError, match=r"record_loss takes a number as weight, got '1'"):
        LossTap().record(1.0, "1")


@pytest.mark.parametrize("weights", [(0.25,), (0.25, 0.25, 0.25), (1.0, 1.0), (0.5, 0.75)])
def test_a_forgotten_or_doubled_micro_batch_is_caught(weights):
    model, optimizer = build()
    backward(model, 0)
    for weight in weights:
        optimizer.record_loss(2.0, weight=weight)
    with pytest.raises(ValueError, match=rf"weights that sum to {sum(weights):g} instead of 1"):
        optimizer.step()
    optimizer.record_loss(2.0)  # what was wrong is forgotten
    optimizer.step()


def test_a_batch_whose_step_was_passed_over_is_forgotten_with_its_gradients():
    tap = LossTap()
    tap.record(5.0, 1.0)
    tap.gradients_cleared()
    tap.record(2.0, 0.5)
    tap.record(3.0, 0.5)
    assert tap.take() == (2.5, 1.0)
    tap.record(7.0, 1.0)  # recorded before the gradients are cleared, as in loops that clear just before backward
    tap.gradients_cleared()
    assert tap.take() == (7.0, 1.0)
    assert tap.take() == (None, 1.0)


def test_a_loss_keeps_no_graph():
    loss = check_loss("x", torch.ones(1, requires_grad=True) * 2)
    assert isinstance(loss, torch.Tensor)
    assert not loss.requires_grad
    assert loss.shape == ()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_skips_the_step_and_leaves_the_model_of_the_loss(bad):
    model, optimizer = build()
    weights_after(model, optimizer, lambda index: optimizer.step(loss=backward(model, index)), count=2)
    before = optimizer.state_dict()
    backward(model, 5)
    with pytest.warns(RuntimeWarning, match="the loss is not finite"):
        optimizer.step(loss=bad)
    after = optimizer.state_dict()
    assert after["param_groups"][0]["skipped_steps"] == 1
    for key in ("momo_value", "momo_steps", "momo_bound"):
        assert before["param_groups"][0][key] == after["param_groups"][0][key]


def test_gradient_scaling_changes_nothing_and_a_skipped_step_neither():
    def train(scaler):
        model, optimizer = build()
        for index in range(6):
            optimizer.zero_grad()
            x, y = batch(index)
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.record_loss(loss)
            scaler.scale(loss).backward()
            if index == 3 and scaler.is_enabled():  # an overflow: the scaler passes over this step
                next(model.parameters()).grad[0] = torch.inf
            elif index == 3:
                continue
            scaler.step(optimizer)
            scaler.update()
        return [p.detach().clone() for p in model.parameters()]

    plain = train(torch.amp.GradScaler("cpu", enabled=False))
    scaled = train(torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2))
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradient_scaling_hands_the_loss_on():
    model, optimizer = build()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    x, y = batch(0)
    loss = nn.functional.cross_entropy(model(x), y)
    scaler.scale(loss).backward()
    scaler.step(optimizer, loss=loss)
    assert optimizer.diagnostics()["gap"] == pytest.approx(loss.item() - 0.5, rel=1e-6)


def test_clipping_warns_once_and_scaling_or_a_clip_without_effect_do_not():
    model, optimizer = build(lr=1e-3)
    for index in range(2):
        loss = backward(model, index)
        nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        optimizer.step(loss=loss)
        optimizer.zero_grad()
    loss = backward(model, 2)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.warns(UserWarning, match="changed between backward and step .* as by clipping"):
        optimizer.step(loss=loss)
    optimizer.zero_grad()
    loss = backward(model, 3)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step(loss=loss)  # no second warning


def test_without_momo_clipping_is_nobodys_business():
    model = network()
    optimizer = Muon(model)
    loss = backward(model, 0)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step(loss=loss)
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def test_the_watch_ends_with_the_optimizer():
    model, optimizer = build()
    watched = [p for p in model.parameters() if p._backward_hooks]
    assert len(watched) == len(optimizer.param_groups)
    del optimizer
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in watched)


def test_momo_and_step_size_are_one_question():
    with pytest.raises(ValueError, match=r"momo=True and step_size=.*give one of them"):
        Muon(network(), momo=True, step_size=Momo())
    with pytest.raises(TypeError, match=r"momo must be True or False, got Momo.*step_size="):
        MuonMax(network(), momo=Momo())
    with pytest.raises(TypeError, match=r"step_size must be Fixed\(\) or Momo\(\.\.\.\), got 'momo'"):
        steepest.SteepestDescent(network(), step_size="momo")


def parts_of(model, step, count=4):
    x, y = batch(step)
    for index in range(count):
        rows = slice(index * 8 // count, (index + 1) * 8 // count)
        yield nn.functional.cross_entropy(model(x[rows]), y[rows])


@pytest.mark.parametrize("make", [MuonAdam, MuonMax, Muon])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_part_that_was_divided_before_it_was_recorded_is_refused(make, scaled):
    model = network()
    optimizer = make(model, step_size=Momo())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9, enabled=scaled)
    for loss in parts_of(model, 0):
        divided = loss / 4
        optimizer.record_loss(divided, weight=1 / 4)
        scaler.scale(divided).backward()
    with pytest.raises(
        ValueError, match=r"told weight=0\.25, but backward multiplied this loss by 1\..*before it is div"
    ):
        scaler.step(optimizer)
    assert not optimizer.state


@pytest.mark.parametrize("recorded", ["scaled", "sum"])
def test_a_loss_that_is_not_the_gradients_by_its_scale_is_refused(recorded):
    model = network()
    optimizer = MuonAdam(model, step_size=Momo())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9, enabled=recorded == "scaled")
    x, y = batch(0)
    loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
    told = scaler.scale(loss / 8) if recorded == "scaled" else loss
    optimizer.record_loss(told)
    (told if recorded == "scaled" else told / 8).backward()
    with pytest.raises(ValueError, match="told weight=1, but backward multiplied this loss by 0"):
        scaler.step(optimizer)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_parts_that_are_recorded_as_they_are_are_taken(count, scaled):
    model = network()
    optimizer = MuonAdam(model, step_size=Momo(0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9, enabled=scaled)
    for step in range(3):
        optimizer.zero_grad()
        for loss in parts_of(model, step, count):
            optimizer.record_loss(loss, weight=1 / count)
            scaler.scale(loss / count).backward()
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.diagnostics()["skipped_steps"] == 0


def in_two_passes(loss, parameters):
    loss.backward(inputs=parameters[:2], retain_graph=True)
    loss.backward(inputs=parameters[2:])


def with_a_penalty(loss, parameters):
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    (loss + 0.01 * sum(g.square().sum() for g in gradients)).backward()


def after_a_look(loss, parameters):
    torch.autograd.grad(loss, parameters, retain_graph=True)
    loss.backward()


def in_halves(loss, parameters):
    (loss / 2).backward(retain_graph=True)
    (loss / 2).backward()


PASSES = [in_two_passes, with_a_penalty, after_a_look, in_halves]


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("count", [1, 4])
def test_a_loss_may_have_several_backward_passes(passes, count):
    model = network()
    optimizer = MuonAdam(model, step_size=Momo(0.5))
    for step in range(2):
        optimizer.zero_grad()
        for loss in parts_of(model, step, count):
            optimizer.record_loss(loss, weight=1 / count)
            passes(loss / count, list(model.parameters()))
        optimizer.step()
    assert optimizer.diagnostics()["skipped_steps"] == 0


@pytest.mark.parametrize("passes", [in_two_passes, with_a_penalty, after_a_look])
def test_a_part_that_was_divided_is_refused_whatever_its_passes(passes):
    model = network()
    optimizer = MuonAdam(model, step_size=Momo())
    for loss in parts_of(model, 0):
        divided = loss / 4
        optimizer.record_loss(divided, weight=1 / 4)
        passes(divided, list(model.parameters()))
    with pytest.raises(ValueError, match=r"told weight=0\.25, but backward multiplied this loss by 2"):
        optimizer.step()


def test_parts_may_be_divided_in_their_gradients():
    model = network()
    optimizer = MuonAdam(model, step_size=Momo(0.5))
    for step in range(2):
        optimizer.zero_grad()
        for loss in parts_of(model, step):
            optimizer.record_loss(loss, weight=1 / 4)
            loss.backward()
        for parameter in model.parameters():
            parameter.grad.div_(4)
        optimizer.step()


@pytest.mark.parametrize("way", ["recorded", "explicit"])
def test_a_first_loss_of_parts_below_the_bound_is_asked_about_at_once(way):
    model = network()
    optimizer = MuonAdam(model, step_size=Momo(0.8))
    total = 0.0
    for loss in parts_of(model, 0):
        (loss / 4).backward()
        if way == "recorded":
            optimizer.record_loss(loss.detach() / 4, weight=1 / 4)
        total = loss.detach() / 4
    with pytest.warns(UserWarning, match=r"below Momo's lower_bound 0\.8.*Was it divided by the number of") as told:
        optimizer.step(loss=None if way == "recorded" else total)
    assert told[0].filename == __file__
    assert optimizer.diagnostics()["t"] == 0


def test_a_loss_that_falls_far_below_the_others_and_the_bound_is_asked_about_once():
    model = network()
    optimizer = MuonAdam(model, 1e-4, step_size=Momo(0.8))
    for step in range(3):
        optimizer.zero_grad()
        optimizer.step(loss=backward(model, step))
    loss = backward(model, 3).detach()
    with pytest.warns(UserWarning, match=r"far below .*the average of recent ones\. Was it divided"):
        optimizer.step(loss=loss / 4)
    optimizer.step(loss=loss / 4)


@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
def test_a_loss_that_all_ranks_have_is_read_and_a_part_of_one_is_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        found = []
        for wrap in (lambda loss: loss, lambda loss: DTensor.from_local(loss, mesh, [Replicate()])):
            model, optimizer = build()
            for index in range(4):
                x, y = batch(index // 2)
                loss = wrap(nn.functional.cross_entropy(model(x), y))
                optimizer.record_loss(loss, weight=0.5)
                (loss / 2).backward()
                if index % 2:
                    optimizer.step()
                    optimizer.zero_grad()
            found.append(optimizer.diagnostics())
            loss = wrap(nn.functional.cross_entropy(model(x), y))
            optimizer.record_loss(loss)
            (loss / 2).backward()
            with pytest.raises(ValueError, match="told weight=1, but backward multiplied"):
                optimizer.step()
            optimizer.step(loss=loss)
        assert found[0] == found[1]
        for placement in (Partial("avg"), Partial("sum"), Shard(0)):
            loss = DTensor.from_local(torch.ones(1), mesh, [placement])
            with pytest.raises(
                ValueError, match=r"step takes .* placements .*, of which each rank has a part\. Pass loss"
            ):
                check_loss("step", loss)
            assert float(check_loss("step", loss.full_tensor())) == 1
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("way", ["told", "divided", "divided and told", "divided, scaled and told"])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_window_shorter_than_its_losses_were_divided_by_is_a_smaller_gradient_of_the_mean(way, scale):
    """Two micro-batches whose losses were divided by three: as one batch, whose gradient is clipped to two thirds."""
    wide = torch.float64
    trajectories = []
    for short in (False, True):
        model, optimizer = build(wide)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)

        def loss(index, part, model=model):
            x, y = batch(index, wide)
            return nn.functional.cross_entropy(model(x[part]), y[part])

        def in_parts(index, loss=loss, optimizer=optimizer, scaler=scaler):
            for part in (slice(0, 4), slice(4, 8)):
                own = loss(index, part)
                if way == "told":
                    optimizer.record_loss(own, weight=1 / 3)
                    scaler.scale(own / 3).backward()
                else:
                    own = own / 3
                    given = scaler.scale(own)
                    told = {"weight": 1 / 3} if "told" in way else {}
                    told |= {"scale": scaler.get_scale()} if "scaled" in way else {}
                    optimizer.record_loss(given if "scaled" in way else own, **told, already_divided=True)
                    given.backward()
            scaler.step(optimizer)
            scaler.update()

        def whole(index, loss=loss, optimizer=optimizer):
            own = loss(index, slice(0, 8))
            (own * 2 / 3).backward()
            optimizer.step(loss=0.5 + (own - 0.5) * 2 / 3 if way != "divided" else own * 2 / 3)

        trajectories.append(weights_after(model, optimizer, in_parts if short else whole))
    for a, b in zip(*trajectories, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_short_window_is_no_forgotten_micro_batch():
    model, optimizer = build()
    x, y = batch(0, torch.float32)
    losses = [nn.functional.cross_entropy(model(x[part]), y[part]) for part in (slice(0, 4), slice(4, 8))]
    optimizer.record_loss(losses[0], weight=1 / 3)
    for loss in losses:
        (loss / 3).backward()
    with pytest.raises(ValueError, match=r"1 recorded losses have weights that sum to 0\.333333 instead of 1"):
        optimizer.step()


def test_a_weight_that_is_not_what_a_short_window_was_divided_by_is_refused():
    model, optimizer = build()
    loss = nn.functional.cross_entropy(model(batch(0, torch.float32)[0]), batch(0, torch.float32)[1])
    optimizer.record_loss(loss, weight=1 / 4)
    (loss / 3).backward()
    with pytest.raises(ValueError, match=r"told weight=0\.25, but backward multiplied this loss by 0\.333333"):
        optimizer.step()


def test_a_loss_that_was_not_divided_is_not_taken_for_one_that_was():
    model, optimizer = build()
    loss = nn.functional.cross_entropy(model(batch(0, torch.float32)[0]), batch(0, torch.float32)[1])
    optimizer.record_loss(loss, already_divided=True)
    (loss / 3).backward()
    with pytest.raises(ValueError, match=r"is already divided, but backward multiplied it by 0\.333333 besides"):
        optimizer.step()


def test_weights_are_told_of_all_micro_batches_or_of_none():
    tap = LossTap()
    tap.record(1.0, already_divided=True)
    with pytest.raises(ValueError, match="of some micro-batches of a step only"):
        tap.record(1.0, 0.5)


def test_losses_that_were_divided_add_up_and_are_forgotten_with_their_gradients():
    tap, weight = LossTap(), torch.ones((), requires_grad=True)
    for _ in range(2):
        loss = weight * 2
        tap.record(loss, already_divided=True)
        loss.backward()
    tap.gradients_cleared()
    for number in (0.25, 0.5):
        tap.record(number, already_divided=True)
    assert tap.take() == (0.75, 1.0)


def test_a_short_window_whose_step_was_passed_over_is_forgotten_with_its_gradients():
    tap, weight = LossTap(), torch.ones((), requires_grad=True)
    loss = weight * 2
    tap.record(loss, 1 / 3, already_divided=True)
    loss.backward()
    tap.gradients_cleared()
    for _ in range(3):
        tap.record(0.25, 1 / 3, already_divided=True)
    assert tap.take() == (0.75, 1.0)


@pytest.mark.parametrize("weight", [None, 0.5])
def test_gradients_may_be_cleared_between_the_first_loss_and_its_backward(weight):
    tap, parameter = LossTap(), torch.ones((), requires_grad=True)
    for _ in range(2):  # the first window's step is passed over, and its losses go with their gradients
        for place, number in enumerate((0.25, 0.5)):
            loss = parameter * number
            tap.record(loss, weight, already_divided=True)
            if place == 0:
                tap.gradients_cleared()
            loss.backward()
    assert tap.take() == (0.75, 1.0)


def test_a_loss_that_was_scaled_is_held_to_what_backward_was_called_on():
    model, optimizer = build()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = scaler.scale(nn.functional.cross_entropy(model(batch(0, torch.float32)[0]), batch(0, torch.float32)[1]))
    optimizer.record_loss(loss, already_divided=True, scale=scaler.get_scale())
    (loss / 3).backward()
    with pytest.raises(ValueError, match=r"is already divided, but backward multiplied it by 0\.333333 besides"):
        scaler.step(optimizer)


def test_a_scale_is_a_positive_number():
    with pytest.raises(ValueError, match=r"record_loss takes a finite scale above 0, got 0\.0"):
        LossTap().record(1.0, scale=0.0)
    with pytest.raises(TypeError, match=r"takes a number as scale, such as scaler\.get_scale\(\), got None"):
        LossTap().record(1.0, scale=None)


@pytest.mark.parametrize("stopped", [False, True])
def test_backward_passes_inside_of_one_are_parts_of_it(stopped):
    """A reentrant checkpoint has a pass of its own, and one that was stopped by an error leaves nothing behind."""
    model, optimizer = build()
    x, y = batch(0, torch.float32)

    def passes_of(model):
        hidden = model[0](x)
        loss = nn.functional.cross_entropy(checkpoint(model[1:], hidden, use_reentrant=True), y)
        optimizer.record_loss(loss, weight=1 / 3)
        return loss, hidden

    if stopped:
        loss, hidden = passes_of(model)
        hidden.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            (loss / 3).backward()
        optimizer.zero_grad()
    (passes_of(model)[0] / 3).backward()
    optimizer.step()
    assert optimizer.diagnostics()["t"] > 0
    loss, _ = passes_of(model)
    (loss / 3).backward()
    (nn.functional.cross_entropy(model(x), y) / 3).backward()  # which nobody recorded
    with pytest.raises(ValueError, match="1 recorded losses have weights that sum"):
        optimizer.step()
