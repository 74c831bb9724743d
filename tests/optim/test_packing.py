import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from steepest import Frobenius, Muon, MuonMax, Spectral, SteepestDescent
from steepest.anatomy import CONV1D, LINEAR, Bucket, Load, View, conv
from steepest.optim.packing import LARGEST_BUCKETS, SMALLEST_CAP, default_cap, loads

LAYOUTS = [((6, 4), LINEAR), ((5, 7), CONV1D), ((12, 5), View(split=(6, 2, 4))), ((6, 2, 3, 3), conv(groups=3))]
MATRICES = [1, 1, 3, 3]  # of one parameter of each layout


def bucket_of(layout, count, seed=0):
    shape, view = layout
    generator = torch.Generator().manual_seed(seed)
    return Bucket(tuple(torch.randn(shape, generator=generator) for _ in range(count)), view)


several = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=4)


@given(chosen=several)
@settings(max_examples=50, deadline=None)
def test_gathering_and_scattering_are_inverse(chosen):
    load = Load([bucket_of(LAYOUTS[place], count, seed) for seed, (place, count) in enumerate(chosen)])
    batches = load.matrices(load.parameters)
    assert len(batches) == load.batches
    for tensor, back in zip(load.parameters, load.parameter_shaped(batches), strict=True):
        assert torch.equal(tensor, back)


@given(chosen=several)
@settings(max_examples=50, deadline=None)
def test_numbers_of_matrices_go_to_their_parameters_and_back(chosen):
    load = Load([bucket_of(LAYOUTS[place], count, seed) for seed, (place, count) in enumerate(chosen)])
    sums = torch.cat([batch.sum((-2, -1)) for batch in load.matrices(load.parameters)])
    vectors = load.numbers_of_parameters(sums)
    for parameter, vector in zip(load.parameters, vectors, strict=True):
        torch.testing.assert_close(vector.sum(), parameter.sum())
    assert torch.equal(load.numbers_of_batches(vectors), sums)
    owners = [MATRICES[place] for place, count in chosen for _ in range(count)]
    repeated = load.numbers_of_parameters(load.per_matrix(torch.arange(len(owners))))
    assert [vector.tolist() for vector in repeated] == [[index] * count for index, count in enumerate(owners)]


@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    cap=st.sampled_from([None, 1, 2000, 10_000, 10**9]),
)
@settings(max_examples=60, deadline=None)
def test_every_parameter_is_in_one_load_that_fits(counts, cap):
    buckets = [bucket_of(LAYOUTS[index % 2], count, index) for index, count in enumerate(counts)]
    packed = list(loads(buckets, memory_cap=cap))
    members = [parameter for load in packed for parameter in load.parameters]
    assert list(map(id, members)) == [id(p) for bucket in buckets for p in bucket.parameters]
    if cap is None:
        assert len(packed) == 1
    else:
        assert all(sum(p.nbytes for p in load.parameters) <= cap / 4 or len(load.parameters) == 1 for load in packed)


def test_dtypes_do_not_travel_together():
    narrow = bucket_of(LAYOUTS[0], 2)
    wide = Bucket(tuple(p.double() for p in narrow.parameters), LINEAR)
    assert [len(load.parameters) for load in loads([narrow, wide], memory_cap=None)] == [2, 2]


def test_the_default_is_the_largest_bucket_and_a_half():
    small, large = bucket_of(((8, 8), LINEAR), 3), Bucket((torch.zeros(2048, 1024), torch.zeros(2048, 1024)), LINEAR)
    assert default_cap([small]) == SMALLEST_CAP
    assert default_cap([small, large]) == LARGEST_BUCKETS * 2 * 2048 * 1024 * 4


SHAPES = [(6, 4), (4, 6), (8, 3), (6, 4), (5, 5), (3, 8), (9, 4), (7,)]


