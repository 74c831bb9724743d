"""One small network with all that is hard to share, the methods, the layouts, and training under any of them.

The network is written once and trained in every layout. What each layout does to it is what a user would do, with
torch's own parts. Which entries of a parameter a rank keeps is told here without any code of ours: numbers that count
entries are laid out likewise, and then read.
"""

import collections
import functools
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.functional import cross_entropy, silu
from torch.nn.parallel import DistributedDataParallel

from steepest import (
    Adam,
    Averages,
    Cautious,
    DiagonalMetric,
    Eigenbasis,
    Frobenius,
    InputMoment,
    Momo,
    Muon,
    MuonMax,
    NewtonMuon,
    NewtonMuonMax,
    Nuclear,
    PolarGrad,
    RadialBrake,
    RowFloor,
    RowNorm,
    RowScaling,
    Scion,
    ShampooMuon,
    ShampooPowers,
    Sphere,
    SteepestDescent,
)

STEPS, BATCH, TOKENS, WIDTH, HIDDEN, EXPERTS = 20, 96, 17, 13, 31, 4


def local(tensor):
    """What this rank keeps of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Summed(torch.autograd.Function):
    """A sum over ranks, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, t, group):
        ctx.group, t = group, t.clone()
        dist.all_reduce(t, group=group)
        return t

    @staticmethod
    def backward(ctx, gradient):
        return Summed.forward(ctx, gradient, ctx.group), None


class Experts(nn.Module):
    """Stacked experts, as transformers stores them; the last never gets a token.

    Each matrix fills whole 16 bytes: where the next one begins elsewhere, MKL's products are rounded otherwise on some
    processors than those of the same matrix alone.
    """

    is_transposed, is_concatenated = False, True

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 16, WIDTH) / WIDTH**0.5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, 8) / 8**0.5)
        self.place, self.group = 0, None  # which part of the tokens of a group of ranks are this one's; None: alone

    def forward(self, x, chosen):
        if self.group is not None:  # every rank of the group shows its tokens to all
            size, rows = dist.get_world_size(self.group), slice(self.place * len(x), (self.place + 1) * len(x))
            x, chosen = (self._summed(self._padded(t, rows, size * len(t))) for t in (x, chosen))
        gate_up, down = local(self.gate_up_proj), local(self.down_proj)
        first = self.place * len(down) if self.group is not None else 0
        y = 0 * x
        for index in range(len(down)):
            mine = chosen == first + index
            if mine.any():  # an expert without tokens gets no gradient at all
                gate, up = (x @ gate_up[index].T).chunk(2, -1)
                y = y + mine[:, None] * ((silu(gate) * up) @ down[index].T)
        return y if self.group is None else self._summed(y)[rows]

    def _summed(self, t):
        return Summed.apply(t, self.group)

    def _padded(self, t, rows, count):
        whole = t.new_zeros(count, *t.shape[1:])
        whole[rows] = t
        return whole


class Block(nn.Module):
    """Rows that nothing divides, fewer rows than ranks, a frozen layer, one that is never called, experts."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.gain = nn.Linear(WIDTH, 1, bias=False)
        self.narrow, self.wide = nn.Linear(WIDTH, 3), nn.Linear(3, WIDTH)
        self.frozen, self.idle = nn.Linear(WIDTH, WIDTH).requires_grad_(False), nn.Linear(WIDTH, TOKENS)
        self.rare = nn.Linear(5, WIDTH, bias=False)
        self.skips = True  # whether `rare` is not even called without tokens
        self.experts = Experts()

    def forward(self, h, tokens, rare):
        h = h + self.down(self.up(h).tanh())
        h = h + self.experts(h, tokens % (EXPERTS - 1))
        h = h + self.wide(self.narrow(h).tanh()) * (1 + self.gain(h))
        if rare.any() or not self.skips:
            rows = rare.nonzero().squeeze(1)
            h = h.index_add(0, rows, self.rare(h[rows, :5]))
        return h + self.frozen(h)


class Net(nn.Module):
    """Tells which direction is largest: gradients of all matrices are of full rank, or rounding would grow."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(TOKENS, WIDTH)
        self.block = Block()
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens, x, rare):
        return self.head(self.block(self.table(tokens) + x, tokens, rare))


def network():
    torch.manual_seed(5)
    return Net()


