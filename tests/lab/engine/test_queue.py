"""Runs handed out as trials: whatever the database says or loses, the run directories decide."""

import contextlib
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import threading
import time

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy import event

from steepest.lab.disk.fields import RecordError
from steepest.lab.engine import queue
from steepest.lab.engine.queue import MOST_WAITING, open_queue
from steepest.lab.engine.storage import StorageError, default_url
from steepest.lab.runs.records import Result
from steepest.lab.studies.race.plan import Race
from steepest.lab.studies.study import run_directory, write_study
from steepest.lab.tasks import make_task

HERE = f"{socket.gethostname()}:{os.getpid()}"


@pytest.fixture(scope="module")
def task():
    return make_task("digits", "demo")


@pytest.fixture
def race(task):
    return Race(task=task, methods=("adamw", "sgd"), seeds=(0, 1), options={}, baseline="adamw", steps=20)


@pytest.fixture
def out(race, tmp_path):
    write_study(tmp_path, race, race.configs(), command="")
    return tmp_path


@contextlib.contextmanager
def opened(out, **options):
    with open_queue(out, default_url(out), **{"create": True, "beat_s": 1, "grace_s": 60, **options}) as queue:
        yield queue


class Training:
    """Pretends to train: remembers which run was trained how often."""

    def __init__(self, *, outcome="finished", loss=0.5):
        self.outcome, self.loss, self.runs = outcome, loss, []

    def __call__(self, run):
        self.runs.append(run.name)
        if self.outcome == "finished":
            finish(run, self.loss)
        return self.outcome


def finish(run, loss=0.5):
    status = "diverged" if loss is None else "finished"
    result = Result(status, 20, loss, None, 1.0, 0.5, 0.5, 1000, "2026-01-01T00:00:00+00:00")
    (run / "result.json").write_text(result.to_json())


def drain(queue, train):
    while queue.take(train):
        pass


def states(queue):
    return sorted(trial.state.name for trial in queue.study.trials)


def test_every_run_is_trained_once_and_shown_with_what_it_came_to(out, race):
    names = [run_directory(out, config).name for config in race.configs()]
    with opened(out) as queue:
        train = Training()
        assert queue.fill() == 4
        assert queue.fill() == 4  # a run that waits is not added again
        drain(queue, train)
        assert train.runs == names
        assert queue.fill() == 0
        assert queue.failures() == []
        for trial, config in zip(queue.study.trials, race.configs(), strict=True):
            assert trial.state == TrialState.COMPLETE
            assert trial.value == 0.5
            assert trial.params == {"method": config.method, "lr": config.options["lr"], "seed": config.seed}
            assert trial.user_attrs == {"run": run_directory(out, config).name, "worker": HERE}


def test_a_run_that_diverged_has_no_value(out):
    with opened(out) as queue:
        queue.fill()
        drain(queue, Training(loss=None))
        assert states(queue) == ["PRUNED"] * 4
        assert queue.fill() == 0


def test_two_who_take_at_once_share_the_runs(out):
    train = Training()
    with opened(out) as first, opened(out, create=False) as second:
        first.fill()
        threads = [threading.Thread(target=drain, args=(queue, train)) for queue in (first, second, first)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(train.runs)) == 4
        assert first.fill() == second.fill() == 0


def test_a_lost_database_costs_nothing(out):
    train = Training()
    with opened(out) as queue:
        queue.fill()
        queue.take(train)
    (out / "optuna.db").unlink()
    with opened(out) as queue:
        assert queue.fill() == 3
        assert states(queue) == ["COMPLETE"] + ["WAITING"] * 3  # the finished run is shown, not trained
        drain(queue, train)
        assert len(train.runs) == len(set(train.runs)) == 4


def test_a_study_goes_on_where_other_methods_are_known_than_when_it_was_begun(out, monkeypatch):
    with monkeypatch.context() as before, opened(out) as first:
        before.setitem(queue._DISTRIBUTIONS, "method", optuna.distributions.CategoricalDistribution(["adamw", "sgd"]))
        before.setattr(queue, "MOST_WAITING", 2)
        assert first.fill() == 4
        assert states(first) == ["WAITING"] * 2
    train = Training()
    with opened(out) as second:
        drain(second, train)
        second.fill()
        drain(second, train)
    assert len(set(train.runs)) == 4


