"""Whatever the layout, the weights are those of one process, and every matrix is worked on once."""

import collections
import functools
import hashlib
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import steepest.geometry.layer
from steepest import ColNorm, InputMoment, Momo, RadialBrake, RowFloor, Sign, Sphere, SteepestDescent, View
from tests.cases import cases
from tests.parallel.training import (
    LAYOUTS,
    METHODS,
    deviation,
    last,
    mesh_of,
    places,
    steps_given,
    steps_trained,
    weights,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed"),
]
# What rounding alone does, measured on one process whose batch is cut into 2, 3 and 4 parts: up to 7e-6.
TOLERANCE = 1e-5
SHARED = [(size, name) for size in (2, 4) for name in LAYOUTS[size]]
JUDGED = ("muon", "newton_muon", "newton_roles", "nor_muon", "muon_max", "muon_max_momo", "averages", "scion", "adam")
STAGED = ("newton_muon", "newton_roles", "nor_muon", "iso_muon", "soap_muon", "p_muon", "shampoo", "everything")
ROUNDED = ("newton_roles", "head.weight")  # libraries round products of few rows otherwise than those of all
WEIGHED = ("radial",)
BENT = ("cautious_stale", "sphere_momo", "sphere_stale")
MATRICES = {f"block.{n}.weight" for n in ("up", "down", "narrow", "wide", "rare")}
MATRICES |= {f"block.experts.{n}_proj" for n in ("gate_up", "down")}
NUMBERS = ("momo_value", "momo_bound", "momo_steps", "momo_intercept", "skipped_steps")
NUMBERS += ("momo_value_2", "momo_value_3", "momo_intercept_3")  # of several averages


def fingerprint(tensor):
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def kept(laid, layout):
    """Of each parameter: which part this rank keeps, how many numbers that are, and what they are."""
    return {
        name: (fingerprint(places(layout)[name]), weight.numel(), fingerprint(weight))
        for name, weight in weights(laid).items()
    }


def numbers(optimizer):
    """What a step knows beside tensors."""
    state = optimizer.state_dict()["param_groups"][0]
    return {key: state.get(key) for key in NUMBERS}


def check_alike(answers):
    """Copies of a part are the same to the bit, and so are the numbers."""
    parts = {}
    for parameters, _ in answers:
        for name, (part, _, content) in parameters.items():
            assert parts.setdefault((name, part), content) == content, f"copies of {name} differ"
    assert len({tuple(found.items()) for _, found in answers}) == 1, [found for _, found in answers]


def trained(method, layout, file, micro):
    """How far from one process this rank comes, where, and what it keeps."""
    laid, optimizer = last(steps_trained(method, layout, micro))
    return deviation(laid, layout, torch.load(file, weights_only=True)[-1]), (kept(laid, layout), numbers(optimizer))


def check_trained(answers):
    for (distance, name), _ in answers:
        assert distance <= TOLERANCE, f"{name} is {distance:.2g} off"
    check_alike([found for _, found in answers])


@cases("size, layout", SHARED)
@cases("method", JUDGED)
def test_ranks_with_parts_of_the_data_come_to_where_one_process_comes_with_all(world, reference, method, size, layout):
    check_trained(world(size).run(trained, method, layout, reference(method, given=False), 1))


@cases("size, layout", [(2, "ddp"), (2, "fsdp"), (4, "hsdp"), (4, "fsdp_tensor"), (4, "experts_fsdp")])
def test_gradients_of_three_micro_batches_add_up(world, reference, size, layout):
    check_trained(world(size).run(trained, "everything", layout, reference("everything", given=False), 3))


class Polars:
    """Counts the matrices whose polar factor is sought in this process."""

    def __enter__(self):
        self.count = 0
        self.plain = steepest.geometry.layer.polars

        def counted(matrices, *args, **options):
            self.count += sum(m.size(0) for m in matrices if m.numel())
            return self.plain(matrices, *args, **options)

        steepest.geometry.layer.polars = counted
        return self

    def __exit__(self, *_):
        steepest.geometry.layer.polars = self.plain


def given(method, layout, file, options):
    """The first step after which a bit is another, and whose; what this rank keeps; its work and bytes in each step."""
    expected = torch.load(file, weights_only=True)
    shown, first, work, sent = places(layout), None, [], []
    for step, (laid, optimizer) in enumerate(counted_steps(method, layout, options, work)):
        for name, own in weights(laid).items():
            due = expected[step][name].flatten()[shown[name]]
            same = torch.allclose(own, due, rtol=0, atol=1e-6) if (method, name) == ROUNDED else torch.equal(own, due)
            if first is None and not same:
                first = f"step {step}: {name} by {(own - due).abs().max():.2g}"
        sharing = optimizer.sharing
        assert sharing.orthogonalised >= work[-1]
        sent.append(sharing.sent_bytes)
    told = {"owners": dict(sharing.owners), "ranks": sharing.ranks, "flops": sharing.flops, "off": sharing.imbalance}
    return first, (kept(laid, layout), numbers(optimizer)), work, sent, told