def trajectory(build, steps=4):
    generator = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]
    optimizer = build(parameters)
    for step in range(steps):
        for index, parameter in enumerate(parameters):
            absent = step == 2 and index % 3 == 0  # other loads than in the step before
            parameter.grad = None if absent else torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return optimizer, [parameter.detach().clone() for parameter in parameters]


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_cap_changes_nothing_but_memory(nesterov):
    def build(cap):
        return lambda parameters: SteepestDescent(parameters, lr=0.1, nesterov=nesterov, memory_cap=cap)

    _, expected = trajectory(build(None))
    for cap in (1, 1000):
        for a, b in zip(trajectory(build(cap))[1], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_copies_pack_their_own_parameters():
    optimizer, weights = trajectory(lambda parameters: Muon(parameters, lr=0.1))
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        own = [p for group in copied.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in own]
        for parameter in own:
            parameter.grad = torch.ones_like(parameter)
        copied.step()
        assert all(not torch.equal(a, b) for a, b in zip(own, before, strict=True))
    kept = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(p.sum().item() for p in kept) == sorted(w.sum().item() for w in weights)


def test_another_norm_or_parameter_is_packed_anew():
    first, second = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    first.grad, second.grad = torch.eye(4), torch.eye(4)
    optimizer = MuonMax([first], lr=0.1)
    optimizer.step()
    optimizer.add_param_group({"params": [second]})
    before = second.detach().clone()
    optimizer.step()
    assert not torch.equal(second, before)


@pytest.mark.parametrize(("cap", "error"), [(0, ValueError), (-5, ValueError), (True, TypeError), (1.5, TypeError)])
def test_a_cap_is_positive(cap, error):
    with pytest.raises(error, match=rf"memory_cap must be (a whole number|at least 1), got {cap}\."):
        SteepestDescent([nn.Parameter(torch.ones(2, 2))], memory_cap=cap)


def test_the_cap_of_any_recipe_can_be_set_later():
    optimizer = MuonMax([nn.Parameter(torch.ones(2, 2))])
    assert optimizer.memory_cap is None
    optimizer.memory_cap = 10**6
    assert copy.deepcopy(optimizer).memory_cap == 10**6
    with pytest.raises(ValueError, match=r"memory_cap must be at least 1, got 0\."):
        optimizer.memory_cap = 0


def test_what_is_kept_for_diagnostics_does_not_depend_on_the_cap():
    numbers = []
    for cap in (1, None):
        parameters = [nn.Parameter(torch.ones(16, 16)) for _ in range(6)]
        generator = torch.Generator().manual_seed(0)
        for parameter in parameters:
            parameter.grad = torch.randn(16, 16, generator=generator)
        optimizer = SteepestDescent(parameters, lr=0.1, weight_decay=0.1, memory_cap=cap)
        optimizer.step()
        numbers.append(optimizer.diagnostics())
        assert sum(len(entry.factors) for entry in optimizer._record.entries) == 1
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)


def test_a_layer_that_went_dead_stays_finite():
    """Its momentum shrinks through the subnormal numbers to zero."""
    parameter = nn.Parameter(torch.ones(3, 4))
    optimizer = SteepestDescent([parameter], lr=0.1, momentum=0.5)
    parameter.grad = torch.ones(3, 4)
    for _ in range(200):
        optimizer.step()
        parameter.grad = torch.zeros(3, 4)
    assert parameter.isfinite().all()


def test_a_norm_may_return_what_it_was_given():
    class Same(Frobenius):
        def lmo(self, m, /, v=None):
            return m

    parameter = nn.Parameter(torch.ones(3, 4))
    optimizer = SteepestDescent([parameter], lr=0.1, norms={"matrix": Same()}, regularized=True)
    parameter.grad = torch.ones(3, 4)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], torch.full((3, 4), 0.05))


def test_every_role_has_its_orthogonality_error_whoever_shares_the_norm():
    norm = Spectral()
    parameters = [nn.Parameter(torch.eye(4)) for _ in range(2)]
    groups = [{"params": [p], "role": r, "norm": norm} for p, r in zip(parameters, ("matrix", "head"), strict=True)]
    optimizer = SteepestDescent(groups, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.eye(4)
    optimizer.step()
    assert {"matrix/orthogonality_error", "head/orthogonality_error"} <= optimizer.diagnostics().keys()


def test_a_subclass_has_its_own_directions():
    class Ones(Spectral):
        def lmo(self, m, /, v=None):
            return -torch.ones_like(m)

    parameter = nn.Parameter(torch.zeros(2, 2))
    optimizer = SteepestDescent([parameter], lr=0.1, weight_decay=0.1, norms={"matrix": Ones()})
    parameter.grad = torch.eye(2)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((2, 2), -0.1))


@pytest.mark.parametrize("decay", [0.1, torch.tensor(0.1, dtype=torch.float64)])
@pytest.mark.parametrize("nesterov", [False, True])
def test_one_pass_and_two_are_one_step(decay, nesterov):
    """A decay that is a tensor is applied in a pass of its own."""
    weights = []
    for rate in (0.1, decay):
        parameter = nn.Parameter(torch.arange(12.0, dtype=torch.float64).reshape(3, 4))
        optimizer = SteepestDescent([parameter], lr=0.5, nesterov=nesterov)
        for step in range(3):
            optimizer.param_groups[0]["weight_decay"] = rate
            parameter.grad = torch.eye(3, 4, dtype=torch.float64) + step
            optimizer.step()
        weights.append(parameter.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-12)
