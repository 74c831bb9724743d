"""Runs are short runs of `digits`: what matters here is that nothing is lost, doubled or changed."""

import dataclasses
import json
import math
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from steepest.lab.disk.fields import RecordError
from steepest.lab.disk.ours import RunBusyError, locked
from steepest.lab.disk.packed import RunFiles
from steepest.lab.methods import METHODS
from steepest.lab.runs import train
from steepest.lab.runs.checkpoint import CheckpointError
from steepest.lab.runs.config import RunConfig, configure
from steepest.lab.runs.recorder import Recorder
from steepest.lab.runs.records import read_run
from steepest.lab.runs.schedule import cooldown
from steepest.lab.runs.train import Interrupted, RunMismatchError, Training, train_run
from steepest.lab.tasks import make_task
from steepest.lab.tasks.task import DataIdentity
from tests.cases import cases

SPAWN = multiprocessing.get_context("spawn")  # daemons: one that hangs must not keep pytest from ending
SECONDS = {"forward_backward_s", "optimizer_s", "train_s"}


def short(method: str = "adamw", *, steps: int = 12, **options) -> RunConfig:
    return configure(
        make_task("digits"), method=method, seed=1, steps=steps, batch_size=4, eval_every=5, options=options
    )


def rows(run_dir: Path) -> list[dict[str, object]]:
    """The metrics without their times: what must not depend on interruptions."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in SECONDS} for line in lines]


def stop_after(steps: int):
    calls = iter(range(1, steps + 1))
    return lambda: next(calls) == steps


def test_a_run_leaves_its_whole_record(tmp_path):
    config = short()
    result = train_run(config, tmp_path)
    record = read_run(RunFiles(tmp_path))  # as the report reads it
    assert (record.config.method, record.config.steps, record.status) == ("adamw", 12, "finished")
    assert [row.step for row in record.train] == list(range(1, 13))
    assert [row.step for row in record.evals] == [0, 5, 10, 12]
    assert [row.tokens for row in record.evals] == [0, 20, 40, 48]
    lr = float(config.options["lr"])
    assert [row.lr for row in record.train] == [lr * cooldown(step, steps=12) for step in range(12)]
    assert record.evals[-1].loss == result.final_loss
    assert record.evals[-1].accuracy == result.final_accuracy
    assert record.evals[0].loss == pytest.approx(math.log(10), abs=1e-6)
    assert result.train_s == pytest.approx(result.optimizer_s + result.forward_backward_s)
    assert result.train_s == pytest.approx(sum(r.optimizer_s + r.forward_backward_s for r in record.train))
    assert result.train_s == record.train[-1].train_s == record.evals[-1].train_s
    assert 50e6 < result.peak_memory_bytes < 50e9  # bytes, not kilobytes
    assert record.environment["threads"] == torch.get_num_threads()
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    result = train_run(short(), tmp_path, keep_checkpoint=True)
    assert (tmp_path / "checkpoint.pt").exists()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(train, "make_task", None)  # not even the data is read
    with locked(tmp_path):  # nor is anybody in the way who is looking, too
        assert train_run(short(), tmp_path) == result
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "lock"} == {
        path: content for path, content in before.items() if path.name != "lock"
    }


def test_it_is_an_ordinary_training_loop(tmp_path):
    config = short("sgd")
    train_run(config, tmp_path, keep_checkpoint=True)
    task = make_task("digits")
    training = Training(config, task)
    options = {key: config.options[key] for key in ("lr", "momentum", "weight_decay")}
    model, order = task.build_model(1), training.order
    optimizer = torch.optim.SGD(model.parameters(), nesterov=True, **options)
    for step in range(12):
        optimizer.param_groups[0]["lr"] = options["lr"] * cooldown(step, steps=12)
        optimizer.zero_grad()
        task.loss(model, task.batch(order.take(4))).backward()
        optimizer.step()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


@pytest.mark.slow
@cases("method", [name for name in METHODS if name != "torch-muon"])
def test_every_method_goes_on_bit_for_bit(tmp_path, method):
    config = short(method, steps=6)
    train_run(config, tmp_path / "whole")
    with pytest.raises(Interrupted, match=r"Stopped after step 4 of 6, saved in .*Repeat the command"):
        train_run(config, tmp_path / "parts", stop=stop_after(4))
    train_run(config, tmp_path / "parts")
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


@pytest.mark.slow
def test_text_and_torch_muon_go_on_bit_for_bit(tmp_path):
    (data := tmp_path / "data").write_bytes(bytes(i * i % 251 for i in range(60_000)))
    config = configure(make_task("text", data=data), method="torch-muon", seed=1, steps=3, batch_size=4, eval_every=5)
    train_run(config, tmp_path / "whole", data=data)
    with pytest.raises(Interrupted):
        train_run(config, tmp_path / "parts", data=data, stop=stop_after(2))
    train_run(config, tmp_path / "parts", data=data)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert len(rows(tmp_path / "whole")) == 6


def test_an_interruption_at_every_step_changes_nothing_and_times_go_on(tmp_path):
    config = short()
    train_run(config, tmp_path / "whole")
    for _ in range(11):
        with pytest.raises(Interrupted):
            train_run(config, tmp_path / "parts", stop=lambda: True)
    result = train_run(config, tmp_path / "parts", stop=lambda: True)  # the last step is not interrupted
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    times = [row.train_s for row in read_run(RunFiles(tmp_path / "parts")).train]
    assert times == sorted(times)
    assert result.train_s == times[-1]


def test_what_is_evaluated_of_a_run_with_a_tail_is_the_mean_of_its_last_weights(tmp_path):
    """By hand: the same run without a tail passes by the same weights, of which the last six are averaged here."""
    config = dataclasses.replace(short("muon", steps=12), tail=0.5)
    result = train_run(config, tmp_path / "tail")
    training = Training(dataclasses.replace(config, tail=0.0), make_task("digits"))
    sums: dict[str, torch.Tensor] = {}
    with Recorder(None, step=0) as recorder:
        for step in range(1, 13):
            training.train_step(recorder)
            for name, weight in training.module.named_parameters() if step > 6 else ():
                sums[name] = sums.get(name, 0.0) + weight.detach().double() / 6
    training.module.eval()
    own = training.task.evaluate(training.module, "report", whole=True).loss
    training.module.load_state_dict({name: total.float() for name, total in sums.items()}, strict=False)
    mean = training.task.evaluate(training.module, "report", whole=True).loss
    assert result.final_loss == pytest.approx(mean, rel=1e-5)
    assert abs(mean - own) > 1e-3 * mean
    rates = [row for row in rows(tmp_path / "tail") if row["kind"] == "train"]
    train_run(dataclasses.replace(config, tail=0.0), tmp_path / "plain")
    assert [row for row in rows(tmp_path / "plain") if row["kind"] == "train"] == rates


@pytest.mark.parametrize("beside", [{"tail": 0.7, "tail_parts": 3.0, "tail_mix": 0.6}, {"outer": 0.5}])
def test_an_interruption_at_every_step_changes_nothing_of_what_stands_beside_the_optimizer(beside, tmp_path):
    config = dataclasses.replace(short("muon", steps=8), **beside)
    train_run(config, tmp_path / "whole")
    for _ in range(7):
        with pytest.raises(Interrupted):
            train_run(config, tmp_path / "parts", stop=lambda: True)
    train_run(config, tmp_path / "parts")
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def train_in_child(config: RunConfig, run_dir: Path) -> None:
    train.code_version = lambda: config.code  # the sources may be edited while tests run; not what is tested here
    train_run(config, run_dir, checkpoint_every=7, threads=1)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_kill_9_at_random_moments_changes_nothing(tmp_path, seed):
    config = short("muon", steps=60)
    whole = train_run(config, tmp_path / "whole", checkpoint_every=7)
    chance = random.Random(seed)
    metrics = tmp_path / "parts" / "metrics.jsonl"
    for wanted in sorted(chance.sample(range(1, 60), 3)):  # dies once so many rows are there, somewhere in a step
        process = SPAWN.Process(target=train_in_child, args=(config, tmp_path / "parts"), daemon=True)
        process.start()
        while lines(metrics) < wanted and process.is_alive():
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        process.kill()
        process.join()
        assert process.exitcode == -9
    assert not (tmp_path / "parts" / "result.json").exists()
    parts = train_run(config, tmp_path / "parts", checkpoint_every=7)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert (parts.final_loss, parts.final_accuracy) == (whole.final_loss, whole.final_accuracy)
    left = {path.name.split(".json.")[0] for path in (tmp_path / "parts").glob(".*")}
    assert left <= {".config"}  # written without the lock by others, so not cleared


def test_a_crash_between_the_last_step_and_the_result_costs_nothing(tmp_path):
    config = short()
    result = train_run(config, tmp_path, keep_checkpoint=True)
    (tmp_path / "result.json").unlink()
    again = train_run(config, tmp_path)
    assert (again.final_loss, again.train_s) == (result.final_loss, result.train_s)


def test_a_second_process_is_refused(tmp_path):
    with locked(tmp_path), pytest.raises(RunBusyError, match=f"being trained by process {os.getpid()}"):
        train_run(short(), tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    config = short("sgd", steps=30, lr=1e12)
    result = train_run(config, tmp_path)
    assert (result.status, result.final_loss, result.final_accuracy) == ("diverged", None, None)
    assert result.steps < 30
    last_train, last_eval = rows(tmp_path)[-2:]
    assert last_train == {**last_train, "kind": "train", "step": result.steps, "loss": None, "diverged": True}
    assert last_eval == {**last_eval, "kind": "eval", "step": result.steps, "loss": None, "diverged": True}
    assert read_run(RunFiles(tmp_path)).status == "diverged"
    assert train_run(config, tmp_path) == result


def test_an_evaluation_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    config = short(steps=20)
    original = train.Training.evaluate

    def poison(training: Training, recorder) -> None:
        if training.step == 10:
            with torch.no_grad():
                training.model.get_parameter("head.bias").fill_(math.nan)
        original(training, recorder)

    monkeypatch.setattr(train.Training, "evaluate", poison)
    result = train_run(config, tmp_path)
    assert (result.status, result.steps, result.final_loss) == ("diverged", 10, None)


def wait_for_another_second():
    """Files of events are read in the order of the seconds in their names."""
    now = int(time.time())
    while int(time.time()) == now:
        time.sleep(0.01)


def test_tensorboard_shows_each_step_once_after_an_interruption(tmp_path):
    config = short()
    for _ in range(2):
        with pytest.raises(Interrupted):
            train_run(config, tmp_path, stop=stop_after(5))
        wait_for_another_second()
    train_run(config, tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss/train")] == list(range(1, 13))
    assert [event.step for event in events.Scalars("loss/eval")] == [0, 5, 10, 12]
    losses = [row["loss"] for row in rows(tmp_path) if row["kind"] == "train"]
    assert [event.value for event in events.Scalars("loss/train")] == pytest.approx(losses, rel=1e-6)
    assert {"lr", "time/forward_backward", "time/optimizer", "accuracy/eval"} < set(events.Tags()["scalars"])


def die_before_the_first_checkpoint(config: RunConfig, run_dir: Path) -> None:
    train.code_version = lambda: config.code
    train.Training.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # rows and events are on the disk by then
    train_run(config, run_dir, checkpoint_every=7, threads=1)


@pytest.mark.slow
def test_tensorboard_shows_each_step_once_after_kill_9_before_the_first_checkpoint(tmp_path):
    config = short()
    process = SPAWN.Process(target=die_before_the_first_checkpoint, args=(config, tmp_path), daemon=True)
    process.start()
    process.join()
    assert process.exitcode == -9
    assert not (tmp_path / "checkpoint.pt").exists()
    left = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in left.Scalars("loss/train")] == list(range(1, 8))
    wait_for_another_second()
    train_run(config, tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss/train")] == list(range(1, 13))
    assert [event.step for event in events.Scalars("loss/eval")] == [0, 5, 10, 12]


def test_the_threads_of_the_first_start_are_kept_and_the_callers_come_back(tmp_path):
    torch.set_num_threads(2)
    seen: list[int] = []

    def stop() -> bool:
        seen.append(torch.get_num_threads())
        return len(seen) == 3

    with pytest.raises(Interrupted):
        train_run(short(), tmp_path, threads=1, stop=stop)
    (tmp_path / "environment.json").unlink()  # holds a description only
    train_run(short(), tmp_path, threads=2, stop=stop)
    assert len(seen) > 3
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["threads"] == 1
    assert "resumed" not in environment


def test_going_on_elsewhere_is_recorded(tmp_path, monkeypatch):
    here = train.describe_environment()
    with pytest.raises(Interrupted):
        train_run(short(), tmp_path, stop=stop_after(3))
    for cpu in ("other", "other", "third", "other"):
        monkeypatch.setattr(train, "describe_environment", lambda cpu=cpu: {**here, "cpu": cpu})
        with pytest.raises(Interrupted):
            train_run(short(), tmp_path, stop=stop_after(1))
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["cpu"] == here["cpu"]
    assert [machine["cpu"] for machine in environment["resumed"]] == ["other", "third", "other"]


def test_more_workers_make_no_other_machine(tmp_path, monkeypatch):
    for workers in ("1", "2"):
        monkeypatch.setenv("STEEPEST_WORKERS", workers)
        with pytest.raises(Interrupted):
            train_run(short(), tmp_path, stop=stop_after(1))
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["workers"] == 1
    assert "resumed" not in environment


def test_the_callers_random_numbers_are_not_touched(tmp_path):
    state = torch.get_rng_state()
    train_run(short(steps=1), tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_run_in_the_directory_is_refused(tmp_path):
    train_run(short(steps=1), tmp_path)
    with pytest.raises(RunMismatchError, match=r"holds another run: steps is 1 there, 2 here\. Choose another"):
        train_run(short(steps=2), tmp_path)


def test_another_version_of_the_code_is_refused(tmp_path):
    config = RunConfig(**{**vars(short()), "code": "0.0.0+old"})
    with pytest.raises(RunMismatchError, match=r"configured for the code 0\.0\.0\+old, this is training \d"):
        train_run(config, tmp_path)


def test_other_data_is_refused(tmp_path):
    config = RunConfig(**{**vars(short()), "data": DataIdentity("mine", "ab" * 32, 5)})
    with pytest.raises(RunMismatchError, match=r"reads 'mine' \(abababababab\), here is 'scikit-learn digits'"):
        train_run(config, tmp_path)


@pytest.mark.parametrize("name", ["checkpoint_every", "threads"])
def test_options_below_one_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        train_run(short(), tmp_path, **{name: 0})


def test_without_tensorboard_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"tensorboard is not installed: pip install 'steepest\[lab\]'"):
        train_run(short(), tmp_path)


@pytest.fixture
def interrupted(tmp_path) -> Path:
    with pytest.raises(Interrupted):
        train_run(short(), tmp_path, stop=stop_after(3))
    return tmp_path


def test_a_damaged_checkpoint_is_reported_and_without_it_the_run_starts_again(interrupted, tmp_path):
    checkpoint = interrupted / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: .*Delete this file and repeat the command"):
        train_run(short(), interrupted)
    checkpoint.unlink()
    train_run(short(), interrupted)
    train_run(short(), tmp_path / "whole")
    assert rows(interrupted) == rows(tmp_path / "whole")


def test_a_checkpoint_of_another_run_is_refused(interrupted, tmp_path):
    with pytest.raises(Interrupted):
        train_run(short("sgd"), tmp_path / "other", stop=stop_after(3))
    (interrupted / "checkpoint.pt").write_bytes((tmp_path / "other" / "checkpoint.pt").read_bytes())
    with pytest.raises(CheckpointError, match=r"it is of the run [0-9a-f]{16}, this is [0-9a-f]{16}"):
        train_run(short(), interrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", {}),
        ("optimizer", {}),
        ("counters", {"steps": 1}),
        ("random", 1),
        ("order", {}),
        ("threads", 0),
        ("threads", "1"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(interrupted, key, value):
    state = torch.load(interrupted / "checkpoint.pt", weights_only=True)
    torch.save({**state, key: value}, interrupted / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="its content does not fit the run"):
        train_run(short(), interrupted)


def optimizer_parts(state):
    return state["optimizer"].get("parts", [state["optimizer"]])


def in_groups(key, value):
    def change(state):
        for part in optimizer_parts(state):
            for group in part["param_groups"]:
                if key in group:
                    group[key] = value

    return change


def averages(change):
    def of_every_average(state):
        for part in optimizer_parts(state):
            for entries in part["state"].values():
                for key, value in entries.items():
                    if isinstance(value, torch.Tensor) and value.ndim:
                        entries[key] = change(value)

    return of_every_average


def weights(change):
    def of_the_first(state):
        name = next(iter(state["model"]))
        state["model"][name] = change(state["model"][name])

    return of_the_first


def at(*path, value):
    def change(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


# what somebody may have put in the place of a checkpoint, with all its checksums right
PUT_THERE = {
    "a rate": in_groups("lr", 99.0),
    "a rate of the schedule": in_groups("initial_lr", 99.0),
    "a momentum": in_groups("momentum", 0.1),
    "both momenta": in_groups("betas", (0.1, 0.95)),
    "a decay": in_groups("weight_decay", 0.5),
    "a norm": in_groups("norm", "Sign()"),
    "averages of doubles": averages(lambda average: average.double()),
    "averages of another shape": averages(lambda average: average.flatten()[:1]),
    "weights of doubles": weights(lambda weight: weight.double()),
    "a smaller weight": weights(lambda weight: weight[:1]),
    "weights that are not numbers": weights(lambda weight: weight * math.nan),
    "no first weight": lambda state: state["model"].pop(next(iter(state["model"]))),
    "a step": at("counters", "step", value=7),
    "a step below zero": at("counters", "step", value=-1),
    "a step of the schedule": at("scheduler", "last_epoch", value=7),
    "rates of the schedule": at("scheduler", "base_lrs", value=[99.0]),
    "losses": at("losses", value=["1.0"]),
    "threads": at("threads", value=10**9),
    "a place in the data": at("order", "position", value=3),
    "another epoch": at("order", "epoch", value=5),
}


@pytest.mark.slow
@cases("method", ["adamw", "muon"])
@cases("thing", PUT_THERE)
def test_a_checkpoint_put_in_place_of_ours_is_refused(tmp_path, method, thing):
    with pytest.raises(Interrupted):
        train_run(short(method), tmp_path, stop=stop_after(3))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    before = str(state)
    PUT_THERE[thing](state)
    if str(state) == before:
        assert (method, thing) in {("adamw", "a momentum"), ("adamw", "a norm"), ("muon", "both momenta")}
        return  # it has none
    torch.save(state, tmp_path / "checkpoint.pt")
    content = (tmp_path / "checkpoint.pt").read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="its content does not fit the run"):
        train_run(short(method), tmp_path)
    assert content == ((tmp_path / "checkpoint.pt").read_bytes(), (tmp_path / "metrics.jsonl").read_bytes())


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("config.json", "Delete the run's directory"),
        ("environment.json", "Delete this file and repeat the command: only the description of the machine is lost"),
        ("metrics.jsonl", "Delete the run's directory"),
    ],
)
def test_other_damaged_files_are_named(interrupted, name, remedy):
    (interrupted / name).write_text("{]\n")
    with pytest.raises(RecordError, match=f"{name}: .*not valid JSON.*{remedy}"):
        train_run(short(), interrupted)