def counted_steps(method, layout, options, work):
    with Polars() as polars:
        for found in steps_given(method, layout, **options):
            work.append(polars.count)
            polars.count = 0
            yield found


@functools.cache
def work_alone(method):
    work = []
    for _ in counted_steps(method, "alone", {}, work):
        pass
    return work


@cases("size, layout", SHARED)
@cases("method", METHODS)
def test_the_same_gradients_make_the_same_bits(world, reference, method, size, layout):
    answers = world(size).run(given, method, layout, reference(method, given=True), {})
    firsts = [first for first, *_ in answers]
    assert firsts == [None] * size, firsts
    check_alike([found for _, found, *_ in answers])
    check_work(method, layout, answers)


def check_work(method, layout, answers):
    """Each matrix is worked on once in the world, and as many bytes move as the documentation says."""
    _, found, work, sent, told = (list(part) for part in zip(*answers, strict=True))
    size = len(answers)
    alone, together = work_alone(method), [sum(own) for own in zip(*work, strict=True)]
    assert all(each["ranks"] == size for each in told)
    assert all(
        each["off"] == (max(each["flops"]) * size / sum(each["flops"]) if any(each["flops"]) else 1) for each in told
    )
    if layout == "fsdp_tensor":  # what tensor parallelism leaves alone is kept by each column for itself
        assert all(once <= both <= 2 * once for once, both in zip(alone, together, strict=True))
        return
    assert together == alone
    assert all(each == told[0] for each in told)
    if method == "adam":
        assert set(told[0]["owners"].values()) == {None}
    elif any(alone):
        assert all(max(own) < most for most, own in zip(alone, zip(*work, strict=True), strict=True)), "one did it all"
    if method in STAGED:  # what stages keep travels, too
        return
    parts = [{name: (part, count) for name, (part, count, _) in parameters.items()} for parameters, _ in found]
    for step, moved in enumerate(zip(*sent, strict=True)):
        moving = [
            name
            for name, owners in told[0]["owners"].items()
            if owners is not None and not name.startswith(("block.idle", "block.frozen"))
            if name != "block.rare.weight" or step % 3 == 0
        ]
        due = [bytes_due(name, [own[name] for own in parts], told[0]["owners"][name], method) for name in moving]
        assert sum(moved) == sum(due), f"{moved} are not {dict(zip(moving, due, strict=True))} in step {step}"


def bytes_due(name, parts, owners, method):
    """Of a parameter in float32: to each owner the parts that it lacks, from it to each keeper of a part that part.

    Args:
        name: Of the parameter; what is no matrix has a norm of Adam's, whose second moment goes to the owner, too.
        parts: Of each rank, which one it keeps, and how many numbers.
        owners: Several work on one distinct part each.
        method: Stages that see weights need these at the owner; some decays and Momo on spheres need directions by
            themselves at the keepers, before they are as long as the step.
    """
    sent = 1 + (method in WEIGHED if name in MATRICES else 1)
    returned = 1 + (method in BENT and not name.endswith((".bias", ".gain.weight")))
    distinct = dict(parts)
    if len(owners) > 1:
        assert sorted(parts[owner][0] for owner in owners) == sorted(part for part, count in distinct.items() if count)
        return 4 * returned * (sum(count for _, count in parts) - sum(distinct.values()))
    (owner,) = owners
    out = sum(distinct.values()) - parts[owner][1]
    back = sum(count for rank, (_, count) in enumerate(parts) if rank != owner)
    return 4 * (out * sent + back * returned)


@cases("options", [{"memory_cap": 1}, {"memory_cap": 10**9}], ids=["many loads", "one load"])
@cases("size, layout", [(2, "ddp"), (4, "fsdp"), (4, "experts_copied")])
def test_loads_of_any_size_make_the_same_bits(world, reference, options, size, layout):
    answers = world(size).run(given, "muon", layout, reference("muon", given=True), options)
    assert [first for first, *_ in answers] == [None] * size
    check_work("muon", layout, answers)


def narrow_wire(layout, file):
    expected = torch.load(file, weights_only=True)[-1]
    laid, optimizer = last(steps_given("muon", layout, exchange_dtype=torch.bfloat16))
    return deviation(laid, layout, expected), (kept(laid, layout), numbers(optimizer)), optimizer.sharing.sent_bytes


