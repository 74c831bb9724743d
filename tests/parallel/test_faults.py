"""What goes wrong on one rank: all the others know, none waits for ever, and none parts from the others."""

import copy
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import Shard, distribute_tensor

from steepest import Muon, NonFiniteError
from tests.cases import cases
from tests.parallel.test_checkpoints import load, save
from tests.parallel.test_trajectories import TOLERANCE, check_alike, kept, numbers
from tests.parallel.training import (
    METHODS,
    STEPS,
    Laid,
    built,
    deviation,
    give,
    here,
    local,
    mesh_of,
    network,
    sharded,
    show_inputs,
    train,
    weights,
)
from tests.processes import RanksFailed, World

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed"),
]
ROOT = Path(__file__).parent.parent.parent


def spoil_gradient(laid, optimizer, step):
    gradient = laid.net.block.up.weight.grad
    local(gradient).view(-1)[0] = math.nan
    return give_loss(step)


def spoil_loss(laid, optimizer, step):
    return math.inf


def refuse(laid, optimizer, step):
    optimizer.param_groups[0]["lr"] = -1.0
    return give_loss(step)


def give_loss(step):
    return 2.0 + 8.0 / (1 + step)


SPOILED = {"gradient": spoil_gradient, "loss": spoil_loss, "rate": refuse}


def spoiled(method, layout, how, on_nonfinite):
    """Three steps, of which the last rank spoils the second."""
    warnings.simplefilter("ignore")
    laid, optimizer = built(method, layout, on_nonfinite=on_nonfinite)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(3):
        optimizer.zero_grad()
        give(laid, layout, step)
        loss, before, error = give_loss(step), weights(laid), None
        mine = step == 1 and dist.get_rank() == dist.get_world_size() - 1
        if mine:
            loss = SPOILED[how](laid, optimizer, step)
        if step == 1 and (mine and how == "rate"):
            error = ValueError
        elif step == 1 and on_nonfinite == "raise":
            error = NonFiniteError
        if error is None:
            optimizer.step(loss=loss)
        else:
            with pytest.raises(error):
                optimizer.step(loss=loss)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        after = weights(laid)
        moved = [name for name in after if not torch.equal(before[name], after[name])]
        assert bool(moved) is (step != 1), moved
        assert all(weight.isfinite().all() for weight in after.values())
    return kept(laid, layout), {} if how == "rate" else numbers(optimizer)


@cases("size, layout", [(2, "ddp"), (2, "fsdp"), (4, "hsdp"), (4, "fsdp_tensor"), (4, "experts_fsdp")])
@cases("how", SPOILED)
@cases("method, on_nonfinite", [("muon", "skip"), ("muon_max_momo", "skip"), ("adam", "raise"), ("muon_max", "raise")])
def test_what_is_not_finite_on_one_rank_is_passed_over_by_all(world, size, layout, how, method, on_nonfinite):
    check_alike(world(size).run(spoiled, method, layout, how, on_nonfinite))


def lacking(layout):
    """A gradient that one of those lacks who keep copies is an error of all; of a part, it counts as zeros."""
    laid, optimizer = built("muon", layout)
    give(laid, layout, 0)
    before = weights(laid)
    if dist.get_rank() in (1, 3) if layout != "hsdp" else dist.get_rank() >= 2:  # under HSDP a whole replica
        laid.net.block.up.weight.grad = None
    if layout != "fsdp":
        with pytest.raises(ValueError, match=r"'block.up.weight' .* has a gradient on (1 of the 2|2 of the 4) ranks"):
            optimizer.step()
        return None
    optimizer.step()
    shown = [name for name, own in weights(laid).items() if not torch.equal(own, before[name])]
    assert "block.up.weight" in shown, "decay, and the other part of the matrix, move this one"
    return None


@cases("size, layout", [(2, "ddp"), (2, "copies"), (2, "fsdp"), (4, "hsdp"), (4, "copies")])
def test_a_gradient_that_some_ranks_lack(world, size, layout):
    world(size).run(lacking, layout)


def copied(layout):
    """A copy knows from its first step on who waits for it, also where that step is an error of one rank."""
    _, optimizer = built("muon", layout)
    twin = copy.deepcopy(optimizer)
    give_all(twin)
    if dist.get_rank() == 0:
        twin.param_groups[0]["lr"] = -1.0
        with pytest.raises(ValueError, match="lr"):
            twin.step()
        twin.param_groups[0]["lr"] = 0.1
    else:
        with pytest.warns(RuntimeWarning, match="another rank"):
            twin.step()
    before = [local(p).detach().clone() for group in twin.param_groups for p in group["params"]]
    twin.step()
    after = [local(p) for group in twin.param_groups for p in group["params"]]
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


def give_all(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)


@cases("layout", ["copies", "fsdp"])
def test_a_copy_does_not_leave_the_others_waiting(world, layout):
    world(2).run(copied, layout)


