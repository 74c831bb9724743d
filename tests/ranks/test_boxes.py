"""Boxes tile their tensor as torch's own chunks do, and routes bring every number where it is needed, once."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.ranks import Layout, Route, Team, boxes, volume
from steepest.ranks.boxes import full, sizes, within

if not dist.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

SHAPES = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)
MESHES = st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple)


@st.composite
def sharded(draw):
    shape, mesh = draw(SHAPES), draw(MESHES)
    kinds = st.one_of(st.just(Replicate()), st.integers(0, len(shape) - 1).map(Shard))
    return shape, mesh, [draw(kinds) for _ in mesh]


def by_chunks(shape, mesh, placements):
    """What each rank keeps of a tensor of numbers, by `torch.chunk`, one dimension of the mesh after another."""
    kept = {(): torch.arange(math.prod(shape)).view(shape)}
    for size, placement in zip(mesh, placements, strict=True):
        divided = {}
        for place, part in kept.items():
            parts = [part] * size
            if not placement.is_replicate():
                parts = list(part.chunk(size, placement.dim)) if part.size(placement.dim) else [part] * size
                parts += [part.narrow(placement.dim, 0, 0)] * (size - len(parts))
            divided |= {(*place, index): one for index, one in enumerate(parts)}
        kept = divided
    return [kept[place] for place in itertools.product(*map(range, mesh))]


@given(sharded())
@settings(max_examples=200, deadline=None)
def test_boxes_are_those_of_chunks(case):
    shape, mesh, placements = case
    numbers = torch.arange(math.prod(shape)).view(shape)
    for box, expected in zip(boxes(shape, mesh, placements), by_chunks(*case), strict=True):
        assert sizes(box) == tuple(expected.shape)
        assert torch.equal(numbers[within(box, full(shape))], expected)


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_fsdp_divides_what_tensor_parallelism_has_divided(rows, outer, inner):
    found = boxes((rows, 3), (outer, inner), [_StridedShard(0, split_factor=inner), Shard(0)])
    by_hand = by_chunks((rows, 3), (inner, outer), [Shard(0), Shard(0)])  # tensor parallelism first
    for place, box in enumerate(found):
        expected = by_hand[place % inner * outer + place // inner]
        assert sizes(box) == tuple(expected.shape)
        assert torch.equal(torch.arange(rows * 3).view(rows, 3)[within(box, full((rows, 3)))], expected)


@pytest.mark.parametrize(
    ("mesh", "placements", "message"),
    [
        ((2,), [Partial()], "holds parts of a sum"),
        ((2, 2), [Shard(0)], "needs as many placements"),
        ((2, 2), [_StridedShard(0, split_factor=2), Replicate()], "do not fit the mesh"),
    ],
    ids=str,
)
def test_what_is_no_box_is_refused(mesh, placements, message):
    with pytest.raises(ValueError, match=message):
        boxes((4, 4), mesh, placements)


def test_a_layout_that_is_not_known_is_told_with_its_placements():
    mesh = SimpleNamespace(shape=(2,), mesh=torch.arange(2), ndim=1)
    tensor = SimpleNamespace(shape=(4, 3), device_mesh=mesh, placements=(Partial(),))
    with pytest.raises(ValueError, match=r"'w' of shape \(4, 3\) is a DTensor with placements .*Partial.*redistribute"):
        Team().layout("w", tensor)


@given(sharded(), st.data())
@settings(max_examples=150, deadline=None)
def test_each_box_goes_out_once_and_comes_back_to_all(case, data):
    shape = case[0]
    kept = tuple(box if volume(box) else None for box in boxes(*case))
    keepers = [rank for rank, box in enumerate(kept) if box is not None]
    if not keepers:
        return
    owner = data.draw(st.sampled_from(keepers))
    route = Route(owner, full(shape), kept)
    covered = torch.zeros(shape, dtype=torch.int64)
    covered[within(kept[owner], full(shape))] += 1
    for sender, box in route.out():
        assert kept[sender] == box
        assert sender != owner
        covered[within(box, full(shape))] += 1
    assert torch.equal(covered, torch.ones_like(covered))
    assert sorted(rank for rank, _ in route.back()) == [rank for rank in keepers if rank != owner]
    out, back = route.numbers()
    assert out == math.prod(shape) - volume(kept[owner])
    assert back == sum(volume(kept[rank]) for rank in keepers if rank != owner)
    distinct = Layout(shape, kept, tuple(range(len(kept)))).distinct
    assert sorted(itertools.chain(*distinct.values())) == keepers