@cases("size, layout", [(2, "ddp"), (4, "hsdp")])
def test_half_the_bytes_move_in_bfloat16_and_copies_stay_alike(world, reference, size, layout):
    file = reference("muon", given=True)
    full = world(size).run(given, "muon", layout, file, {})
    half = world(size).run(narrow_wire, layout, file)
    assert [2 * sent for _, _, sent in half] == [sent[-1] for _, _, _, sent, _ in full]
    check_alike([found for _, found, _ in half])
    assert all(1e-5 < distance < 0.05 for (distance, _), _, _ in half)


# Stored shapes and how they are matrices; some boxes of some placements are whole matrices, others cut through them.
VIEWS = {
    "one row": ((1, 9), View()),
    "tall": ((13, 3), View()),
    "wide": ((3, 17), View()),
    "heads": ((12, 5), View(heads=4)),
    "heads read": ((5, 12), View(heads=4, heads_dim="in")),
    "fused": ((18, 5), View(split=(6, 6, 6))),
    "grouped queries": ((24, 5), View(split=(12, 6, 6), heads=(4, 2, 2))),
    "alternating": ((16, 5), View(split=(8, 8), interleave=4)),
    "experts": ((4, 5, 3), View(experts=True)),
    "odd experts": ((5, 4, 6), View(experts=True, transposed=True, split=(3, 3))),
    "groups": ((8, 3, 2, 2), View(groups=2)),
    "transposed": ((6, 10), View(transposed=True, heads=2)),
}
LINES = {1: [[Shard(0)], [Shard(1)], [Shard(-1)], [Replicate()]]}
LINES[2] = [
    [Shard(0), Shard(1)],
    [Shard(1), Shard(0)],
    [Shard(0), Shard(0)],
    [Replicate(), Shard(0)],
    [Shard(1), Replicate()],
    [Replicate(), Replicate()],
]
RULES = {
    "spectral": lambda groups: SteepestDescent(groups, lr=0.1, nesterov=True, weight_decay=0.1),
    "columns": lambda groups: SteepestDescent(groups, lr=0.1, norms={"matrix": ColNorm()}),
    "sum of all": lambda groups: SteepestDescent(groups, lr=0.01, product="sum", regularized=True),
    "momo": lambda groups: SteepestDescent(groups, lr=0.1, step_size=Momo(1.5, bookkeeping="direct")),
    "radial": lambda groups: SteepestDescent(groups, lr=0.1, stages=[RowFloor(0.9), RadialBrake()]),
    "sphere": lambda groups: SteepestDescent(groups, lr=0.1, weight_decay=Sphere(relative=True), step_size=Momo(1.5)),
}


def placed(rule, dimensions):
    """Steps of parameters of all views in all placements at once; None for placements: of one process."""
    groups, wholes = [], []
    lines = LINES[dimensions]
    mesh = mesh_of(*("rows", "columns")[:dimensions]) if dist.is_initialized() else None
    generator = torch.Generator().manual_seed(3)
    for placements, (shape, view) in itertools.product(lines, VIEWS.values()):
        start = torch.randn(shape, generator=generator)
        own = start if mesh is None else distribute_tensor(start, mesh, placements)
        wholes.append([torch.randn(shape, generator=generator) for _ in range(4)])
        groups.append({"params": [nn.Parameter(own)], "view": view, "role": "matrix"})
    optimizer = RULES[rule](groups)
    for step in range(4):
        for group, gradients in zip(groups, wholes, strict=True):
            (p,) = group["params"]
            p.grad = gradients[step] if mesh is None else distribute_tensor(gradients[step], mesh, p.placements)
        optimizer.step(loss=2.0)
    found = [group["params"][0].detach() for group in groups]
    t = optimizer.diagnostics().get("t", 0.5)
    assert 0 < t < 1
    return [(w if mesh is None else w.full_tensor()).tolist() for w in found]


@cases("rule", RULES)
@cases("size, dimensions", [(2, 1), (4, 1), (4, 2)])
def test_any_view_in_any_placement_makes_the_same_step(world, size, dimensions, rule):
    expected = placed(rule, dimensions)
    names = list(itertools.product(map(str, LINES[dimensions]), VIEWS))
    # A dual norm is a sum in float32, whose order depends on how heads lie in memory.
    tolerance = 1e-6 if rule in ("sum of all", "momo", "sphere", "radial") else 0
    for found in world(size).run(placed, rule, dimensions):
        pairs = zip(names, map(torch.tensor, found), map(torch.tensor, expected), strict=True)
        assert [name for name, a, b in pairs if (a - b).norm() > tolerance * b.norm()] == []


