"""A run that is saved under 4 ranks goes on under 2, on one process, and back, as if it had never been stopped."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.cases import cases
from tests.parallel.test_trajectories import JUDGED, TOLERANCE, check_alike, kept, numbers
from tests.parallel.training import STEPS, built, deviation, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed"),
]
HALF, LATER = STEPS // 2, STEPS * 3 // 4


def save(laid, optimizer, folder):
    """In the three ways that torch has: parts of all ranks in one checkpoint, one whole, and each rank's own."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    dcp.save(named(get_state_dict(laid.model, optimizer)), checkpoint_id=f"{folder}/parts")
    whole = get_state_dict(laid.model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank() == 0:
        torch.save(named(whole), f"{folder}/whole.pt")
    torch.save((laid.net.state_dict(), optimizer.state_dict()), f"{folder}/{rank()}.pt")


def load(laid, optimizer, folder, way):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    for parameter in laid.net.parameters():
        parameter.data.zero_()  # so that nothing is right by chance
    if way == "own":
        weights, state = torch.load(f"{folder}/{rank()}.pt", weights_only=True)
        laid.net.load_state_dict(weights)
        optimizer.load_state_dict(state)
        return
    if way == "parts":
        found = named(get_state_dict(laid.model, optimizer))
        dcp.load(found, checkpoint_id=f"{folder}/parts")
    else:
        found = torch.load(f"{folder}/whole.pt", weights_only=True)
    set_state_dict(
        laid.model,
        optimizer,
        model_state_dict=found["model"],
        optim_state_dict=found["optimizer"],
        options=StateDictOptions(full_state_dict=way == "whole"),
    )


def named(pair):
    return dict(zip(("model", "optimizer"), pair, strict=True))


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def go_on(method, layout, file, steps, *, start=None, stop=None):
    """Train; load before the first step, save after a later one.

    Args:
        method: One of METHODS.
        layout: One of LAYOUTS.
        file: Weights of one process.
        steps: The first, and one past the last.
        start: Folder to load from, and which way.
        stop: Step to save after, and the folder.

    Returns:
        The largest deviation from one process that was never stopped, and what is kept.
    """
    laid, optimizer = built(method, layout)
    with warnings.catch_warnings():  # torch's own, about its checkpoint format
        warnings.simplefilter("ignore")
        if start is not None:
            load(laid, optimizer, *start)
        for step in train(laid, optimizer, range(*steps)):
            if stop is not None and step + 1 == stop[0]:
                Path(stop[1]).mkdir(exist_ok=True)
                save(laid, optimizer, stop[1])
    return deviation(laid, layout, torch.load(file, weights_only=True)[-1]), (kept(laid, layout), numbers(optimizer))


def check(answers):
    for (distance, name), _ in answers:
        assert distance <= TOLERANCE, f"{name} is {distance:.2g} off"
    check_alike([found for _, found in answers])


# Every method on shards, every layout with everything at once; and where each goes on, on 2 ranks.
CHAINS = [(method, "fsdp", "fsdp") for method in JUDGED]
CHAINS += [
    ("everything", *layouts)
    for layouts in [
        ("ddp", "fsdp"),
        ("fsdp", "ddp"),
        ("hsdp", "fsdp"),
        ("fsdp_tensor", "tensor"),
        ("experts", "experts"),
        ("experts_copied", "copies"),
        ("experts_fsdp", "fsdp"),
    ]
]


@cases("method, four, two", CHAINS)
def test_a_run_goes_on_under_any_number_of_ranks(world, reference, tmp_path, method, four, two):
    file, (half, later, alone) = reference(method, given=False), (str(tmp_path / n) for n in ("half", "later", "alone"))
    whole_run = world(4).run(call, method, four, file, (0, STEPS), {"stop": (HALF, half)})
    check(whole_run)
    again = world(4).run(call, method, four, file, (HALF, STEPS), {"start": (half, "own")})
    assert again == whole_run, "resuming on the same ranks is exact to the bit"
    check(world(2).run(call, method, two, file, (HALF, STEPS), {"start": (half, "parts"), "stop": (LATER, later)}))
    check(world(2).run(call, method, two, file, (HALF, STEPS), {"start": (half, "whole")}))
    check([call(method, "alone", file, (HALF, STEPS), {"start": (half, "whole"), "stop": (LATER, alone)})])
    check([call(method, "alone", file, (HALF, STEPS), {"start": (half, "parts")})])
    check(world(4).run(call, method, four, file, (LATER, STEPS), {"start": (later, "parts")}))
    way = "parts" if four == "fsdp_tensor" else "whole"  # torch cuts no whole tensor into uneven strided shards
    check(world(4).run(call, method, four, file, (LATER, STEPS), {"start": (alone, way)}))


def call(method, layout, file, steps, options):
    return go_on(method, layout, file, steps, **options)