def batch(step):
    """Tokens, noise, which rows are rare (all of them in the last rank's part), and targets."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, TOKENS, (BATCH,), generator=generator)
    x = torch.randn(BATCH, WIDTH, generator=generator)
    targets = (x @ torch.randn(WIDTH, TOKENS, generator=torch.Generator().manual_seed(1))).argmax(-1)
    return tokens, x, torch.arange(BATCH) >= BATCH * 3 // 4, targets


def moments(**options):
    """Inputs are looked at in every fourth step; the second matrices of experts read what no hook sees."""
    structure = {"*": "full", "block.experts.*": "none", "block.up.*": "diagonal"}
    return InputMoment(structure=structure, every=4, **options)


ROLES = {"on": "gradient", "exponents": (0.5, 0), "roles": ("matrix", "head", "embedding")}


FAMILY = Averages.maxwell(3, 2.0, 20.0, age=15.0, later_age=5.0, between=(5, 15))
# Rates at which the network learns, and bounds at which Momo's t is now and then below one.
METHODS = {
    "muon": lambda model, **o: Muon(model, 0.02, weight_decay=0.1, **o),
    "newton_muon": lambda model, hooks=True, **o: NewtonMuon(model, 0.02, precondition=moments(hooks=hooks), **o),
    "newton_roles": lambda model, hooks=True, **o: Muon(model, 0.02, precondition=moments(hooks=hooks, **ROLES), **o),
    "nor_muon": lambda model, **o: Muon(model, 0.01, scale="match_rms_adamw", stages=[RowScaling()], **o),
    "iso_muon": lambda model, **o: MuonMax(
        model, 0.01, step_size=Momo(2.4), stages=[DiagonalMetric(exponent=0.4), RowScaling()], **o
    ),
    "soap_muon": lambda model, **o: MuonMax(
        model, 0.01, step_size=Momo(2.4), stages=[Eigenbasis(every=2), DiagonalMetric(sides="rows")], **o
    ),
    "p_muon": lambda model, **o: Muon(model, 0.02, stages=[ShampooPowers(every=2, block_size=12)], **o),
    "shampoo": lambda model, **o: ShampooMuon(
        model, 0.02, powers=ShampooPowers(0.5, every=2, block_size=12, split=True, prior=1.0), step_size=Momo(2.4), **o
    ),
    "muon_max": lambda model, **o: MuonMax(model, 0.005, weight_decay=0.1, **o),
    "muon_max_stale": lambda model, **o: MuonMax(model, 0.005, dual="stale", **o),
    "muon_max_momo": lambda model, **o: MuonMax(model, 0.01, weight_decay=0.1, step_size=Momo("auto"), **o),
    "muon_max_direct": lambda model, **o: MuonMax(
        model, 0.01, weight_decay=0.1, step_size=Momo(2.2, bookkeeping="direct"), **o
    ),
    "everything": lambda model, hooks=True, **o: NewtonMuonMax(
        model, 0.01, step_size=Momo(2.4), precondition=moments(hooks=hooks), stages=[RowScaling()], **o
    ),
    "averages": lambda model, **o: Muon(
        model, 0.05, momentum=Averages.two(0.8, 0.95, start=7), step_size=Momo(2.4), weight_decay=0.1, **o
    ),
    "averages_stale": lambda model, **o: MuonMax(
        model, 0.01, momentum=FAMILY, step_size=Momo(2.4, bookkeeping="direct"), dual="stale", weight_decay=0.1, **o
    ),
    "families": lambda model, **o: Muon(
        model, 0.02, families={"block.up.*": {"lr": 0.01}, "*.bias": {"betas": (0.9, 0.997)}, "head": {"lr": 1e-3}}, **o
    ),
    "scion": lambda model, **o: Scion(model, 0.02, **o),
    "polar_grad": lambda model, **o: PolarGrad(model, 0.05, **o),
    "adam": lambda model, **o: Adam(model, 1e-2, weight_decay=0.1, **o),
    "radial": lambda model, **o: MuonMax(model, 0.01, step_size=Momo(2.4), stages=[RowFloor(0.9), RadialBrake()], **o),
    "cautious_stale": lambda model, **o: MuonMax(
        model, 0.01, weight_decay=Cautious(0.1), step_size=Momo(2.2), dual="stale", **o
    ),
    "sphere": lambda model, **o: Muon(model, 0.02, weight_decay=Sphere(relative=True), **o),
    "sphere_momo": lambda model, **o: MuonMax(model, 0.01, weight_decay=Sphere(), step_size=Momo(2.4), **o),
    "sphere_stale": lambda model, **o: MuonMax(
        model, 0.01, weight_decay=Sphere(relative=True), step_size=Momo(2.4), dual="stale", rounding="kept", **o
    ),
    "frobenius": lambda model, **o: SteepestDescent(model, norms={"matrix": Frobenius()}, product="sum", **o),
    "rows": lambda model, **o: SteepestDescent(model, norms={"matrix": RowNorm()}, nesterov=True, **o),
    "nuclear": lambda model, **o: SteepestDescent(model, norms={"matrix": Nuclear()}, **o),
    "kept": lambda model, **o: Muon(model, 0.02, weight_decay=0.1, rounding="kept", momentum_dtype=torch.bfloat16, **o),
    "stochastic": lambda model, **o: MuonMax(model, 0.01, step_size=Momo(2.4), rounding="stochastic", **o),
}
HALVES = ("kept", "stochastic", "sphere_stale")  # of bfloat16 weights
NEWTON = ("newton_muon", "newton_roles", "everything")


@dataclass
class Laid:
    """A network in its layout.

    Args:
        model: What is called and passed to the optimizer.
        net: The network inside.
        part: Which part of every batch this rank sees, and of how many.
        options: For the optimizer.
        share: What is done with gradients after the backward passes.
        wait: Set before each backward pass of several: whether ranks exchange gradients in it.
    """

    model: nn.Module
    net: Net
    part: tuple[int, int] = (0, 1)
    options: dict = field(default_factory=dict)
    share: object = None
    wait: object = None


def alone(net):
    return Laid(net, net)


def ddp(net):
    model = DistributedDataParallel(net, find_unused_parameters=True)
    return Laid(model, net, here(), wait=lambda last: setattr(model, "require_backward_grad_sync", last))


def copies(net):
    """Plain parameters on every rank, without a module that says so."""
    net.block.skips = False
    return Laid(net, net, here(), {"process_group": dist.group.WORLD}, share=lambda: average(net))


def average(net):
    """Gradients of plain parameters are averaged by hand."""
    for parameter in net.parameters():
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def here(mesh=None):
    return (dist.get_rank(), dist.get_world_size()) if mesh is None else (mesh.get_local_rank(), mesh.size())


def sharded(net, mesh, part, **options):
    from torch.distributed.fsdp import fully_shard

    net.block.skips = False
    fully_shard(net.block, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, **options)
    return Laid(net, net, part, wait=net.set_requires_gradient_sync)


def fsdp(net):
    return sharded(net, mesh_of("shard"), here())


def hsdp(net):
    return sharded(net, mesh_of("copy", "shard"), here())


def tensor(net):
    """Columns and rows of one pair of layers, and columns of the head; all else is on every rank."""
    mesh = mesh_of("tp")
    return parallelized(Laid(net, net, options={"process_group": mesh.get_group()}), mesh)


def parallelized(laid, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {
        "block.up": ColwiseParallel(use_local_output=False),
        "block.down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(laid.net, mesh, plan)
    return laid


def fsdp_tensor(net):
    mesh = mesh_of("shard", "tp")
    parallelized(Laid(net, net), mesh["tp"])
    return sharded(net, mesh["shard"], here(mesh["shard"]))


def experts(net):
    """Experts on the ranks; all else is on every rank."""
    mesh = mesh_of("ep")
    spread(net, mesh, [Shard(0)], mesh.get_group())
    return copies(net)


def experts_copied(net):
    """Experts on two ranks, and copies of them on two others; all else is on every rank."""
    mesh = mesh_of("copy", "ep")
    spread(net, mesh, [Replicate(), Shard(0)], mesh["ep"].get_group(), mesh["copy"].get_group())
    return copies(net)


def experts_fsdp(net):
    """Experts on the ranks; all else in shards on the same ranks."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of("ep")
    own = spread(net, mesh, [Shard(0)], mesh.get_group())
    net.block.skips = False
    fully_shard(net, mesh=mesh, ignored_params=set(own))
    return Laid(net, net, here(), wait=net.set_requires_gradient_sync)


