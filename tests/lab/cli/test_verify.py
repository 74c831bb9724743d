"""`steepest verify`: ranks and one process, in real processes; and what is refused before one is started."""

import json
import os
import re
import signal
import sys
import time

import msgspec
import pytest
import torch
import torch.distributed as dist
from torch import nn

from steepest.lab.cli import main
from steepest.lab.errors import Failure, UsageError
from steepest.lab.models.brought import Brought, brought, leaves, mapped, share
from steepest.lab.runs.verify import Job, Layout, RankReport, _late, _run, read_layout
from tests.cases import cases

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")

MODELS = '''
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor


def uneven():
    layers = [nn.Linear(13, 31), nn.Linear(31, 17), nn.Linear(17, 3)]
    layers[1].weight.requires_grad_(False)
    return nn.Sequential(*layers)


class Nested(nn.Module):
    """Blocks with blocks in them, one of them twice, and a layer that is never called."""

    def __init__(self):
        super().__init__()
        inner = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.blocks = nn.ModuleList([nn.ModuleDict({"inner": inner}), nn.ModuleDict({"inner": inner})])
        self.idle = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            for layer in block["inner"]:
                x = layer(x).tanh()
        return x


def nested():
    return Nested(), (lambda model, batch: model(batch).square().mean()), [torch.randn(4, 6) for _ in range(3)]


class Experts(nn.Module):
    is_transposed = False

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(4, 8, 6) / 3)
        self.down_proj = nn.Parameter(torch.randn(4, 6, 8) / 3)
        self.mesh = None

    def forward(self, x):
        up, down = self.up_proj, self.down_proj
        if self.mesh is not None:
            rows = DTensor.from_local(x, self.mesh, [Shard(0)]).redistribute(placements=[Replicate()])
            x = rows.to_local(grad_placements=[Partial()])
            up, down = up.to_local(), down.to_local()
            for weight in (up, down):
                weight.register_hook(lambda gradient: gradient / self.mesh.size())
        y = torch.einsum("teh,ewh->tw", torch.einsum("tw,ehw->teh", x, up).tanh(), down)
        if self.mesh is not None:
            y = DTensor.from_local(y, self.mesh, [Partial()]).redistribute(placements=[Shard(0)]).to_local()
        return y


def divide(model, mesh):
    module = model[1]
    module.mesh = mesh["ep"]
    for name, weight in [*module.named_parameters()]:
        setattr(module, name, nn.Parameter(distribute_tensor(weight.detach(), module.mesh, [Shard(0)])))


def square(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


def experts():
    model = nn.Sequential(nn.Linear(6, 6), Experts(), nn.Linear(6, 3))
    return model, square, [{"x": torch.randn(32, 6), "y": torch.randn(32, 3)} for _ in range(3)], divide


def partial():
    """The second rank's loss counts twice."""

    def loss(model, batch):
        return square(model, batch) * (2 if dist.is_initialized() and dist.get_rank() == 1 else 1)

    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), loss, experts()[2]


print("imported")
'''


