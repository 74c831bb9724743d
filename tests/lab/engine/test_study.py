"""Sweeps in real processes, several dispatchers at once, killed at any moment: nothing is lost or done twice."""

import errno
import io
import json
import re
import shutil
import signal
import subprocess
import threading
import time

import pytest
from rich.console import Console

from steepest.lab.disk.fields import RecordError
from steepest.lab.engine import study as engine
from steepest.lab.engine.pool import KILLS, DiskFullError, Pool, last_words
from steepest.lab.engine.queue import Queue
from steepest.lab.engine.storage import StorageError
from steepest.lab.engine.study import FailedRunsError, join_study, run_study, train_runs
from steepest.lab.engine.worker import FULL
from steepest.lab.engine.worker import main as worker_main
from steepest.lab.runs.config import configure
from steepest.lab.runs.records import Result, read_result
from steepest.lab.studies.study import StudyMismatchError, run_directory, write_study
from steepest.lab.studies.sweep.plan import Sweep
from steepest.lab.tasks import make_task
from tests.lab.processes import ended, modified, rows_of, sessions, steepest, wait_for, workers_of

STEPS = 80
COMMAND = ("sweep", "--task", "digits", "--methods", "sgd", "--lrs", "0.03,0.1", "--seeds", 1, "--steps", STEPS)
ASK = "steepest sweep ..."


@pytest.fixture(scope="module")
def task():
    return make_task("digits", "demo")


def quiet():
    return Console(file=io.StringIO())


