"""Fabric trains as a plain loop does; the loss goes past its wrapper of the optimizer, which takes none."""

import os
import warnings

import pytest
import torch

import steepest
from steepest.integrations.wrapped import unwrapped
from tests.integrations.layers import METHODS, Network, batches, loss_of
from tests.integrations.plain import Watched, assert_alike, train, windows

lightning = pytest.importorskip("lightning")
from lightning.fabric.plugins import MixedPrecision  # noqa: E402 - needs the host
from lightning.fabric.plugins.environments import TorchElasticEnvironment  # noqa: E402
from lightning.fabric.strategies import DDPStrategy  # noqa: E402

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated. Methods on autograd functions:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Gradients were changed between backward and step:UserWarning"),
]
ONE = {"accelerator": "cpu", "devices": 1}


def set_up(fabric, method, way="plain", *, route="bare"):
    """A network, what Fabric makes of it, and the optimizer: made of either."""
    net = Network(way)
    if route == "bare":
        return net, *fabric.setup(net, METHODS[method](net))
    model = fabric.setup(net)
    return net, model, fabric.setup_optimizers(METHODS[method](model))


def loop(fabric, model, optimizer, cut, *, clip=None):
    """The loop of Fabric's own documentation, with the loss."""
    for window in cut:
        for place, (batch, weight) in enumerate(window):
            with fabric.no_backward_sync(model, enabled=place + 1 < len(window)):
                loss = loss_of(model, batch)
                unwrapped(optimizer).record_loss(loss, weight)
                fabric.backward(loss * weight)
        if clip is not None:
            fabric.clip_gradients(model, optimizer, max_norm=clip)
        optimizer.step()
        optimizer.zero_grad()


def reference(cut, *, clip=None, method="newton-momo"):
    net = Network()
    return train(net, METHODS[method](net), cut, loss_of, clip=clip)


@pytest.mark.parametrize("route", ["bare", "wrapped"])
@pytest.mark.parametrize("way", ["plain", "checkpointed", "reentrant", "compiled"])
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_fabric_trains_as_a_plain_loop(accumulation, clip, way, route):
    """Also where the last window of three is short, whatever its losses are divided by."""
    for divisor in (None, accumulation):
        cut = windows(batches(), accumulation, divisor=divisor)
        fabric = lightning.Fabric(**ONE)
        net, model, optimizer = set_up(fabric, "newton-momo", way, route=route)
        with Watched() as watched:
            loop(fabric, model, optimizer, cut, clip=clip)
        assert_alike(short_names(watched.trained(net)), reference(cut, clip=clip))


def short_names(trained):
    """Without those of wrappers."""
    for weights in trained.weights:
        for name in list(weights):
            weights[".".join(name.split(".")[-2:])] = weights.pop(name)
    return trained


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_gradscaler_changes_nothing(accumulation):
    class Scaled(MixedPrecision):
        """Without autocast: numbers are those of a plain loop."""

        def forward_context(self):
            return torch.autocast("cpu", enabled=False)

        def convert_input(self, data):
            return data

    cut = windows(batches(), accumulation, divisor=accumulation)
    for clip in (None, 0.2):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        fabric = lightning.Fabric(**ONE, plugins=[Scaled("16-mixed", "cpu", scaler)])
        net, model, optimizer = set_up(fabric, "newton-momo")
        with Watched() as watched:
            loop(fabric, model, optimizer, cut, clip=clip)
        assert_alike(watched.trained(net), reference(cut, clip=clip))


def test_the_wrapper_takes_no_loss_and_unwrapped_finds_what_does():
    net, _, optimizer = set_up(lightning.Fabric(**ONE), "muonmax-momo")
    loss = loss_of(net, batches()[0])
    loss.backward()
    with pytest.raises(TypeError, match="unexpected keyword argument 'loss'"):
        optimizer.step(loss=loss)
    inner = unwrapped(optimizer)
    assert type(inner) is steepest.MuonMax
    inner.step(loss=loss)
    assert len(inner.plan) == 6
    assert 0 < inner.diagnostics()["t"] <= 1


def fabric_of_ranks():
    """One that knows that this process is a rank."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{world}", "GROUP_RANK": "0"}
    warnings.filterwarnings("ignore", "Gradients were changed between backward and step")
    fabric = lightning.Fabric(
        accelerator="cpu",
        devices=world,
        strategy=DDPStrategy(process_group_backend="gloo"),
        plugins=[TorchElasticEnvironment()],
    )
    fabric.launch()
    return fabric


def trained_on_ranks(accumulation, clip, route, way):
    """A rank's part of a training in Fabric; its batches are every second one."""
    fabric = fabric_of_ranks()
    net, model, optimizer = set_up(fabric, "newton-momo", way, route=route)
    cut = windows(batches(14)[fabric.global_rank :: 2], accumulation, divisor=accumulation)
    with Watched() as watched:
        loop(fabric, model, optimizer, cut, clip=clip)
    return short_names(watched.trained(net))


@pytest.mark.parametrize("route", ["bare", "wrapped"])
@pytest.mark.parametrize(
    ("accumulation", "clip", "way"),
    [(1, None, "plain"), (3, None, "plain"), (3, 0.2, "plain"), (3, None, "checkpointed"), (3, 0.2, "compiled")],
)
def test_two_ranks_train_as_one_process(pair, accumulation, clip, way, route):
    cut = windows(batches(14), 2 * accumulation, divisor=2 * accumulation)
    for found in pair.run(trained_on_ranks, accumulation, clip, route, way):
        assert_alike(found, reference(cut, clip=clip))


def resumes_exactly(fabric, folder, method, route="bare"):
    cut = windows(batches(14)[fabric.global_rank :: 2], 2)
    net, model, optimizer = set_up(fabric, method, route=route)
    loop(fabric, model, optimizer, cut[:2])
    fabric.save(f"{folder}/saved.ckpt", {"model": model, "optimizer": optimizer})
    loop(fabric, model, optimizer, cut[2:])
    other, model, optimizer = set_up(fabric, method, route=route)
    fabric.load(f"{folder}/saved.ckpt", {"model": model, "optimizer": optimizer}, weights_only=True)
    loop(fabric, model, optimizer, cut[2:])
    return all(map(torch.equal, net.parameters(), other.parameters()))


@pytest.mark.parametrize("method", ["muon", "newton", "muonmax-momo", "newton-momo"])
def test_what_fabric_saves_resumes_exactly(tmp_path, method):
    assert resumes_exactly(lightning.Fabric(**ONE), tmp_path, method)


def resumed_on_ranks(folder, route):
    return resumes_exactly(fabric_of_ranks(), folder, "newton-momo", route)


@pytest.mark.parametrize("route", ["bare", "wrapped"])
def test_what_two_ranks_save_resumes_exactly(tmp_path, pair, route):
    assert pair.run(resumed_on_ranks, str(tmp_path), route) == [True, True]