def thawed():
    """What is no longer frozen has owners anew on all ranks, also on those that have no gradient of it yet."""
    mesh = mesh_of("shard")
    layers = [nn.Parameter(distribute_tensor(torch.ones(6, 6), mesh, [Shard(0)])) for _ in range(3)]
    for layer in layers[:2]:
        layer.requires_grad_(False)
    optimizer = Muon(layers, 0.1)
    for step in range(4):
        layers[1].requires_grad_(step > 0)
        give_all(optimizer)
        if step < 3 and dist.get_rank() == 1:
            layers[1].grad = None
        optimizer.step()
        optimizer.zero_grad()


def test_a_parameter_that_thaws_may_have_its_first_gradient_on_some_ranks(world):
    world(2).run(thawed)


def mourned(layout, folder, victim, patience):
    """Two steps, and a checkpoint; then a rank is killed, and the others end with an error, in time."""
    laid, optimizer = built("muon_max_momo", layout)
    for step in range(3):
        optimizer.zero_grad()
        loss = give(laid, layout, step)
        if step < 2:
            optimizer.step(loss=loss)
            continue
        save(laid, optimizer, folder)
        if dist.get_rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(RuntimeError):
            optimizer.step(loss=loss)
        assert time.monotonic() - start < patience + 5


@cases("layout", ["ddp", "fsdp"])
def test_when_a_rank_is_killed_the_others_end_in_time_and_the_checkpoint_loads(reference, tmp_path, layout):
    own, patience = World(4, patience=10), 10
    with pytest.raises(RanksFailed) as told:
        own.run(mourned, layout, str(tmp_path), 2, patience, grace=30)
    assert told.value.errors == [None, None, "ended", None]
    for way in ("parts", "whole"):
        laid, optimizer = built("muon_max_momo", "alone")
        with warnings.catch_warnings():  # torch's own, about its checkpoint format
            warnings.simplefilter("ignore")
            load(laid, optimizer, str(tmp_path), way)
        expected = torch.load(reference("muon_max_momo", given=True), weights_only=True)
        assert deviation(laid, "alone", expected[1])[0] == 0
        optimizer.step(loss=give(laid, "alone", 2))
        assert deviation(laid, "alone", expected[2])[0] <= 1e-6


def offloaded(method, file):
    """FSDP2's offload of parameters: on a machine without an accelerator they move from the CPU to the CPU."""
    net = sharded(network(), mesh_of("shard"), here(), offload_policy=CPUOffloadPolicy(pin_memory=False)).net
    laid = Laid(net, net, here())
    optimizer = METHODS[method](net)
    for _ in train(laid, optimizer, range(STEPS)):
        pass
    kept_on = {t.device.type for state in optimizer.state.values() for t in state.values()}
    assert kept_on == {p.device.type for p in net.parameters()} == {"cpu"}
    return deviation(laid, "fsdp", torch.load(file, weights_only=True)[-1])


@cases("method", ["everything", "adam"])
def test_parameters_that_fsdp_offloads_take_the_same_steps(world, reference, method):
    for distance, name in world(2).run(offloaded, method, reference(method, given=False)):
        assert distance <= TOLERANCE, f"{name} is {distance:.2g} off"


def asked_alone(method, layout):
    """What the first rank asks alone, the others need not hear of."""
    laid, optimizer = built(method, layout, **({"hooks": False} if method == "newton_muon" else {}))
    for step in range(4):
        loss = give(laid, layout, step)
        if method == "newton_muon":
            show_inputs(laid, optimizer, step)
        optimizer.step(loss=loss)
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            assert optimizer.diagnostics()["skipped_steps"] == 0
            assert str(optimizer.plan)
            assert optimizer.sharing.ranks == dist.get_world_size()
            assert optimizer.state_dict()["state"]
    dist.barrier()


@cases("method, layout", [("muon", "fsdp"), ("newton_muon", "fsdp"), ("muon_max_momo", "ddp"), ("newton_muon", "ddp")])
def test_one_rank_may_ask_alone(world, method, layout):
    world(2).run(asked_alone, method, layout)


def test_torchrun_trains_as_one_process_does(reference, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "from tests.parallel.training import deviation, last, steps_trained\n"
        "torch.set_num_threads(1)\n"
        "dist.init_process_group('gloo')\n"
        "laid, optimizer = last(steps_trained('everything', 'fsdp'))\n"
        f"expected = torch.load({reference('everything', given=False)!r}, weights_only=True)[-1]\n"
        "with open(f'off.{dist.get_rank()}', 'w') as file:\n"  # two ranks that print may print into one line
        "    print(*deviation(laid, 'fsdp', expected), file=file)\n"
        "dist.destroy_process_group()\n"
    )
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [(tmp_path / f"off.{rank}").read_text().split() for rank in range(2)]
    assert all(float(distance) <= TOLERANCE for distance, _ in found), found