def test_a_finished_run_that_still_waits_is_not_trained(out, race):
    train = Training()
    with opened(out) as queue:
        queue.fill()
        for config in race.configs():
            finish(run_directory(out, config))
        drain(queue, train)
        assert train.runs == []
        assert states(queue) == ["COMPLETE"] * 4


def test_a_trial_of_a_run_that_is_asked_for_no_more_is_not_trained(out, race, task):
    train = Training()
    smaller = Race(task=task, methods=("sgd",), seeds=(0,), options={}, baseline="sgd", steps=20)
    with opened(out) as queue:
        queue.fill()
        write_study(out, smaller, smaller.configs(), command="")
        drain(queue, train)
        assert train.runs == [run_directory(out, smaller.configs()[0]).name]
        assert queue.fill() == 0


@pytest.mark.parametrize("outcome", ["busy", "stopped"])
def test_a_run_that_was_given_back_is_taken_again(out, outcome):
    with opened(out) as queue:
        queue.fill()
        drain(queue, Training(outcome=outcome))
        assert queue.failures() == []
        assert queue.fill() == 4
        again = Training()
        drain(queue, again)
        assert len(again.runs) == 4


def test_a_failed_run_waits_for_the_command_to_be_repeated(out, race):
    broken = run_directory(out, race.configs()[0])
    (broken / "worker.log").write_text("first\nValueError: the reason\n")
    with opened(out) as queue:
        queue.fill()
        queue.take(Training(outcome="failed"))
        assert queue.study.trials[0].user_attrs["error"] == "ValueError: the reason"
        drain(queue, Training())
        assert queue.fill() == 0
        assert queue.failures() == [broken]
    with opened(out) as queue:
        assert queue.fill(retry=True) == 1
        drain(queue, train := Training())
        assert train.runs == [broken.name]
        assert queue.failures() == []


def abandon(queue, worker):
    """Take a trial as a process does that then dies: nobody ends it, and nothing beats for it any more."""
    (trial, *_) = queue.study.get_trials(states=(TrialState.WAITING,))
    storage = queue.study._storage
    assert storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
    if worker:
        storage.set_trial_user_attr(trial._trial_id, "worker", worker)


def a_dead_process():
    process = subprocess.Popen(["true"])
    process.wait()
    return f"{socket.gethostname()}:{process.pid}"


def test_the_run_of_a_dead_process_here_is_taken_at_once(out):
    with opened(out) as queue:
        queue.fill()
        abandon(queue, a_dead_process())
        assert queue.fill() == 4
        assert states(queue) == ["FAIL"] + ["WAITING"] * 4


