"""The database through which workers share the runs of a study: an Optuna storage that beats for every run.

It only says who takes which run next. What is finished, the run directories say: the database may be lost at any time.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sqlite3
import time
import warnings
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError, TimeoutError

from steepest.lab.disk.fields import RecordError
from steepest.lab.disk.files import exists
from steepest.lab.errors import Failure

BEAT_S = 10
GRACE_S = 60  # without a beat for so long, a worker counts as dead and its run is given to another
CONNECT_S = 10
LOCK_S = 60  # how long one waits for another who writes to the same SQLite file
CONNECTION = {"connect_timeout": CONNECT_S, "tcp_user_timeout": 1000 * LOCK_S}
# Of PostgreSQL's client, what may stand behind the URL's question mark; all but the password may be shown.
OPTIONS = {"application_name", "connect_timeout", "password", "passfile", "sslcert", "sslkey", "sslmode", "sslrootcert"}
SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")
DRIVERS = ("psycopg2", "asyncpg", "pg8000", "pymysql", "mysqldb", "pysqlite", "aiosqlite")
OTHERS = ("mysql", "mariadb", "oracle", "mssql", "postgresql", "postgres", "sqlite")  # whose names are no secret
_BEATS = text(
    "SELECT trials.trial_id, trial_heartbeats.heartbeat FROM trials JOIN trial_heartbeats"
    " ON trial_heartbeats.trial_id = trials.trial_id WHERE trials.state = 'RUNNING' AND trials.study_id = :study"
)
FORM = "postgresql+psycopg://USER:PASSWORD@HOST:PORT/DATABASE"


class StorageError(Failure, RuntimeError):
    """The database cannot be used; the text repeats nothing of a server's URL: any part of it may be a password.

    Args:
        text: What is wrong, and the remedy.
        lasting: Whether it stays so until somebody does something; a server may come back by itself.
    """

    def __init__(self, text: str, *, lasting: bool = False) -> None:
        super().__init__(text)
        self.lasting = lasting


def default_url(out: Path) -> URL:
    """The database of a study that is trained on one machine: a file in its directory."""
    return URL.create("sqlite", database=str(out.resolve() / "optuna.db"))


def parse_url(given: str) -> URL:
    """Read what was given as storage.

    Args:
        given: sqlite:///PATH, or postgresql+psycopg://USER:PASSWORD@HOST:PORT/DATABASE; the password may be left out,
            PostgreSQL's client then looks for it in PGPASSWORD and in ~/.pgpass.

    Raises:
        ValueError: If it is anything else. The text is not repeated: it may hold a password.
    """
    scheme, colon, rest = given.partition(":")
    try:
        url = make_url(f"{scheme.lower()}{colon}{rest}")
    except (ArgumentError, ValueError):
        raise ValueError(f"The storage is not a URL of a database; write {FORM} or sqlite:///PATH.") from None
    if url.drivername == "sqlite":
        return _checked_file(url)
    if given.count("@") > 1 or "@" in f"{url.host}{url.database}":
        raise ValueError("The storage has more than one '@'; write one that belongs to the password as %40.")
    if url.drivername in SCHEMES:
        if url.host == "HOST":
            raise ValueError(f"The storage is the form itself; put names into it: {FORM}.")
        if not url.query.keys() <= OPTIONS:  # which are not repeated: part of a password may have become one
            raise ValueError(f"The storage has an option that is not known; these are: {', '.join(sorted(OPTIONS))}.")
        return url.set(drivername="postgresql+psycopg")
    named, _, driver = url.drivername.partition("+")
    shown = url.drivername if driver in DRIVERS else named  # what is no driver may be anything
    kind = f" of the kind {shown!r}" if named in OTHERS else ""
    raise ValueError(f"A storage{kind} is not supported; write {FORM} or sqlite:///PATH.")


def _checked_file(url: URL) -> URL:
    if url.username or url.host or url.query or re.match("[^/.].*@", url.database or ""):
        raise ValueError(f"A storage in a file is written sqlite:///PATH, without options; one on a server {FORM}.")
    if url.database in (None, "", ":memory:"):
        raise ValueError("A storage in memory cannot be shared; write sqlite:///PATH.")
    return url


def public_url(url: URL) -> str:
    """The path of a file, or the form of a server's URL: what is shown and recorded, of which no part is a secret."""
    return f"sqlite:///{url.database}" if url.drivername == "sqlite" else FORM


