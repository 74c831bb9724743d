"""A run that is divided, among ranks or into micro-batches, has the losses of one process; real processes where there
are several."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from steepest.lab.cli import main
from steepest.lab.disk.ours import RunBusyError, locked
from steepest.lab.errors import UsageError
from steepest.lab.models.resnet import ResNet
from steepest.lab.models.vgg import VGG
from steepest.lab.runs.config import configure
from steepest.lab.runs.crew import Crew, ElsewhereError, LostRankError, assembled
from steepest.lab.runs.train import Interrupted, train_run
from steepest.lab.runs.trained import load_trained
from steepest.lab.tasks import make_task
from steepest.lab.tasks.windows import WindowTask
from tests.cases import cases
from tests.lab.processes import wait_for
from tests.processes import join_ranks, leave_ranks

WORLD = 2
SECONDS = {"forward_backward_s", "optimizer_s", "train_s"}
ranks = pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")


def rows(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [drop(line, SECONDS) for line in lines]


def drop(row, keys):
    return {key: value for key, value in row.items() if key not in keys}


def same_but_for_rounding(run_dir, other, *, rel=1e-5):
    """All rows, in their order; numbers of losses within the tolerance."""
    ours, theirs = rows(run_dir), rows(other)
    numbers, many = {"loss", "lr", "tuning_loss"}, {"blocks", "numbers"}
    assert [drop(row, numbers | many) for row in ours] == [drop(row, numbers | many) for row in theirs]
    for own, expected in zip(ours, theirs, strict=True):
        for key in numbers & own.keys():
            assert own[key] == pytest.approx(expected[key], rel=rel), (own, expected)
        assert own.get("blocks", []) == pytest.approx(expected.get("blocks", []), rel=10 * rel)
        assert of_weights(own) == pytest.approx(of_weights(expected), rel=1e-3)


def of_weights(row):
    """Numbers of a row that tell of weights, and not of a part of a step that one rank has done."""
    return {name: number for name, number in row.get("numbers", {}).items() if name.startswith("weights/")}


def corpus(folder):
    (path := folder / "corpus").write_bytes(bytes((i * i // 7) % 61 for i in range(20_000)))
    return path


def configured(data, method, *, steps=4):
    return configure(make_task("text", data=data), method=method, seed=1, steps=steps, batch_size=4, eval_every=2)


def stop_after(steps):
    calls = iter(range(1, 1000))
    return lambda: next(calls) == steps


def test_parts_of_all_ranks_and_micro_batches_are_the_batch_in_its_order():
    batch = torch.randperm(24)
    for size, accumulate in ((1, 1), (1, 6), (4, 1), (3, 4), (2, 12)):
        crews = [Crew(rank=rank, size=size, accumulate=accumulate) for rank in range(size)]
        parts = [part for crew in crews for part in crew.micro_batches(batch)]
        assert torch.equal(torch.cat(parts), batch)
        assert {len(part) for part in parts} == {24 // size // accumulate}


def test_a_batch_that_cannot_be_divided_is_refused():
    Crew(size=3, accumulate=4).check(24)
    wrong = "batch of 16 examples cannot be divided evenly among 3 ranks with accumulate=2, that is 6 parts"
    with pytest.raises(ValueError, match=rf"{wrong}.*one of 1, 2, 4, 8, 16, or give a --batch-size.*multiple of 6"):
        Crew(size=3, accumulate=2).check(16)
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        Crew(accumulate=0).check(16)


@cases(
    "size, options, accumulate",
    [
        (1, {}, 1),
        (8, {"most": 16}, 4),
        (1, {"most": 16}, 32),
        (1, {"most": 100}, 8),  # 64 at once: of what divides 512, the most that are not above 100
        (64, {"most": 16}, 1),
        (8, {"most": 16, "micro_batch": 32}, 2),
        (8, {"most": 16, "accumulate": 1}, 1),
        (2, {"accumulate": 4}, 4),
    ],
)
def test_the_number_of_micro_batches_follows_from_their_size(size, options, accumulate):
    assert Crew(size=size).dividing(512, **options).accumulate == accumulate


def test_micro_batches_that_do_not_divide_are_refused():
    wrong = r"--micro-batch 5: of a batch of 48 examples, each of 2 ranks has 24, which that does not divide\. "
    with pytest.raises(ValueError, match=rf"{wrong}Choose one of 1, 2, 3, 4, 6, 8, 12, 24, or another --batch-size"):
        Crew(size=2).dividing(48, micro_batch=5)
    with pytest.raises(ValueError, match="batch of 48 examples cannot be divided evenly among 5 ranks"):
        Crew(size=5).dividing(48, micro_batch=4)
    with pytest.raises(ValueError, match="--accumulate 2 and --micro-batch 3 both say"):
        Crew().dividing(48, accumulate=2, micro_batch=3)


def test_what_looks_at_a_whole_batch_does_not_come_in_micro_batches():
    model = make_task("digits").build_model(0)
    Crew(size=2).check_model(model)
    with pytest.raises(ValueError, match="statistics are those of the whole batch: it cannot come in 2 micro-batches"):
        Crew(accumulate=2).check_model(model)


def test_what_is_sharded_is_compiled_block_by_block_or_as_a_whole_if_it_has_none(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda *_, **__: None)
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda module, **_: module)
    crew = Crew("fsdp", size=WORLD, compiled=True)
    resnet = crew.spread(ResNet(classes=2, channels=(2, 2)))
    assert compiled == list(resnet.blocks)
    compiled.clear()
    vgg = crew.spread(VGG(classes=2, stages=((2,),) * 5, hidden=2))
    assert compiled == [vgg]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler, of itself
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_compiled_model_has_the_losses_of_the_plain_one_and_its_names(tmp_path, monkeypatch):
    data = corpus(tmp_path)
    config = configured(data, "newton-muon", steps=3)
    compiled, own = [], torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: compiled.append(module) or own(module, backend="aot_eager")
    )
    train_run(config, tmp_path / "plain", data=data, crew=Crew(accumulate=2))
    with pytest.raises(Interrupted):
        train_run(config, tmp_path / "both", data=data, crew=Crew(accumulate=2, compiled=True), stop=stop_after(2))
    assert len(compiled) == 1
    train_run(config, tmp_path / "both", data=data, crew=Crew(accumulate=2))
    same_but_for_rounding(tmp_path / "both", tmp_path / "plain")
    assert json.loads((tmp_path / "both" / "environment.json").read_text())["parallel"]["compiled"] is True


@pytest.mark.slow
@cases("method", ["adamw", "muon", "newton-muon", "muonmax-momo"])
def test_micro_batches_change_nothing_but_rounding(tmp_path, method):
    data = corpus(tmp_path)
    config = configured(data, method, steps=3)
    train_run(config, tmp_path / "whole", data=data)
    with pytest.raises(Interrupted):
        train_run(config, tmp_path / "parts", data=data, crew=Crew(accumulate=4), stop=stop_after(2))
    train_run(config, tmp_path / "parts", data=data, crew=Crew(accumulate=2))
    same_but_for_rounding(tmp_path / "parts", tmp_path / "whole")
    recorded = json.loads((tmp_path / "parts" / "environment.json").read_text())
    assert recorded["parallel"] == {"layout": None, "ranks": 1, "accumulate": 4, "device": "cpu"}
    assert [later["parallel"]["accumulate"] for later in recorded["resumed"]] == [2]
    assert "parallel" not in json.loads((tmp_path / "whole" / "environment.json").read_text())


STARTED = {
    "RANK": "0",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}
REFUSED = {
    "no torchrun": (
        ("ddp",),
        {},
        {},
        r"--parallel ddp.*\(RANK is not set\): put `torchrun --nproc-per-node 2 -m steep",
    ),
    "no layout": ((None,), {}, STARTED, r"4 processes were started.*same directory\. Add --parallel ddp, fsdp or hsdp"),
    "a mesh alone": ((None,), {"mesh": (2, 2)}, {}, r"--mesh 2x2 .*add --parallel hsdp"),
    "a mesh of fsdp": (("fsdp",), {"mesh": (2, 2)}, STARTED, r"--mesh 2x2 is for --parallel hsdp, not for fsdp"),
    "no mesh": (("hsdp",), {}, STARTED, r"4 ranks needs --mesh 1x4 or 2x2 or 4x1 \(replicas x shards\)\."),
    "a wrong mesh": (("hsdp",), {"mesh": (2, 4)}, STARTED, r"needs --mesh 1x4 .*, not 2x4 = 8"),
    "a device": ((None,), {"device": "abacus"}, {}, r"--device abacus: this machine has cpu"),
}


@cases("arguments, options, environment, wrong", REFUSED.values(), ids=REFUSED)
def test_what_was_not_started_for_it_is_refused(arguments, options, environment, wrong):
    with pytest.raises(UsageError, match=wrong), assembled(*arguments, environment=environment, **options):
        pass


@cases(
    "words, wrong",
    [
        (
            ("--task", "digits", "--parallel", "ddp"),
            "the task 'digits' is trained by one process.*text or cifar10 or cifar100 or fineweb",
        ),
        (("--task", "digits", "--accumulate", "3"), "batch of 64 examples cannot be divided evenly among 1 ranks"),
        (
            ("--task", "digits", "--micro-batch", "32"),
            r"in 2 micro-b.*out --accumulate and --micro-batch\.\n",
        ),
        (("--micro-batch", "5"), "--micro-batch 5: of a batch of 16 examples, each of 1 ranks has 16, which"),
        (("--micro-batch", "4", "--accumulate", "4"), "--accumulate 4 and --micro-batch 4 both say"),
        (("--precision", "fp16"), "invalid choice: 'fp16'"),
        (("--schedule", "late"), "Unknown schedule 'late'.*late-cooldown"),
        (("--preset", "gpt2-short"), "Unknown preset 'gpt2-short'.*Valid: deep, demo, small, tiny"),
        (("--method", "torch-muon", "--parallel", "fsdp"), "torch.optim.Muon takes each shard.*--method muon, or"),
        (("--parallel", "hsdp", "--mesh", "2by2"), "'2by2' must look like 2x4"),
    ],
)
def test_commands_that_cannot_be_meant_are_refused(words, wrong, capsys, tmp_path):
    try:
        code = main(["train", "--method", "muon", "--out", str(tmp_path / "run"), *words])
    except SystemExit as left:
        code = left.code
    assert code == 2
    told = capsys.readouterr().err
    assert re.search(wrong, told), told
    assert not (tmp_path / "run").exists()


# Who trains steps 1 and 2 of a run, and who goes on with it: one process, or two ranks.
ONE = Crew()
DDP, FSDP = Crew("ddp", size=WORLD), Crew("fsdp", size=WORLD, accumulate=2)
HSDP, DDP_PARTS = Crew("hsdp", size=WORLD, mesh=(2, 1), accumulate=2), Crew("ddp", size=WORLD, accumulate=2)
SHIFTS = {
    "muon": (ONE, DDP_PARTS),
    "muon-plain-wd": (FSDP, ONE),
    "newton-muon": (DDP_PARTS, FSDP),
    "muonmax-momo": (FSDP, DDP_PARTS),
    "scion": (FSDP, DDP),
    "adam": (HSDP, ONE),
    "adamw": (ONE, FSDP),
    "sgd": (HSDP, DDP),
    "torch-muon": (DDP_PARTS, ONE),
}

WATCHED = ("muon-plain-wd", "muonmax-momo", "newton-muon")  # with what the optimizer says of itself and of the weights


def train_shift(crew, folder, method, *, first, rank=0):
    """Two of the four steps; only the last rank asks to stop."""
    data, out = folder / "corpus", folder / method
    crew = dataclasses.replace(crew, rank=rank)
    more = {"data": data, "diagnostics": method in WATCHED}
    if not first:
        return train_run(configured(data, method), out, crew=crew, **more)
    with pytest.raises(Interrupted):
        train_run(
            configured(data, method), out, crew=crew, stop=stop_after(2) if rank == crew.size - 1 else None, **more
        )


def rank_main(rank, folder):
    join_ranks(rank, WORLD, folder)
    warnings.simplefilter("error")
    check_what_they_tell_each_other(dataclasses.replace(DDP, rank=rank), folder)
    for method, (before, after) in SHIFTS.items():
        if before is not ONE:
            train_shift(before, folder, method, first=True, rank=rank)
        if after is not ONE:
            result = train_shift(after, folder, method, first=False, rank=rank)
            told = [None] * WORLD
            dist.all_gather_object(told, (result.final_loss, result.steps, result.peak_memory_bytes))
            assert told[0] == told[1]
    leave_ranks()


def check_what_they_tell_each_other(crew, folder):
    rank = crew.rank
    assert crew.mean([0.1, 0.7][rank]) == (0.1 + 0.7) / 2
    assert math.isnan(crew.mean([0.1, math.nan][rank]))
    assert (crew.most([3, 2**40 + 1][rank]), crew.any(rank == 1), crew.any(False)) == (2**40 + 1, True, False)
    pieces = torch.arange(17).split(5)  # four pieces for two ranks, then three, the last of which one does twice
    for some in (pieces, pieces[:3], pieces[3:]):
        calls = []
        found = crew.share(lambda piece, seen=calls: seen.append(piece) or piece.double() + 0.5, some)
        assert [one.tolist() for one in found] == [(piece + 0.5).tolist() for piece in some]
        assert len(calls) == math.ceil(len(some) / WORLD)
    assert crew.told(lambda: f"rank {rank}") == "rank 0"
    assert crew.together(lambda: rank) == rank

    def fail(*which):
        if rank in which:
            raise OSError("no such thing")

    for which in ((0,), (1,), (0, 1)):
        first = which[0] == rank
        with pytest.raises(OSError if first else ElsewhereError, match="no such thing"):
            crew.together(lambda failing=which: fail(*failing))
    with pytest.raises(OSError if rank == 0 else ElsewhereError):
        crew.told(lambda: fail(0))
    with pytest.raises(UsageError, match=r"rank 0 has run 0, rank 1 has run 1\. Give all ranks the same command"):
        crew.check_alike(f"run {rank}")
    config, data = configured(folder / "corpus", "adamw"), folder / "corpus"
    taken = folder / "taken"
    if rank == 0:
        taken.mkdir()
        with locked(taken), pytest.raises(RunBusyError):
            train_run(config, taken, data=data, crew=crew)
    else:
        with pytest.raises(ElsewhereError, match="RunBusyError"):
            train_run(config, taken, data=data, crew=crew)
    mine = configured(folder / "corpus", "adamw" if rank else "muon")
    with pytest.raises(UsageError, match="Ranks were not told the same"):
        train_run(mine, taken, data=data, crew=crew)
    poisoned = folder / "poisoned"  # a loss that is not finite on one rank ends the run on all
    weight = torch.tensor(math.nan if rank == 1 else 1.0)
    WindowTask.loss, own = (lambda task, model, batch: weight * own(task, model, batch)), WindowTask.loss
    result = train_run(config, poisoned, data=data, crew=crew)
    WindowTask.loss = own
    assert (result.status, result.steps) == ("diverged", 1)


@ranks
@pytest.mark.slow
def test_ranks_have_the_losses_of_one_process_and_any_crew_goes_on_with_a_run(tmp_path, subtests):
    data = corpus(tmp_path)
    for method, (before, _) in SHIFTS.items():
        whole = tmp_path / "whole" / method
        train_run(configured(data, method), whole, data=data, diagnostics=method in WATCHED)
        if before is ONE:
            train_shift(ONE, tmp_path, method, first=True)
    mp.spawn(rank_main, args=(tmp_path,), nprocs=WORLD)
    for method, (before, after) in SHIFTS.items():
        with subtests.test(method=method):
            if after is ONE:
                train_shift(ONE, tmp_path, method, first=False)
            rel = 2e-3 if method == "torch-muon" else 1e-5  # which works in bfloat16
            same_but_for_rounding(tmp_path / method, tmp_path / "whole" / method, rel=rel)
            assert len(list((tmp_path / method).glob("events.out*"))) == 2  # of the first rank of each shift
            recorded = json.loads((tmp_path / method / "environment.json").read_text())
            there = [recorded.get("parallel", {}), recorded["resumed"][0].get("parallel", {})]
            assert there == [crew.described().get("parallel", {}) for crew in (before, after)]


def started(out, data, *words):
    """A run on two ranks of torchrun, under way."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "steepest", "train", "--data", data, "--out", out, *words]
    known = len(rows(out)) if (out / "metrics.jsonl").exists() else 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True
    )
    wait_for(lambda: process.poll() is not None or (out.exists() and lines(out) > known + 2))
    assert process.poll() is None, process.communicate()[0]
    return process, [
        int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


def lines(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@ranks
@pytest.mark.slow
def test_signals_end_all_ranks_saved_and_a_rank_that_is_killed_ends_the_others(tmp_path):
    data, out = corpus(tmp_path), tmp_path / "run"
    words = ("--method", "muon", "--steps", "5000", "--batch-size", "2", "--schedule", "constant")
    process, _ = started(out, data, *words, "--parallel", "ddp")
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=100)[0]
    assert "Repeat the command to go on" in told
    saved = load_trained(out, examples=1, data=data)  # by one process
    assert saved.step == rows(out)[-1]["step"] > 0
    process, (first, second) = started(out, data, *words, "--parallel", "fsdp", "--accumulate", "1")
    killed = time.monotonic()
    os.kill(second, signal.SIGKILL)
    told = process.communicate(timeout=100)[0]
    assert process.returncode == 1
    assert time.monotonic() - killed < 60  # of the 300 s for which ranks wait where a connection stays open
    assert "error: Another rank ended, or did not answer" in told or f"Sending process {first} closing signal" in told
    assert not Path(f"/proc/{first}").exists()
    assert load_trained(out, examples=1, data=data).step >= saved.step
    assert not (out / "result.json").exists()


def test_what_gloo_says_of_a_rank_that_is_gone_becomes_one_sentence(monkeypatch):
    from steepest.lab.runs import crew

    text = "[/b/gloo/tcp/pair.cc:537] Read error [127.0.0.1]:13701: Connection reset by peer. This is typically ..."
    remedy = "Connection reset by peer\\). All ranks end; start them again"
    wrong = rf"did not answer within 300 s \(Read error .*{remedy}"
    with pytest.raises(LostRankError, match=wrong), crew._telling_who_is_lost():
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match=r"^another problem$"), crew._telling_who_is_lost():
        raise RuntimeError("another problem")