@pytest.mark.parametrize("worker", [HERE, "nonsense", f"{socket.gethostname()}:99999999999"], ids=["here", "?", "gone"])
def test_the_run_of_a_process_that_may_live_is_left_alone(out, worker):
    with opened(out) as queue:
        queue.fill()
        abandon(queue, worker)
        queue.fill()
        assert states(queue) == ["RUNNING"] + ["WAITING"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("worker", [None, "elsewhere:1"])
def test_the_run_of_a_process_elsewhere_is_taken_when_its_heart_stops(out, worker):
    with opened(out, grace_s=1) as queue:
        queue.fill()
        abandon(queue, worker)
        queue.fill()
        assert states(queue) == ["RUNNING"] + ["WAITING"] * 3
        time.sleep(2.1)  # SQLite's clock counts whole seconds
        queue.fill()
        assert states(queue) == ["FAIL"] + ["WAITING"] * 4


def test_whoever_was_declared_dead_finishes_all_the_same(out):
    """A laptop that slept: its run was given away, and then it wakes up and finishes."""
    with opened(out) as queue:
        queue.fill()

        def train(run):
            (trial,) = queue.study.get_trials(states=(TrialState.RUNNING,))
            queue.study.tell(trial.number, state=TrialState.FAIL)
            finish(run)
            return "finished"

        assert queue.take(train)
        assert queue.fill() == 3
        assert states(queue) == ["COMPLETE", "FAIL"] + ["WAITING"] * 3


def test_whoever_was_declared_dead_may_fail_all_the_same(out):
    with opened(out) as queue:
        queue.fill()

        def train(run):
            (trial,) = queue.study.get_trials(states=(TrialState.RUNNING,))
            queue.study.tell(trial.number, state=TrialState.FAIL)
            return "failed"

        assert queue.take(train)
        assert queue.fill() == 4


def test_an_error_of_ours_is_not_taken_for_one_of_the_queue(out):
    def train(run):
        raise ValueError("a mistake")

    with opened(out) as queue:
        queue.fill()
        with pytest.raises(ValueError, match="a mistake"):
            queue.take(train)


def test_a_database_that_is_gone_is_told_and_loses_no_result(out):
    def train(run):
        queue.study._storage._backend.engine.dispose()
        (out / "optuna.db").write_text("overwritten, and no database any more")
        finish(run)
        return "finished"

    with opened(out) as queue:
        queue.fill()
        with pytest.raises(StorageError, match=r"optuna.db is damaged: .*\. Delete .*optuna.db and repeat the command"):
            queue.take(train)
    (out / "optuna.db").unlink()
    with opened(out) as queue:
        assert queue.fill() == 3


def test_a_damaged_run_does_not_stop_the_others(out, race):
    first, second = (run_directory(out, config) for config in race.configs()[:2])
    (first / "config.json").write_text("{")
    (second / "result.json").write_text("{")
    with opened(out) as queue:
        assert queue.fill() == 3
        drain(queue, train := Training())
        assert len(train.runs) == 3
        assert second.name not in train.runs  # the report says what is wrong with it
        assert queue.study.trials[0].params == {}


def test_only_who_starts_a_study_creates_it(out):
    with opened(out):
        pass
    (out / "study.json").write_text((out / "study.json").read_text().replace('"id": "', '"id": "another'))
    with (
        pytest.raises(StorageError, match=r"does not know the study 'race digits-demo another.*Give the --storage of"),
        opened(out, create=False),
    ):
        pass


def test_a_directory_of_a_run_cannot_be_anywhere_else(out):
    text = (out / "study.json").read_text()
    (out / "study.json").write_text(text.replace('"runs": {', '"runs": {"../../x": {"method": "sgd", "seed": 0},'))
    with pytest.raises(RecordError, match=r"runs\.\.\./\.\./x must be named by 16 hexadecimal digits"), opened(out):
        pass


def test_a_directory_without_a_study_is_refused(tmp_path):
    with pytest.raises(RecordError, match="no study here"):
        open_queue(tmp_path, default_url(tmp_path), create=False).__enter__()


def test_huge_seeds_and_rates_of_zero_can_be_shown(task, tmp_path):
    odd = Race(task=task, methods=("sgd",), seeds=(2**63 - 1,), options={"sgd": {"lr": 0.0}}, baseline="sgd", steps=20)
    write_study(tmp_path, odd, odd.configs(), command="")
    with opened(tmp_path) as queue:
        queue.fill()
        drain(queue, Training())
        assert queue.study.trials[0].params.keys() == {"method", "seed"}
        assert optuna.study.get_all_study_names(queue.study._storage) == [queue.study.study_name]


DAMAGE = [
    "DROP TABLE studies",
    "DELETE FROM studies",
    "DROP TABLE trials",
    "ALTER TABLE trials DROP COLUMN datetime_start",
    "UPDATE study_directions SET direction = 'nonsense'",
    "UPDATE trials SET number = NULL",
    "UPDATE trials SET state = 'nonsense'",
    "UPDATE trials SET datetime_start = 'nonsense'",
    "UPDATE trials SET datetime_complete = 1e400",
    "UPDATE trial_user_attributes SET value_json = '{'",
    "UPDATE trial_user_attributes SET value_json = '[]'",
    "UPDATE trial_user_attributes SET value_json = CAST(x'ff' AS TEXT)",
    "UPDATE trial_params SET distribution_json = '{'",
    "UPDATE trial_params SET param_value = 'nonsense'",
    "UPDATE trial_heartbeats SET heartbeat = 'nonsense'",
    "UPDATE trial_values SET value = 'nonsense'",
]


@pytest.fixture(scope="module")
def begun(task, tmp_path_factory):
    """A study of which one run has ended."""
    out = tmp_path_factory.mktemp("begun") / "out"
    race = Race(task=task, methods=("adamw", "sgd"), seeds=(0, 1), options={}, baseline="adamw", steps=20)
    write_study(out, race, race.configs(), command="")
    with opened(out) as queue:
        queue.fill()
        queue.take(Training())
    return out


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_database_is_named_with_the_remedy_and_the_remedy_helps(begun, tmp_path, damage):
    out, train = tmp_path / "out", Training()
    shutil.copytree(begun, out)
    with sqlite3.connect(out / "optuna.db") as database:
        database.execute(damage)
    database.close()
    told = ""
    try:
        with opened(out) as queue:
            queue.fill(retry=True)
            drain(queue, train)
            queue.failures()
    except StorageError as error:
        told = str(error) if error.lasting else "would be waited for"
        (out / "optuna.db").unlink()
    assert re.search(rf"^The storage sqlite:///{out}/optuna.db is .*Delete (it|{out}/optuna.db)|^$", told)
    with opened(out) as queue:
        queue.fill(retry=True)
        drain(queue, train)
    assert len(list(out.glob("runs/*/result.json"))) == 4
    assert len(train.runs) == len(set(train.runs)) == 3


def test_many_runs_are_handed_out_a_few_at_a_time_and_each_once(task, tmp_path):
    many = Race(task=task, methods=("sgd",), seeds=tuple(range(24)), options={}, baseline="sgd", steps=20)
    write_study(tmp_path, many, many.configs(), command="")
    train = Training()
    with opened(tmp_path) as queue:
        while queue.fill():
            assert 0 < len(queue.study.get_trials(states=(TrialState.WAITING,))) <= MOST_WAITING
            drain(queue, train)
        assert states(queue) == ["COMPLETE"] * 24
    assert train.runs == [run_directory(tmp_path, config).name for config in many.configs()]


def test_handing_out_a_run_asks_no_more_questions_of_a_larger_study(task, tmp_path):
    asked = []
    for runs in (20, 200):
        out = tmp_path / str(runs)
        race = Race(task=task, methods=("sgd",), seeds=tuple(range(runs)), options={}, baseline="sgd", steps=20)
        write_study(out, race, race.configs(), command="")
        with opened(out) as queue:
            queue.fill()
            storage, rows = queue.study._storage._backend, []
            event.listen(storage.engine, "after_cursor_execute", lambda *_, rows=rows: rows.append(1))
            queue.take(Training())
            asked.append(len(rows))
    assert asked[1] <= asked[0] + 2


@pytest.mark.slow
def test_failed_runs_beyond_the_first_few_are_tried_again_too(task, tmp_path):
    many = Race(task=task, methods=("sgd",), seeds=tuple(range(20)), options={}, baseline="sgd", steps=20)
    write_study(tmp_path, many, many.configs(), command="")
    with opened(tmp_path) as queue:
        while queue.fill():
            drain(queue, Training(outcome="failed"))
        assert len(queue.failures()) == 20
    train = Training()
    with opened(tmp_path) as queue:
        left = queue.fill(retry=True)
        while left:
            drain(queue, train)
            left = queue.fill()
        assert len(set(train.runs)) == 20
        assert queue.failures() == []


@pytest.mark.slow
def test_a_run_whose_beat_is_of_a_clock_that_was_ahead_is_taken_over(out):
    with opened(out, grace_s=1) as queue:
        queue.fill()
        abandon(queue, "elsewhere:1")
        with queue.study._storage._backend.engine.begin() as connection:
            connection.exec_driver_sql("UPDATE trial_heartbeats SET heartbeat = '2999-01-01 00:00:00'")
        queue.fill()
        assert states(queue) == ["RUNNING"] + ["WAITING"] * 3
        time.sleep(1.2)
        queue.fill()
        assert states(queue) == ["FAIL"] + ["WAITING"] * 4