class _Hasty(sqlite3.Connection):
    """To a file that may be lost at any time: nobody waits until it is on the disk."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.execute("PRAGMA synchronous = OFF")


class BeatingStorage(RDBStorage):
    """Optuna's storage, with a heartbeat that has no gaps.

    Args:
        url: The database.
        create: Whether to make its tables; only whoever starts a study does, before anybody joins.
        beat_s: Seconds from one heartbeat to the next.
        grace_s: Seconds without one, until a run counts as abandoned.
    """

    def __init__(self, url: URL, *, create: bool, beat_s: int, grace_s: int) -> None:
        sqlite = url.drivername == "sqlite"
        self._grace_s = grace_s
        self._since: dict[int, tuple[object, float]] = {}  # by trial that runs: its last beat, and when we saw it first
        super().__init__(
            url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}"),  # Optuna fills a template
            {"connect_args": {"timeout": LOCK_S, "factory": _Hasty}}
            if sqlite
            else {
                "pool_pre_ping": True,
                "connect_args": CONNECTION,
            },
            heartbeat_interval=beat_s,
            grace_period=grace_s,
            skip_table_creation=not create,
        )

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """As in Optuna, but with a beat before the start: without any beat, a dead trial would run for ever."""
        if state == TrialState.RUNNING:
            super().record_heartbeat(trial_id)
        return super().set_trial_state_values(trial_id, state, values)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """As in Optuna, and those whose beat stands still by our own clock: it may be of a clock that was ahead."""
        stale = super()._get_stale_trial_ids(study_id)
        with self.engine.connect() as connection:
            beats = {int(row[0]): row[1] for row in connection.execute(_BEATS, {"study": study_id})}
        now, since = time.monotonic(), self._since
        self._since = {i: since[i] if i in since and since[i][0] == beat else (beat, now) for i, beat in beats.items()}
        still = [i for i, (_, seen) in self._since.items() if now - seen > self._grace_s]
        return sorted({*stale, *still})

    def record_heartbeat(self, trial_id: int) -> None:
        """As in Optuna, but a beat that does not get through is not worth a run: the next one may."""
        with contextlib.suppress(SQLAlchemyError, StorageInternalError):
            super().record_heartbeat(trial_id)


@contextlib.contextmanager
def connected(url: URL, *, create: bool, beat_s: int = BEAT_S, grace_s: int = GRACE_S) -> Generator[BeatingStorage]:
    """Open a database for a while, with Optuna silent: what there is to say, we say.

    Args:
        url: From `parse_url` or `default_url`.
        create: Whether to make its tables.
        beat_s: Seconds from one heartbeat to the next.
        grace_s: Seconds without one, until a run counts as abandoned.

    Raises:
        StorageError: If it does not answer, or is no such database.
        ModuleNotFoundError: If the driver is not installed.
    """
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    pool = logging.getLogger("sqlalchemy.pool")  # which writes tracebacks when a connection breaks
    level = pool.level
    pool.setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            storage = _open(url, create=create, beat_s=beat_s, grace_s=grace_s)
            try:
                yield storage
            finally:
                storage.remove_session()
                storage.engine.dispose()
        finally:
            pool.setLevel(level)
            optuna.logging.set_verbosity(verbosity)


@contextlib.contextmanager
def answering(url: URL) -> Generator[None]:
    """Around everything that asks the database: what goes wrong is told in one line, without a password.

    A damaged database shows as any kind of error in the layers below: a text that is no JSON, a date that is none, a
    row that is missing.

    Raises:
        StorageError: In place of the errors of the layers below.
        RecordError: As it is, and so are an OSError and a missing module.
    """
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        raise _told(url, error) from None
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, RecordError | StorageError):
            raise
        raise _damaged(url, f"{type(error).__name__}: {error}") from None


def _of_this_version(url: URL, *, create: bool, beat_s: int, grace_s: int) -> BeatingStorage:
    """Optuna refuses the tables of another version of itself with a bare RuntimeError."""
    try:
        return BeatingStorage(url, create=create, beat_s=beat_s, grace_s=grace_s)
    except RuntimeError as other:
        remedy = "Delete it, or take another database: no run is lost by that."
        raise StorageError(f"The storage {public_url(url)} is of another version of Optuna. {remedy}") from other


def _open(url: URL, *, create: bool, beat_s: int, grace_s: int) -> BeatingStorage:
    if url.drivername == "sqlite" and not create and not exists(Path(url.database or "")):
        remedy = "Start the study there first, with steepest sweep or race."
        raise StorageError(f"The storage {public_url(url)} does not exist. {remedy}")
    try:
        with answering(url):
            try:
                return _of_this_version(url, create=create, beat_s=beat_s, grace_s=grace_s)
            except SQLAlchemyError as error:  # two who start in an empty database may get in each other's way, once
                if not re.search("already exists|duplicate key", str(error)):
                    raise
                return BeatingStorage(url, create=create, beat_s=beat_s, grace_s=grace_s)
    except ImportError as missing:
        remedy = "PostgreSQL needs its driver: pip install 'steepest[postgres]'"
        raise ModuleNotFoundError(remedy, name="psycopg") from missing


def _told(url: URL, error: Exception) -> StorageError:
    cause = error.__cause__ or error
    driver = cause.orig if isinstance(cause, DBAPIError) else None
    reason = " ".join(str(driver or cause).split()).rstrip(".?")
    if url.drivername == "sqlite":
        return _told_of_file(url, reason, of_driver=driver is not None)
    silent = (OperationalError, InterfaceError, TimeoutError)
    if error.__cause__ is not None and not isinstance(error, silent) and not isinstance(cause, silent):
        return _damaged(url, reason)
    remedy = "Check that the server runs, and host, port, user, password and database of the URL."
    return StorageError(f"The storage {public_url(url)} does not answer: {_by_names(url, reason)}. {remedy}")


def _told_of_file(url: URL, reason: str, *, of_driver: bool) -> StorageError:
    storage = public_url(url)
    if re.search("disk is full|disk I/O error", reason):
        free = "Free some space and repeat the command: no run is lost, each goes on from its last checkpoint."
        return StorageError(f"The disk of the storage {storage} is full ({reason}). {free}", lasting=True)
    if re.search("readonly|read-only|unable to open", reason):
        remedy = "Make file and directory writable, or choose another directory."
        return StorageError(f"The storage {storage} cannot be written: {reason}. {remedy}", lasting=True)
    if re.search("locked|busy", reason):
        remedy = f"Another process has held it for more than {LOCK_S} s; wait, or stop that process."
        return StorageError(f"The storage {storage} does not answer: {reason}. {remedy}")
    return _damaged(url, reason)


def _damaged(url: URL, reason: str) -> StorageError:
    """What the directories of the runs make good: the database is theirs, and not the other way round."""
    plain = " ".join(reason.split()).rstrip(".?")[:300]
    if url.drivername == "sqlite":
        remedy = f"Delete {url.database} and repeat the command that started the study: it is made anew from the runs"
        return StorageError(
            f"The storage {public_url(url)} is damaged: {plain}. {remedy}, none of which is lost.", lasting=True
        )
    remedy = "Take another database: it is filled anew from the runs, none of which is lost."
    return StorageError(f"The storage {public_url(url)} is damaged: {_by_names(url, plain)}. {remedy}", lasting=True)


def _by_names(url: URL, reason: str) -> str:
    """What a driver says, with the names of the URL's parts in place of the parts; short ones only as whole words."""
    parts = [("DATABASE", url.database), ("HOST", url.host), ("USER", url.username), ("PASSWORD", url.password)]
    parts += [(key.upper(), str(value)) for key, value in url.query.items()]
    names = {form: name for name, part in parts if part for form in (str(part), quote(str(part)))}
    for part in sorted(names, key=len, reverse=True):
        around = "" if len(part) > 3 else r"\b"
        reason = re.sub(f"{around}{re.escape(part)}{around}", names[part], reason)
    return reason
