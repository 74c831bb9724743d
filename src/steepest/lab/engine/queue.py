"""The runs of a study as trials of an Optuna study: waiting, running, finished.

Trials only say who does what; whether a run is finished, its directory says. So a trial that is lost, stale or there
twice costs nothing: an unfinished run without a trial gets a new one, and a finished run is never trained again.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.engine import URL

from steepest.lab.disk.fields import LARGEST, RecordError
from steepest.lab.disk.files import append_line, exists
from steepest.lab.engine.pool import DiskFullError, Outcome, last_words
from steepest.lab.engine.storage import BEAT_S, GRACE_S, StorageError, answering, connected, public_url
from steepest.lab.methods import METHODS
from steepest.lab.runs.records import Result, read_result
from steepest.lab.studies.study import Listing, read_listed, read_listing

OPEN = (TrialState.WAITING, TrialState.RUNNING)
MOST_WAITING = 16  # trials at a time: whoever takes one reads all that wait
MOST_SHOWN = 32  # finished runs that get a trial at a time, only to be seen in Optuna's own tools
_DISTRIBUTIONS: Mapping[str, BaseDistribution] = {
    "method": CategoricalDistribution(sorted(METHODS)),
    "lr": FloatDistribution(sys.float_info.min, sys.float_info.max, log=True),
    "seed": IntDistribution(0, LARGEST),
}


class NotFinished(Exception):  # noqa: N818 - it reports that a run was given back, for whichever reason
    """The trial ends here, but its run did not."""


@dataclass
class Queue:
    """The trials of one study; may be used by several threads.

    Args:
        out: Directory of the study.
        study: Its trials.
        url: Where they are, for error messages.
    """

    out: Path
    study: optuna.Study
    url: URL
    _asking: threading.Lock = field(default_factory=threading.Lock)
    _forgiven: dict[str, int] = field(default_factory=dict[str, int])  # by run, the number of a trial that had failed

    def take(self, train: Callable[[Path], Outcome]) -> bool:
        """Train one run that waits.

        Args:
            train: Brings the run in a directory to its end, or does not.

        Returns:
            Whether there was one.

        Raises:
            StorageError: If the database does not answer; a run that was trained is not lost by that.
            RecordError: If `study.json` is damaged.
        """
        ended = False
        own: list[Exception] = []

        def trained(run: Path) -> Outcome:
            try:
                return train(run)
            except Exception as error:
                own.append(error)
                raise

        def objective(trial: Trial) -> float:
            nonlocal ended
            asking.close()
            try:
                value = self._objective(trial, trained)
            except (NotFinished, optuna.TrialPruned):
                ended = True
                raise
            ended = True
            return value

        with self._answering(own), contextlib.ExitStack() as asking:
            asking.enter_context(self._asking)  # one thread asks, while the others train
            if not self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                return False
            try:
                self.study.optimize(objective, n_trials=1, catch=(NotFinished,))
            except (ValueError, UpdateFinishedTrialError, AssertionError, UnboundLocalError) as error:
                # the last two are slips of Optuna that hide what happened
                cause = error.__context__ if isinstance(error, AssertionError | UnboundLocalError) else error
                declared_dead = ended and isinstance(cause, ValueError | UpdateFinishedTrialError)
                if not declared_dead:  # then another worker has a trial for the run, which is what it is
                    raise cause or error from None
            return True

    @contextlib.contextmanager
    def _answering(self, own: Sequence[Exception]) -> Generator[None]:
        """As `answering`; but an error of the training stays what it is."""
        try:
            with answering(self.url):
                yield
        except StorageError:
            if own:
                raise own[0] from None
            raise

    def complete(self) -> bool:
        """Whether every run has ended with a result, by the directories alone."""
        return not missing_runs(self.out)

    def fill(self, *, retry: bool = False) -> int:
        """Make sure that unfinished runs wait to be taken, the first ones in the study's order.

        Args:
            retry: Whether runs that have failed so far are tried again.

        Returns:
            Number of runs that neither finished nor failed.

        Raises:
            StorageError: If the database does not answer.
            RecordError: If `study.json` is damaged.
        """
        with answering(self.url), self._asking:
            optuna.storages.fail_stale_trials(self.study)
            self._fail_dead()
            listing, trials = read_listing(self.out), self._last_trials()
            if retry:
                self._forgiven = {name: trial.number for name, trial in trials.items() if _failed(trial)}
            shown, unfinished, waiting = 0, 0, sum(trial.state == TrialState.WAITING for trial in trials.values())
            for name in listing.runs:
                run, trial = self.out / "runs" / name, trials.get(name)
                finished = exists(run / "result.json")
                if finished and (trial is None or trial.state == TrialState.FAIL) and shown < MOST_SHOWN:
                    shown += 1
                    with contextlib.suppress(RecordError):  # the report says what is wrong with it
                        self._add(run, result=read_result(run / "result.json"))
                elif not finished and (trial is None or not _failed(trial) or self._forgiven.get(name) == trial.number):
                    unfinished += 1
                    if (trial is None or trial.state not in OPEN) and waiting < MOST_WAITING:
                        self._add(run)
                        waiting += 1
            return unfinished

    def failures(self) -> list[Path]:
        """Directories of the runs that ended with an error and have not finished since."""
        with answering(self.url), self._asking:
            trials = self._last_trials()
        runs = [self.out / "runs" / name for name in read_listing(self.out).runs if _failed(trials.get(name))]
        return [run for run in runs if not exists(run / "result.json")] + damaged_runs(self.out)

    def _objective(self, trial: Trial, train: Callable[[Path], Outcome]) -> float:
        name = trial.user_attrs.get("run")
        if not isinstance(name, str) or name not in read_listing(self.out).runs:
            raise NotFinished("nothing waits any more, or the study was changed")
        run = self.out / "runs" / name
        _note(trial, "worker", f"{socket.gethostname()}:{os.getpid()}")
        try:
            if not exists(run / "result.json") and (outcome := train(run)) != "finished":
                if outcome == "failed":
                    _note(trial, "error", last_words(run)[:1000])
                raise NotFinished(outcome)
            result = read_result(run / "result.json")
        except DiskFullError:
            raise
        except (RecordError, OSError) as problem:  # of this run's directory: the others can go on
            _note(trial, "error", str(problem)[:1000])
            raise NotFinished("failed") from problem
        if result is None:
            raise NotFinished("the result was deleted")
        if result.final_loss is None:
            raise optuna.TrialPruned("diverged")
        return result.final_loss

    def _add(self, run: Path, *, result: Result | None = None) -> None:
        """A new trial: one that waits, or one that shows a result that was there already."""
        params: dict[str, object] = {}
        with contextlib.suppress(RecordError):  # the worker says what is wrong with it
            config = read_listed(run)
            params = {"method": config.method, "seed": config.seed, "lr": config.options.get("lr", 0.0)}
        params = {name: value for name, value in params.items() if name != "lr" or value}  # its scale is logarithmic
        state = TrialState.WAITING if result is None else TrialState.COMPLETE
        if result is not None and result.final_loss is None:
            state = TrialState.PRUNED
        trials = self.study.get_trials(deepcopy=False)
        # Whoever began the study may have known other methods, and a study keeps one list.
        known = {**_DISTRIBUTIONS, **(trials[0].distributions if trials else {})}
        self.study.add_trial(
            optuna.create_trial(
                state=state,
                value=None if result is None else result.final_loss,
                params=params,
                distributions={name: known[name] for name in params},
                user_attrs={"run": run.name},
            )
        )

    def _last_trials(self) -> dict[str, FrozenTrial]:
        """The trial that counts for each run: one that is still open, or else the last one."""
        trials = self.study.get_trials(deepcopy=False)
        in_order = sorted(trials, key=lambda trial: (trial.state in OPEN, trial.number))
        return {str(trial.user_attrs.get("run")): trial for trial in in_order}

    def _fail_dead(self) -> None:
        """End the trials of processes of this machine that are gone; for those of others there is the heartbeat."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            host, _, pid = str(trial.user_attrs.get("worker", "")).rpartition(":")
            if host == socket.gethostname() and re.fullmatch("[1-9][0-9]{0,6}", pid) and not _alive(int(pid)):
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def missing_runs(out: Path) -> list[Path]:
    """Directories of the runs of a study that have no result, whatever a database says."""
    runs = [out / "runs" / name for name in read_listing(out).runs]
    return [run for run in runs if not exists(run / "result.json")]


