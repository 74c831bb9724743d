"""Plans for many ranks: held to the routes that the optimizer takes, and to what four processes measured."""

import logging
import math
import re
import time

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from steepest import Adam, Cautious, InputMoment, Muon, MuonMax, NewtonMuon, Scion, Sphere
from steepest.anatomy import route
from steepest.lab.bench.many_ranks import (
    Kept,
    Machine,
    Piece,
    Traffic,
    active_parameters,
    plan_ranks,
    read_axes,
    seconds,
)
from steepest.lab.bench.memory import peak_extra_bytes
from steepest.lab.models.gpt import GPT, GPTConfig
from steepest.lab.models.published import Sizes, decoder, published
from steepest.ranks import Route, local, volume
from steepest.ranks.boxes import full
from steepest.stages import RadialBrake, RowFloor, RowScaling
from steepest.stages.inputs import InputMoments
from tests.cases import cases
from tests.processes import join_ranks, leave_ranks

TINY = Sizes(vocabulary=50, width=32, layers=2, inner=16, heads=4, key_value_heads=2, head_size=8)
EXPERTS = Sizes(50, 32, 2, 16, 4, 2, head_size=8, experts=4, experts_per_token=2)


@cases(
    "text, world, ranks, shown",
    [
        ("fsdp=8", None, (1, 8, 1, 1), "fsdp=8"),
        ("fsdp=N", 8, (1, 8, 1, 1), "fsdp=8"),
        ("ddp=4", 4, (4, 1, 1, 1), "ddp=4"),
        ("hsdp=Nx8,tp=2", 64, (4, 8, 1, 2), "hsdp=4x8,tp=2"),
        ("ep=8,fsdp=2", None, (1, 2, 8, 1), "ep=8,fsdp=2"),
    ],
)
def test_a_layout_is_read(text, world, ranks, shown):
    axes = read_axes(text, world)
    assert (axes.replicate, axes.shard, axes.ep, axes.tp) == ranks
    assert axes.text == shown
    assert axes.ranks == math.prod(ranks)