def spread(net, mesh, placements, group, copies=None):
    """Make experts of a network those of a mesh.

    Their gradients hold the tokens of all ranks of their group, of losses that are means over one rank's: the mean loss
    of all has a part of these. That is seen to where they arrive, so that Momo sees no change behind its back.
    """
    from torch.distributed.tensor import distribute_tensor

    def mean(gradient):
        own = local(gradient).clone()
        if copies is not None:
            dist.all_reduce(own, group=copies)
        return like(gradient, own / dist.get_world_size())

    module = net.block.experts
    module.group, module.place = group, dist.get_rank(group)
    for name, parameter in [*module.named_parameters()]:
        setattr(module, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, placements)))
    for parameter in module.parameters():
        parameter.register_hook(mean)
    return [*module.parameters()]


def like(sharded, own):
    """What this rank has of a tensor that lies as another does."""
    return DTensor.from_local(
        own,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=sharded.shape,
        stride=sharded.stride(),
    )


def mesh_of(*names):
    """All ranks, in two rows where there are two names."""
    size = dist.get_world_size()
    return init_device_mesh("cpu", (size,) if len(names) == 1 else (2, size // 2), mesh_dim_names=names)


LAYOUTS = {
    1: {"alone": alone},
    2: {"ddp": ddp, "copies": copies, "fsdp": fsdp, "tensor": tensor, "experts": experts},
    4: {
        "ddp": ddp,
        "fsdp": fsdp,
        "hsdp": hsdp,
        "fsdp_tensor": fsdp_tensor,
        "experts": experts,
        "experts_copied": experts_copied,
        "experts_fsdp": experts_fsdp,
    },
}
ALL = {name: layout for layouts in LAYOUTS.values() for name, layout in layouts.items()}


@functools.cache
def places(layout):
    """Which entries of each parameter this rank keeps, as indices into the whole, flattened."""
    net = network()
    for parameter in net.parameters():
        parameter.data = torch.arange(parameter.numel(), dtype=torch.float32).view(parameter.shape)
    ALL[layout](net)
    return {name: local(parameter.detach()).long() for name, parameter in net.named_parameters()}


def forward_backward(laid, step, micro=1):
    """Gradients of the whole batch's mean loss, in some micro-batches; this rank's mean loss."""
    rank, ranks = laid.part
    size = BATCH // micro // ranks
    total = 0.0
    for index in range(micro):
        rows = slice((index * ranks + rank) * size, (index * ranks + rank + 1) * size)
        *seen, targets = (t[rows] for t in batch(step))
        if laid.wait is not None:
            laid.wait(index == micro - 1)
        loss = cross_entropy(laid.model(*seen), targets)
        (loss / micro).backward()
        total += loss.detach() / micro
    if laid.share is not None:
        laid.share()
    return total


def train(laid, optimizer, steps, *, micro=1):
    for step in steps:
        optimizer.zero_grad()
        loss = forward_backward(laid, step, micro)
        optimizer.step(loss=loss)
        yield step


def give(laid, layout, step):
    """The same gradients in every layout, and the same loss in the mean; what has no gradient has none anywhere."""
    generator = torch.Generator().manual_seed(step)
    shown = places(layout)
    for name, parameter in laid.net.named_parameters():
        whole = torch.randn(parameter.shape, generator=generator) / 16  # so that Momo takes parts of steps
        if not parameter.requires_grad or name.startswith("block.idle") or (name == "block.rare.weight" and step % 3):
            parameter.grad = None
            continue
        if "experts" in name:
            whole[-1] = 0
        own = whole.flatten()[shown[name]].to(parameter.dtype)
        if isinstance(parameter, DTensor):
            own = like(parameter, own)
        parameter.grad = own
    rank, ranks = laid.part
    return 2.0 + 8.0 / (1 + step) + (rank - (ranks - 1) / 2) / 4  # so that the mean over ranks is exact


def show_inputs(laid, optimizer, step):
    """Inputs that are whole numbers, so that sums of their products are exact in any order."""
    rank, ranks = laid.part
    layers = [laid.net.block.get_submodule(name) for name in ("up", "down", "narrow", "wide", "rare")]
    if "head" in optimizer.stages[0].roles:
        layers += [laid.net.head, laid.net.table]
    generator = torch.Generator().manual_seed(500 + step)
    size = BATCH // ranks
    for layer in layers:
        x = torch.randint(-3, 4, (BATCH, layer.weight.shape[1]), generator=generator).float()
        if layer is laid.net.table:
            x = x[:, 0].long() + 3
        if layer.weight.grad is not None:
            optimizer.record_input(layer.weight, x[rank * size : (rank + 1) * size])


def built(method, layout, **options):
    laid = ALL[layout](network().bfloat16() if method in HALVES else network())
    return laid, METHODS[method](laid.model, **laid.options, **options)


def weights(laid):
    """What this rank keeps of them."""
    return {name: local(p.detach()).clone() for name, p in laid.net.named_parameters()}


def last(steps):
    """The last of some steps."""
    return collections.deque(steps, maxlen=1).pop()


def steps_trained(method, layout, micro=1, **options):
    """Network and optimizer after each step on the batches, of which each rank sees its part."""
    laid, optimizer = built(method, layout, **options)
    for _ in train(laid, optimizer, range(STEPS), micro=micro):
        yield laid, optimizer


def steps_given(method, layout, **options):
    """Network and optimizer after each step with gradients that are set by hand."""
    newton = {"hooks": False} if method in NEWTON else {}
    laid, optimizer = built(method, layout, **newton, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = give(laid, layout, step)
        if newton and step % 4 == 3:
            show_inputs(laid, optimizer, step)
        optimizer.step(loss=loss)
        yield laid, optimizer


def deviation(laid, layout, expected):
    """Largest distance of what this rank keeps from what it should be, by the norm of the whole weight; and whose."""
    worst = 0.0, ""
    for name, parameter in laid.net.named_parameters():
        reference = expected[name]
        own = reference.flatten()[places(layout)[name]]
        distance = torch.linalg.vector_norm(local(parameter.detach()) - own)
        worst = max(worst, (float(distance / torch.linalg.vector_norm(reference)), name))
    return worst