def damaged_runs(out: Path) -> list[Path]:
    """Directories of the runs of a study whose result cannot be read."""
    return [run for name in read_listing(out).runs if _damaged(run := out / "runs" / name)]


@contextlib.contextmanager
def open_queue(out: Path, url: URL, *, create: bool, beat_s: int = BEAT_S, grace_s: int = GRACE_S) -> Generator[Queue]:
    """The trials of the study in a directory.

    Args:
        out: Directory of the study; its `study.json` is written.
        url: The database.
        create: Whether to begin the study there if it is not there yet.
        beat_s: Seconds from one heartbeat to the next.
        grace_s: Seconds without one, until a run is given to another worker.

    Raises:
        StorageError: If the database does not answer, or does not know the study and shall not create it.
        RecordError: If `study.json` is missing or damaged.
        ModuleNotFoundError: If the driver is not installed.
    """
    listing = read_listing(out)
    with connected(url, create=create, beat_s=beat_s, grace_s=grace_s) as storage:
        with answering(url):
            study = _study(listing, storage, url, create=create)
        yield Queue(out, study, url)


def _study(listing: Listing, storage: optuna.storages.BaseStorage, url: URL, *, create: bool) -> optuna.Study:
    sampler = optuna.samplers.RandomSampler()  # never asked: every trial comes with its parameters
    if create:
        return optuna.create_study(
            storage=storage, sampler=sampler, study_name=listing.name, direction="minimize", load_if_exists=True
        )
    try:
        return optuna.load_study(storage=storage, sampler=sampler, study_name=listing.name)
    except KeyError:
        remedy = "Give the --storage of the command that started the study, and start it before others join."
        raise StorageError(
            f"The storage {public_url(url)} does not know the study {listing.name!r}. {remedy}"
        ) from None


def _note(trial: Trial, key: str, value: str) -> None:
    with contextlib.suppress(UpdateFinishedTrialError):  # declared dead meanwhile
        trial.set_user_attr(key, value)


def _failed(trial: FrozenTrial | None) -> bool:
    return trial is not None and trial.state == TrialState.FAIL and "error" in trial.user_attrs


def _damaged(run: Path) -> bool:
    """Whether a run left a result that cannot be read; its worker's log then says so."""
    try:
        read_result(run / "result.json")
    except RecordError as problem:
        if last_words(run) != str(problem):
            with contextlib.suppress(RecordError):  # the report says what is wrong with it
                append_line(run / "worker.log", str(problem))
        return True
    return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