def sweep(task, **changes):
    fields = {"methods": ("sgd",), "seeds": (0,), "options": {}, "steps": STEPS, "lrs": {"sgd": (0.03, 0.1)}}
    return Sweep(task=task, **{**fields, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted sweep, trained by two dispatchers at once."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    first = steepest(*COMMAND, "--workers", 1, "--out", out)
    wait_for(lambda: workers_of(out))
    second = steepest("work", out, "--workers", 1)
    ended(first)
    assert re.search(rf"All 2 runs in {out} are finished. To write the report: steepest report {out}\n$", ended(second))
    return out


@pytest.mark.slow
def test_two_dispatchers_at_once_share_the_runs(finished):
    assert list(sessions(finished).values()) == [1, 1]
    assert len(modified(finished)) == 2
    assert (finished / "report.html").exists()


@pytest.mark.slow
def test_more_rates_add_only_what_is_missing_even_without_the_database(finished, task):
    before = modified(finished)
    (finished / "optuna.db").unlink()
    finer = sweep(task, lrs={"sgd": (0.03, 0.1, 0.2)})
    run_study(finer, finished, command=ASK, workers=1, console=quiet())
    assert before.items() < modified(finished).items()
    assert list(sessions(finished).values()) == [1, 1, 1]
    assert join_study(finished, workers=1, console=quiet()) == 3


@pytest.mark.slow
def test_a_result_that_cannot_be_read_is_no_finished_run(finished, task, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    damaged = run_directory(out, sweep(task).configs()[0])
    (damaged / "result.json").write_text("{")
    for again in (
        lambda: run_study(sweep(task), out, command=ASK, workers=1, console=quiet()),
        lambda: join_study(out, workers=1, console=quiet()),
    ):
        with pytest.raises(FailedRunsError, match=rf"1 of 2 runs ended with an error:\n.*{damaged.name}.*not valid"):
            again()


@pytest.mark.slow
def test_a_study_without_runs_is_told(finished, tmp_path):
    content = json.loads((finished / "study.json").read_text())
    (tmp_path / "study.json").write_text(json.dumps({**content, "runs": {}}))
    with pytest.raises(StudyMismatchError, match=r"has no runs\. Start it again"):
        join_study(tmp_path, workers=1, console=quiet())


@pytest.mark.slow
def test_a_run_whose_directory_is_gone_does_not_stop_the_others(finished, task, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    lost, other = (run_directory(out, config) for config in sweep(task).configs())
    for run in (lost, other):
        (run / "result.json").unlink()
    start = Pool._start

    def start_without_directory(self, run):
        if run == lost:
            shutil.rmtree(run, ignore_errors=True)
        return start(self, run)

    monkeypatch.setattr(Pool, "_start", start_without_directory)
    with pytest.raises(FailedRunsError, match=rf"1 of 2 runs ended with an error:\n.*{lost.name}"):
        run_study(sweep(task), out, command=ASK, workers=1, console=quiet())
    assert (other / "result.json").exists()


@pytest.mark.slow
def test_the_runs_of_a_killed_dispatcher_go_to_another(finished, tmp_path):
    out = tmp_path / "out"
    first = steepest(*COMMAND, "--workers", 1, "--out", out)
    wait_for(lambda: workers_of(out))
    second = steepest("work", out, "--workers", 1)
    wait_for(lambda: len(workers_of(out)) == 2)
    first.kill()
    first.communicate()
    ended(second)
    assert rows_of(out).items() <= rows_of(finished).items()
    assert len(modified(out)) == 2


class Broken:
    """A queue whose database does not answer."""

    def __init__(self, *, until=10**9):
        self.asked, self.until = 0, until

    def take(self, _):
        self.asked += 1
        if self.asked <= self.until:
            raise StorageError("down")
        return False

    def fill(self):
        return 0

    def complete(self):
        return False


def test_a_database_may_be_away_for_a_while(monkeypatch):
    monkeypatch.setattr(engine, "IDLE_S", 0.0)
    queue = Broken(until=5)
    engine._work(queue, Pool(1, 1, None, threading.Event()))
    assert queue.asked == 6


def test_a_database_that_stays_away_is_given_up(monkeypatch):
    monkeypatch.setattr(engine, "IDLE_S", 0.0)
    monkeypatch.setattr(engine, "PATIENCE_S", 0.05)
    with pytest.raises(StorageError, match="down"):
        engine._work(Broken(), Pool(1, 1, None, threading.Event()))


def test_the_error_of_one_worker_ends_the_others(task, tmp_path, monkeypatch):
    asked = sweep(task)
    calls = []

    def work(queue, pool):
        calls.append(pool)
        if len(calls) == 1:
            raise StorageError("down")
        assert pool.stop.wait(60)

    monkeypatch.setattr(engine, "_work", work)
    start = time.monotonic()
    with pytest.raises(StorageError, match="down"):
        run_study(asked, tmp_path, command=ASK, workers=2, console=quiet())
    assert time.monotonic() - start < 30


def test_a_worker_that_is_killed_again_and_again_is_given_up(tmp_path, monkeypatch):
    pool = Pool(1, 1, None, threading.Event())
    monkeypatch.setattr(Pool, "_start", lambda *_: started.append(1))
    monkeypatch.setattr(Pool, "_wait", lambda *_: -9)
    started: list[int] = []
    assert pool.train(tmp_path) == "failed"
    assert len(started) == KILLS
    assert last_words(tmp_path) == "The worker was ended by signal 9."


def test_a_worker_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("steepest.lab.engine.pool.STOP_S", 0.1)
    pool = Pool(1, 1, None, threading.Event())
    process = subprocess.Popen(["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"], stdout=-1)
    assert process.stdout is not None
    process.stdout.readline()
    pool.stop.set()
    assert pool._wait(process) == -signal.SIGKILL
    process.stdout.close()
    assert pool.train(tmp_path) == "stopped"


def test_a_worker_without_last_words_has_no_reason(tmp_path):
    assert last_words(tmp_path) == "no reason was recorded"


@pytest.mark.slow
def test_whoever_joins_hears_of_failed_runs(task, tmp_path, monkeypatch):
    asked = sweep(task, lrs={"sgd": (0.1,)})
    write_study(tmp_path, asked, asked.configs(), command=ASK)
    run = run_directory(tmp_path, asked.configs()[0])
    monkeypatch.setattr(Pool, "train", lambda _, run: (run / "worker.log").write_text("the reason\n") and "failed")
    with pytest.raises(FailedRunsError, match=rf"1 of 1 runs ended with an error:\n  {run}/worker.log: the reason\n"):
        run_study(asked, tmp_path, command=ASK, workers=1, console=quiet())
    with pytest.raises(FailedRunsError, match=r"the reason\nMend the cause and repeat the command that started the"):
        join_study(tmp_path, workers=1, console=quiet())


def test_another_version_of_the_code_does_not_help(task, tmp_path):
    asked = sweep(task)
    configs = asked.configs()
    write_study(tmp_path, asked, configs, command=ASK)
    for config in configs:
        path = run_directory(tmp_path, config) / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "code": "0.0.1+abc"}))
    with pytest.raises(StudyMismatchError, match=r"configured for the code 0\.0\.1\+abc, this is .*Install the same"):
        join_study(tmp_path, workers=1, console=quiet())


def test_other_data_do_not_help(tmp_path):
    (tmp_path / "here.txt").write_text("some text " * 100_000)
    (tmp_path / "there.txt").write_text("other text " * 100_000)
    there = make_task("text", "demo", data=tmp_path / "there.txt")
    asked = sweep(there)
    write_study(tmp_path / "out", asked, asked.configs(), command=ASK)
    with pytest.raises(StudyMismatchError, match=r"read 'there\.txt' \(\w{12}\), here is 'here\.txt' .*the same"):
        join_study(tmp_path / "out", workers=1, data=tmp_path / "here.txt", console=quiet())


def test_nobody_joins_what_was_not_started(task, tmp_path):
    with pytest.raises(RecordError, match="no study here"):
        join_study(tmp_path, workers=1)
    asked = sweep(task)
    write_study(tmp_path, asked, asked.configs(), command=ASK)
    with pytest.raises(StorageError, match=r"optuna\.db does not exist"):
        join_study(tmp_path, workers=1)


@pytest.mark.parametrize("name", ["workers", "threads"])
def test_numbers_below_one_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        join_study(tmp_path, **{"workers": 1, "threads": 1, name: 0})


def finishing(monkeypatch, *, then=lambda _: None):
    """Runs end at once, and then something happens."""
    done = []

    def train(_, run):
        result = Result("finished", STEPS, 0.5, None, 1.0, 0.5, 0.5, 1000, "2026-01-01T00:00:00+00:00")
        (run / "result.json").write_text(result.to_json())
        done.append(run)
        then(len(done))
        return "finished"

    monkeypatch.setattr(Pool, "train", train)
    return done


def test_a_database_that_breaks_when_all_runs_have_ended_costs_nothing(task, tmp_path, monkeypatch):
    def breaks(number):
        if number == 2:
            (tmp_path / "optuna.db").write_text("overwritten, and no database any more")

    finishing(monkeypatch, then=breaks)
    screen, start = io.StringIO(), time.monotonic()
    report = run_study(sweep(task), tmp_path, command=ASK, workers=1, console=Console(file=screen, width=1000))
    assert report.exists()
    assert time.monotonic() - start < 60
    assert re.search(r"optuna\.db is damaged: .*All runs have ended without it\.", screen.getvalue())


def test_a_server_that_stops_when_all_runs_have_ended_costs_nothing(task, tmp_path, monkeypatch):
    """It might come back; but nobody waits for what is not needed."""
    done = finishing(monkeypatch)

    def silent(*_, **__):
        raise StorageError("down")

    monkeypatch.setattr(Queue, "failures", silent)
    take = Queue.take
    monkeypatch.setattr(Queue, "take", lambda self, train: take(self, train) if len(done) < 2 else silent())
    start = time.monotonic()
    assert run_study(sweep(task), tmp_path, command=ASK, workers=1, console=quiet()).exists()
    assert time.monotonic() - start < 60


def test_a_database_that_breaks_before_leaves_a_report_of_what_there_is(task, tmp_path, monkeypatch):
    finishing(monkeypatch, then=lambda _: (tmp_path / "optuna.db").write_text("overwritten, and no database any more"))
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"is damaged: .*\nThe report at .*report\.html has the 1 of 2 runs that"):
        run_study(sweep(task), tmp_path, command=ASK, workers=1, console=quiet())
    assert time.monotonic() - start < 60
    (tmp_path / "optuna.db").unlink()  # as the message says
    assert run_study(sweep(task), tmp_path, command=ASK, workers=1, console=quiet()).exists()