def read(placements):
    """Three steps of a table and of heads with a diagonal and, if rows stay whole, a full moment; None: one process."""
    mesh, generator = mesh_of("shard") if placements else None, torch.Generator().manual_seed(0)
    names = {"table": "embedding", "diagonal": "head", "full": "head"}
    if placements and placements[0].is_shard(1):
        del names["full"]
    wholes = {name: [torch.randn(5, 4, generator=generator) for _ in range(4)] for name in names}
    weights = {
        name: nn.Parameter(own[3] if mesh is None else distribute_tensor(own[3], mesh, placements))
        for name, own in wholes.items()
    }
    groups = [
        {"params": [(name, weights[name]) for name in names if names[name] == role], "role": role}
        for role in ("head", "embedding")
    ]
    groups[1]["view"] = View(transposed=True)
    options = {"roles": ("head", "embedding"), "on": "gradient", "hooks": False, "every": 1, "exponents": (1, 0)}
    moment = InputMoment(structure={"*": "full", "diagonal": "diagonal"}, **options)
    optimizer = SteepestDescent(groups, lr=0.1, norms={"head": Sign()}, precondition=moment)
    for step in range(3):
        for name, weight in weights.items():
            gradient = wholes[name][step]
            weight.grad = gradient if mesh is None else distribute_tensor(gradient, mesh, placements)
            own = torch.Generator().manual_seed(10 * step + [*names].index(name))
            x = torch.randint(5, (8, 4), generator=own)
            x = x[:, 0] if name == "table" else x.float() - 2
            optimizer.record_input(weight, x if mesh is None else x.chunk(dist.get_world_size())[dist.get_rank()])
        optimizer.step()
    return {n: (w.detach() if mesh is None else w.detach().full_tensor()).tolist() for n, w in weights.items()}


@cases("placement", [Shard(0), Shard(1), Replicate()])
def test_what_heads_and_tables_keep_is_multiplied_where_it_is(world, placement):
    for found in world(2).run(read, [placement]):
        expected = read(None)
        for name, weight in found.items():
            torch.testing.assert_close(torch.tensor(weight), torch.tensor(expected[name]), msg=name)


def cut():
    weight = nn.Parameter(distribute_tensor(torch.ones(6, 4), mesh_of("shard"), [Shard(1)]))
    options = InputMoment(roles=("head",), on="gradient", hooks=False)
    with pytest.raises(ValueError, match=r"'head' of shape \(6, 4\) is placed as \(Shard\(dim=1\),\), so that no rank"):
        SteepestDescent([{"params": [("head", weight)], "role": "head"}], precondition=options)


def test_heads_whose_rows_are_cut_are_refused_by_their_layout(world):
    world(2).run(cut)


def partial():
    mesh = mesh_of("shard")
    weight = nn.Parameter(DTensor.from_local(torch.ones(4, 3), mesh, [Partial()]))
    try:
        SteepestDescent([weight])
    except ValueError as error:
        return str(error)


def test_parts_of_sums_are_refused_by_their_layout(world):
    for told in world(2).run(partial):
        assert told is not None
        assert "Partial" in told
        assert "(4, 3)" in told
        assert "redistribute" in told


def shapes_differ():
    """Ranks that know different parameters say so instead of waiting for each other."""
    weight = nn.Parameter(torch.ones(4, 3 + dist.get_rank()))
    optimizer = SteepestDescent([weight], process_group=dist.group.WORLD)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match="do not know the same parameters"):
        optimizer.step()


def packing_differs():
    """Nor do they exchange loads of other sizes."""
    for options in (
        {"memory_cap": 1000 + dist.get_rank()},
        {"exchange_dtype": torch.bfloat16} if dist.get_rank() else {},
    ):
        weight = nn.Parameter(torch.ones(4, 3))
        optimizer = SteepestDescent([weight], process_group=dist.group.WORLD, **options)
        weight.grad = torch.ones_like(weight)
        with pytest.raises(ValueError, match="memory_cap or exchange_dtype"):
            optimizer.step()


@pytest.mark.parametrize("differ", [shapes_differ, packing_differs])
def test_ranks_with_different_parameters_or_loads_are_told(world, differ):
    world(2).run(differ)


def owners_of_layers():
    names = [f"layers.{index}.{half}" for index in range(6) for half in ("up", "down")]
    shapes = {"up": (12, 4), "down": (4, 12)}
    named = [(name, nn.Parameter(torch.ones(shapes[name.split(".")[-1]]))) for name in names]
    optimizer = SteepestDescent(named, process_group=dist.group.WORLD)
    for _, weight in named:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    return {
        half: collections.Counter(optimizer.sharing.owners[n] for n in names if n.endswith(half)) for half in shapes
    }


def test_matrices_of_one_shape_are_spread_over_ranks_which_work_on_them_at_once(world):
    for owners in world(2).run(owners_of_layers):
        assert owners == {"up": {(0,): 3, (1,): 3}, "down": {(0,): 3, (1,): 3}}