@cases(
    "text, world, told",
    [
        ("fsdpp=8", None, "Unknown axis of --layout 'fsdpp': did you mean 'fsdp'?"),
        ("fsdp", None, "each axis stands there once, with numbers from 1 to 1,048,576 as in fsdp=2"),
        ("hsdp=8", None, "as in hsdp=2x2"),
        ("fsdp=0", None, "numbers from 1"),
        ("fsdp=2,fsdp=2", None, "each axis stands there once"),
        ("fsdp=2,hsdp=2x2", None, "of ddp, fsdp and hsdp one at most"),
        ("ddp=2,tp=2", None, "ddp copies plain parameters and stands alone"),
        ("ep=2,tp=2", None, "take ep or tp"),
        ("fsdp=N", None, "one number may be N, which is what the others leave of --world"),
        ("hsdp=NxN", 8, "one number may be N"),
        ("fsdp=N,tp=3", 8, "3 do not divide --world 8"),
        ("fsdp=4", 8, "4 are not --world 8"),
    ],
)
def test_a_layout_that_cannot_be_meant_is_refused(text, world, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        read_axes(text, world)


def rows_of(sizes):
    with torch.device("meta"):
        return {row.name.removeprefix("model.layers.0."): row for row in route(decoder(sizes, norms_of_heads=False))}


@cases(
    "text, name, mesh, placements",
    [
        ("ddp=4", "self_attn.q_proj.weight", (4,), (Replicate(),)),
        ("hsdp=2x4", "self_attn.q_proj.weight", (2, 4), (Replicate(), Shard(0))),
        (
            "fsdp=4,tp=2",
            "self_attn.q_proj.weight",
            (1, 4, 2),
            (Replicate(), _StridedShard(0, split_factor=2), Shard(0)),
        ),
        ("fsdp=4,tp=2", "mlp.down_proj.weight", (1, 4, 2), (Replicate(), Shard(0), Shard(1))),
        ("fsdp=4,tp=2", "input_layernorm.weight", (1, 4, 2), (Replicate(), Shard(0), Replicate())),
    ],
)
def test_parameters_lie_as_torch_lays_them(text, name, mesh, placements):
    assert read_axes(text).placed(rows_of(TINY)[name]) == (mesh, placements)


@cases(
    "text, name, mesh, placements",
    [
        (
            "fsdp=2,ep=2",
            "mlp.experts.gate_up_proj",
            (1, 2, 2),
            (Replicate(), _StridedShard(0, split_factor=2), Shard(0)),
        ),
        ("fsdp=4,ep=2", "mlp.experts.gate_up_proj", (1, 4, 2), (Replicate(), Shard(1), Shard(0))),
        ("fsdp=4,ep=2", "self_attn.q_proj.weight", (1, 8), (Replicate(), Shard(0))),
    ],
)
def test_experts_are_shared_out_first(text, name, mesh, placements):
    assert read_axes(text).placed(rows_of(EXPERTS)[name]) == (mesh, placements)


def test_tensor_parallelism_of_unknown_layers_is_refused():
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.experts.gate_up_proj' of shape .* Leave out tp\."):
        read_axes("tp=2").placed(rows_of(EXPERTS)["mlp.experts.gate_up_proj"])


@st.composite
def layouts(draw):
    """What ranks keep, a number that chooses an owner, and whether each box has one of its own."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    mesh = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    placements = [draw(st.sampled_from([Replicate(), *map(Shard, range(len(shape)))])) for _ in mesh]
    kept = Kept.of(shape, (tuple(mesh), tuple(placements)))
    return kept, draw(st.integers(0, 63)), draw(st.booleans())


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_what_moves_is_what_routes_say(case):
    kept, owner, split = case
    row, boxes, shape = rows_of(TINY)["self_attn.q_proj.weight"], kept.layout.boxes, kept.layout.shape
    ranks = [rank for rank, box in enumerate(boxes) if box is not None]
    if split:
        pieces = [Piece(row, box, keepers, whole=True, work=0.0) for box, keepers in kept.distinct.items()]
        owners = [keepers[owner % len(keepers)] for keepers in kept.distinct.values()]
    else:
        pieces, owners = (
            [Piece(row, full(shape), ranks, full(shape) in kept.distinct, 0.0)],
            [ranks[owner % len(ranks)]],
        )
    moved = Traffic(len(boxes))
    moved.add(pieces, owners, kept)
    sent, received = torch.zeros(2, len(boxes)), torch.zeros(2, len(boxes))
    needed = torch.zeros(len(boxes), dtype=torch.bool)
    for piece, rank in zip(pieces, owners, strict=True):
        route = Route(rank, piece.box, tuple(box if box == piece.box or not split else None for box in boxes))
        needed[rank] = True
        for place, entries in enumerate((route.out(), route.back())):
            for other, box in entries:
                source, target = (rank, other) if place else (other, rank)
                needed[source] |= place == 0
                sent[place, source] += volume(box)
                received[place, target] += volume(box)
    assert [moved.out_sent.tolist(), moved.back_sent.tolist()] == sent.tolist()
    assert [moved.out_received.tolist(), moved.back_received.tolist()] == received.tolist()
    assert moved.needed.tolist() == torch.where(needed, kept.numbers, 0).tolist()


def planned(name, text, build=Muon, **options):
    model = published(name).on_meta()
    return plan_ranks(build(model, **options), read_axes(text))


@pytest.mark.slow
@cases("text, copies", [("fsdp=64", 1), ("hsdp=4x16", 4), ("fsdp=8,tp=8", 1)])
def test_everything_is_kept_and_worked_on_once(text, copies):
    one, many = planned("llama-8b", "fsdp=1"), planned("llama-8b", text)
    replicated = 2 * 32 * 4096 + 4096  # gains, of which tensor parallelism keeps a copy in each rank
    extra = 4 * 7 * replicated if "tp" in text else 0
    assert float(many.parameters.sum()) == copies * float(one.parameters.sum()) + extra
    assert float(many.flops.sum()) == float(one.flops.sum())
    assert float(many.sent.sum()) == float(many.received.sum()) > 0
    assert float(one.sent.sum()) == 0
    assert one.imbalance == 1 <= many.imbalance
    assert one.agreed_bytes == 0 < many.agreed_bytes


def test_experts_that_lie_whole_on_ranks_stay_there():
    with torch.device("meta"):
        model = decoder(EXPERTS, norms_of_heads=False)
    four = plan_ranks(Muon(model), read_axes("fsdp=4"))
    assert four.owners["model.layers.0.mlp.experts.down_proj"] == (0, 1, 2, 3)
    assert four.owners["lm_head.weight"] is None
    matrices = sum(4 * 2 * (m * n) for m, n in [(32, 32), (16, 32), (16, 32), (32, 32)])  # q, k, v, o
    assert float(four.sent.sum()) == 2 * matrices * 3 / 4  # a quarter stays with the owner, out and back


def test_time_is_that_of_the_slowest_ranks_one_load_after_the_other():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    two = plan_ranks(Muon(model), read_axes("ddp=2"))
    [work] = [turn for turn in two.turns if turn.flops.any()]
    machine = Machine(flops=10.0, bandwidth=3.0, memory_bandwidth=7.0, tokens=5.0)
    step, training = seconds(two, machine, active=active_parameters(route(model), None))
    passes = 10 * 2 * 8 * 8 * 4 / 7
    assert step == pytest.approx(passes + float(work.flops.max()) / 10 + 8 * 8 * 4 / 3)
    assert training == 6 * 128 * 5 / 10


@cases(
    "name, billions",
    [
        ("gpt2", 0.124 - 0.001),
        ("llama-8b", 8.03 - 0.525),
        ("qwen3-moe", 3.35 - 0.311),
        ("qwen3-moe-235b", 22.2 - 0.622),
    ],
)
def test_active_parameters_are_those_of_the_cards_without_tables(name, billions):
    one = published(name)
    found = active_parameters(route(one.on_meta()), one.sizes.experts_per_token or None)
    assert found / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.slow
@cases("name, text", [("llama-70b", "hsdp=64x256"), ("qwen3-moe-235b", "hsdp=128x128"), ("gpt2", "ddp=16384")])
def test_sixteen_thousand_ranks_take_seconds(name, text):
    start = time.process_time()
    assert planned(name, text).axes.ranks == 16_384
    assert time.process_time() - start < 60


CONFIG = GPTConfig(vocabulary=131, layers=3, width=128, head_size=32)  # 131 rows are shared unevenly
FULL = InputMoment(every=8, first=0, structure="full")  # refreshed in the first step, and not in what is measured
METHODS = {
    "muon": lambda model: Muon(model, nesterov=True),
    "normuon": lambda model: Muon(model, stages=[RowScaling()]),
    "muonmax-momo": lambda model: MuonMax(model, momo=True),
    "scion": lambda model: Scion(model, exchange_dtype=torch.bfloat16),
    "adam": Adam,
    "cautious": lambda model: MuonMax(model, momo=True, weight_decay=Cautious(0.1)),
    "sphere": lambda model: Muon(model, momo=True, weight_decay=Sphere()),
    "radial": lambda model: Muon(model, stages=[RowFloor(0.4), RadialBrake()]),
    "newton-muon": lambda model: NewtonMuon(model, precondition=FULL),  # last, as its hooks stay on the model
}
MESHES = {"ddp=4": None, "fsdp=4": (4,), "hsdp=2x2": (2, 2)}


def frozen_in_part():
    torch.manual_seed(0)
    model = GPT(CONFIG)
    model.blocks[1].mlp.up.weight.requires_grad_(False)
    return model


def laid_out(text):
    model, shape = frozen_in_part(), MESHES[text]
    if shape is None:
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def bytes_of(tensors):
    """Of what this rank keeps; tensors that share their memory count once."""
    kept = {part.data_ptr(): part.nbytes for part in local([tensor.detach() for tensor in tensors]) if part.numel()}
    return sum(kept.values())


def measure_on_rank(rank, folder):
    join_ranks(rank, 4, folder)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    tokens = torch.randint(0, 131, (2, 17), generator=torch.Generator().manual_seed(rank))
    for text in MESHES:
        model = laid_out(text)
        for name, build in METHODS.items():
            where = f"{name} under {text}, rank {rank}"
            optimizer = build(model)
            for _ in range(2):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
                loss.backward()
                optimizer.step(loss=loss.detach())
            plan = plan_ranks(
                build(frozen_in_part()), read_axes(text), wire=torch.bfloat16 if name == "scion" else None
            )
            sharing = optimizer.sharing
            assert plan.owners == sharing.owners, where
            assert plan.flops.tolist() == list(sharing.flops), where
            assert plan.sent[rank] == sharing.sent_bytes, f"{where}: {plan.sent[rank]} are {sharing.sent_bytes}"
            assert plan.agreed_bytes == sharing.agreed_bytes, where
            parameters = list(model.parameters())
            assert plan.parameters[rank] == bytes_of(parameters), where
            assert plan.gradients[rank] == bytes_of([p.grad for p in parameters if p.grad is not None]), where
            state = [t for one in optimizer.state.values() for t in one.values() if isinstance(t, torch.Tensor)]
            assert float(plan.averages[rank] + plan.moments[rank]) == pytest.approx(bytes_of(state), rel=0.01), where
            powers = [t for one in optimizer.stages if isinstance(one, InputMoments) for t in one._powers.values()]
            assert plan.powers[rank] == bytes_of(powers), where
            samples = [move for entry in optimizer._record.entries for move, _ in entry.factors]
            assert plan.samples[rank] == bytes_of(samples), where
            if name in ("muon", "adam"):

                def step(optimizer=optimizer):
                    optimizer.step()
                    optimizer._record.clear()  # so that what a step keeps counts as its own

                # what gloo's threads release late is counted or not, as it happens
                temporaries = min(peak_extra_bytes(step) for _ in range(3))
                assert float(plan.memory[rank]) == pytest.approx(float(plan.kept[rank]) + temporaries, rel=0.1), where
    leave_ranks()


@pytest.mark.slow
def test_what_is_planned_is_what_four_ranks_measure(tmp_path):
    mp.start_processes(measure_on_rank, (str(tmp_path),), nprocs=4, start_method="spawn")