def test_a_full_disk_is_told_at_once_with_path_and_remedy(task, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(Pool, "_start", lambda _, run: started.append(run))
    monkeypatch.setattr(Pool, "_wait", lambda *_: FULL)
    with pytest.raises(DiskFullError, match=rf"The disk of {tmp_path}/runs/\w+ is full.*Free some space and repeat"):
        run_study(sweep(task), tmp_path, command=ASK, workers=1, console=quiet())
    assert len(started) == 1


def test_a_worker_tells_a_full_disk_by_its_exit_code(task, tmp_path, monkeypatch, capsys):
    asked = sweep(task)
    write_study(tmp_path, asked, asked.configs(), command=ASK)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr("steepest.lab.engine.worker.train_run", full)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert worker_main([str(run_directory(tmp_path, asked.configs()[0]))]) == FULL
    assert "No space left on device" in capsys.readouterr().err


def test_there_are_no_more_workers_than_runs(task, tmp_path, monkeypatch):
    pools = []
    monkeypatch.setattr(engine, "_work", lambda _, pool: pools.append(pool))
    run_study(sweep(task), tmp_path, command=ASK, workers=500, console=quiet())
    assert [pool.workers for pool in pools] == [2, 2]


@pytest.mark.slow
def test_whoever_waits_for_others_says_so(task, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "QUIET_S", 0.1)
    monkeypatch.setattr(engine, "_work", lambda *_: time.sleep(1.5))
    screen = io.StringIO()
    run_study(sweep(task), tmp_path, command=ASK, workers=1, console=Console(file=screen, width=1000))
    assert screen.getvalue().count("Waiting for 2 runs: other processes train them, or are gone; a run whose") == 1


TASK = make_task("digits", "demo")


@pytest.mark.slow
def test_what_is_missing_is_trained_and_what_is_there_stays(tmp_path):
    first, second = (configure(TASK, method="sgd", seed=seed, steps=2, batch_size=4) for seed in (0, 1))
    train_runs({"sgd": [first]}, tmp_path, workers=1)
    before = (run_directory(tmp_path, first) / "result.json").read_bytes()
    train_runs({"sgd": [first, second]}, tmp_path, workers=2)
    assert (run_directory(tmp_path, first) / "result.json").read_bytes() == before
    assert read_result(run_directory(tmp_path, second) / "result.json").steps == 2


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_reason(tmp_path):
    config = configure(TASK, method="sgd", seed=0, steps=2, options={"momentum": 0.0})  # torch refuses Nesterov then
    with pytest.raises(RuntimeError, match=rf"Not finished: .*{run_directory(tmp_path, config).name}: ValueError: "):
        train_runs({"sgd": [config]}, tmp_path, workers=1)