def run(capfd, *words):
    try:
        code = main(words)
    except SystemExit as left:
        code = left.code
    captured = capfd.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def _models(tmp_path, monkeypatch):
    """A module in the current directory, where it is found."""
    (tmp_path / "brought_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    before = [*sys.path]
    yield
    sys.path[:] = before
    sys.modules.pop("brought_models", None)


@pytest.mark.slow
def test_shards_of_tensor_parallel_layers_are_one_process(capfd):
    code, out, _ = run(capfd, "verify", "--mesh", "fsdp=2,tp=2", "--steps", "4", "--json")
    assert code == 0
    found = json.loads(out)
    assert [one["rank"] for one in found["ranks"]] == [0, 1, 2, 3]
    assert 0 < found["deviation"] <= found["allowed"] == max(1e-5, 10 * found["rounding"])
    assert sum(one["orthogonalised"] for one in found["ranks"]) == found["alone"]["orthogonalised"] == 12
    numbers = 2 * (4 * 64 * 64 + 2 * 4 * 64 * 64)  # of two blocks' matrices: a quarter stays with the owner, each way
    assert sum(one["sent_bytes"] for one in found["ranks"]) == 2 * numbers * 3 / 4 * 4
    assert all(one["agreed_bytes"] > 0 and one["step_s"] > 0 for one in found["ranks"])
    assert found["imbalance"] == 1
    assert found["alone"]["sent_bytes"] == found["alone"]["agreed_bytes"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("_models")
@pytest.mark.parametrize("mesh", ["ep=2", "fsdp=2,ep=2"])
def test_a_function_may_divide_its_experts(capfd, mesh):
    words = ("--model", "brought_models:experts", "--mesh", mesh, "--float64", "--steps", "4")
    code, out, err = run(capfd, "verify", *words)
    assert code == 0
    assert "imported" in err  # what the user's code prints is no part of the result
    assert out.splitlines()[0].strip() == f"muon, {mesh}: 4 steps"
    assert float(re.search(r"Largest deviation (\S+) of", out)[1]) < 1e-12


@pytest.mark.slow
@pytest.mark.usefixtures("_models")
@pytest.mark.parametrize("mesh", ["ddp=2", "fsdp=2"])
def test_blocks_in_blocks_and_layers_that_are_never_called(capfd, mesh):
    code, out, err = run(capfd, "verify", "--model", "brought_models:nested", "--mesh", mesh, "--steps", "3")
    assert code == 0, out + err


@pytest.mark.slow
@pytest.mark.usefixtures("_models")
def test_drawn_gradients_are_those_of_one_process_to_the_bit(capfd):
    words = ("--model", "brought_models:uneven", "--mesh", "fsdp=2", "--steps", "3", "--method", "scion", "--json")
    code, out, _ = run(capfd, "verify", *words)
    assert code == 0
    assert json.loads(out)["deviation"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("_models")
def test_a_rank_whose_loss_is_another_is_found(capfd):
    words = ("--model", "brought_models:partial", "--mesh", "ddp=2", "--steps", "3")
    code, out, err = run(capfd, "verify", *words)
    assert code == 1
    assert "Largest deviation" in out
    assert re.search(r"error: 0\.weight is 0\.\d+ of its norm off on rank \d, and \S+ is allowed\. See with --flo", err)


LONG_S = 400.0  # as long as a machine with much else to do may take to start a process


def report(rank):
    return RankReport(rank=rank, weights="", step_s=0.0)


def test_ranks_that_begin_with_other_weights_than_the_process_alone_are_no_comparison(capfd, monkeypatch):
    def other(main, job, ranks, folder):
        return [msgspec.structs.replace(report(rank), weights=str(ranks)) for rank in range(ranks)]

    monkeypatch.setattr("steepest.lab.runs.verify._run", other)
    code, _, err = run(capfd, "verify")
    assert code == 1
    assert "Rank 0 began with other weights or batches than the process without ranks. The function of --model" in err


def breaks(rank, job, folder):
    if rank == 1:
        raise KeyError("the user's own")
    time.sleep(LONG_S)
    return report(rank)


def is_killed(rank, job, folder):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(LONG_S)
    return report(rank)


def hangs(rank, job, folder):
    (folder / f"{rank}.at").write_text("step 3")
    if rank == 1:
        time.sleep(LONG_S)
    return report(rank)


def job(**options):
    given = {"model": None, "method": "muon", "options": {}, "layout": Layout({"shard": 2}), "steps": 2, "seed": 0}
    more = {"float64": False, "device": "cpu", "threads": 1, "timeout_s": 50.0}
    return Job(**{**given, **more, **options})


@pytest.mark.slow
@cases(
    "main, timeout_s, message",
    [
        (breaks, LONG_S, r"Rank 1 failed:\nTraceback[\s\S]*KeyError: \"the user's own\""),
        (is_killed, LONG_S, r"Rank 1 was ended by SIGKILL; memory may have been short\."),
        (hangs, 15.0, r"Not done after 15 s \(--timeout\)\..* Rank 1: (step 3|start)\.$"),
    ],
)
def test_the_rank_that_failed_is_named_and_the_others_are_ended(main, timeout_s, message, tmp_path):
    started = time.monotonic()
    with pytest.raises(Failure, match=message):
        _run(main, job(timeout_s=timeout_s), 2, tmp_path)
    assert time.monotonic() - started < LONG_S


def test_who_is_late_is_told_with_the_step_that_it_is_in(tmp_path):
    (tmp_path / "0.json").write_text("{}")
    (tmp_path / "1.at").write_text("step 3")
    late = _late(tmp_path, 3, "Rank {}", 2.5)
    assert late == "Not done after 2.5 s (--timeout). Rank 1: step 3. Rank 2: start."


@pytest.mark.usefixtures("_models")
@cases(
    "words, message",
    [
        (["--mesh", "ddp=2,fsdp=2"], "take one of ddp and fsdp; hsdp=2x4 is 2 replicas of 4 shards"),
        (["--mesh", "hsdp=4"], "with ranks of 1 to 64, as in hsdp=2x2"),
        (["--mesh", "fsdp=two"], "with ranks of 1 to 64, as in fsdp=2"),
        (["--mesh", "fsdp=2,fsdp=2"], "each axis stands there once"),
        (["--mesh", "fspd=2"], "Unknown axis of --mesh 'fspd': did you mean 'fsdp'?"),
        (["--mesh", "ddp=2,tp=2"], "ddp copies plain parameters and stands alone; write fsdp beside tp and ep"),
        (["--mesh", "fsdp=1"], "--mesh fsdp=1 makes 1; it takes 2 to 64 ranks"),
        (["--mesh", "hsdp=64x64"], "makes 4096; it takes 2 to 64 ranks, each a process here"),
        (["--mesh", "ep=2,tp=2"], "ep stands alone or with fsdp"),
        (["--mesh", "ep=2"], "the small transformer has no experts. Give a --model that has."),
        (["--method", "adamw"], "--method: 'adamw' is not a method of this library; try muon or adam."),
        (["--method", "moun"], "Unknown method 'moun': did you mean 'muon'?"),
        (["--set", "lr=-1"], "lr must be finite and at least 0, got -1.0"),
        (["--model", "brought_models"], "write package.module:function, a function that takes nothing"),
        (["--model", "no_such_module:f"], "there is no module 'no_such_module' here or on PYTHONPATH"),
        (["--model", "brought_models:no_such"], "brought_models has no function 'no_such'"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_process_is_started(capfd, words, message):
    code, out, err = run(capfd, "verify", *words)
    assert code == 2
    assert message in err
    assert out == ""


def test_as_many_accelerators_as_ranks_are_needed(capfd, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    code, _, err = run(capfd, "verify", "--device", "cuda", "--mesh", "fsdp=2")
    assert code == 2
    assert "--device cuda: 2 ranks need as many GPUs, and 1 are here. Take a smaller --mesh, or --device cpu" in err


def test_layouts_are_read_in_the_order_of_the_mesh():
    assert read_layout("tp=2,hsdp=3x4") == Layout({"replicate": 3, "shard": 4, "tp": 2})
    assert (read_layout("tp=2,fsdp=4").ranks, read_layout("tp=2,fsdp=4").data) == (8, 4)
    assert read_layout("ep=2,fsdp=4").data == 8


def named(monkeypatch, made):
    monkeypatch.setattr("steepest.lab.models.brought.found_function", lambda target: lambda: made)


NET = nn.Linear(3, 3)


@cases(
    "made",
    [3, (NET, 3), (NET, 3, [torch.ones(2)]), (NET, len, [torch.ones(2)], 3), (NET, len, []), (NET, len, 3)],
)
def test_a_function_that_returns_something_else_is_told_what_to_return(made, monkeypatch):
    named(monkeypatch, made)
    with pytest.raises(UsageError, match=r"It must return a module; or \(module, loss, batches\), where loss"):
        brought("some:where", batches=2)


def test_batches_may_have_no_end(monkeypatch):
    named(monkeypatch, (NET, len, iter(lambda: torch.ones(2), None)))
    assert len(brought("some:where", batches=5).batches) == 5
    named(monkeypatch, NET)
    assert brought("some:where", batches=5) == Brought(NET)


@cases("module, what", [(nn.Dropout(0.1), "dropout"), (nn.BatchNorm1d(3), "a batch norm")])
def test_chance_in_the_forward_pass_is_refused(module, what):
    from steepest.lab.models.brought import refuse_chance

    model = nn.Sequential(NET, module)
    with pytest.raises(UsageError, match=f"'1' is {what} in training, with which ranks differ"):
        refuse_chance("some:where", model)
    module.eval()
    refuse_chance("some:where", model)


def test_a_batch_is_shared_out_by_examples():
    batch = {"x": torch.arange(8), "rest": (torch.arange(16).view(8, 2), [torch.tensor(3.0), "text"])}
    own = share("some:where", batch, part=1, parts=4)
    assert own["x"].tolist() == [2, 3]
    assert own["rest"][0].tolist() == [[4, 5], [6, 7]]
    assert own["rest"][1] == [torch.tensor(3.0), "text"]
    again = torch.cat([share("some:where", batch, part=part, parts=4)["x"] for part in range(4)])
    assert torch.equal(again, batch["x"])
    assert len([*leaves(batch)]) == 3
    assert mapped(lambda x: x + 1, batch)["rest"][1][0] == 4


@cases("batch, shown", [(torch.ones(6, 2), "6"), ((torch.ones(4), torch.ones(8)), "4, 8"), (torch.ones(()), "no")])
def test_a_batch_that_cannot_be_shared_out_is_refused(batch, shown):
    with pytest.raises(UsageError, match=f"have {shown} examples in their first dimension. All must .* multiple of 4"):
        share("some:where", batch, part=0, parts=4)


def test_weights_and_batches_make_the_fingerprint():
    first = Brought(nn.Linear(2, 2), None, [torch.ones(2)]).fingerprint()
    model = nn.Linear(2, 2)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert Brought(model, None, [torch.ones(2)]).fingerprint() == Brought(model, None, [torch.ones(2)]).fingerprint()
    assert first != Brought(model, None, [torch.ones(2)]).fingerprint()
    assert Brought(model, None, [torch.ones(2)]).fingerprint() != Brought(model, None, [torch.zeros(2)]).fingerprint()
