"""The database through which workers share the runs of a study: an Optuna storage that beats for every run.

It only says who takes which run next. What is finished, the run directories say: the database may be lost at any time.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Generator, Sequence
from pathlib import Path
from urllib.parse import quote

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from steepest.lab.files import exists

BEAT_S = 10
GRACE_S = 60  # without a beat for so long, a worker counts as dead and its run is given to another
CONNECT_S = 10
LOCK_S = 60  # how long one waits for another who writes to the same SQLite file
CONNECTION = {"connect_timeout": CONNECT_S, "tcp_user_timeout": 1000 * LOCK_S}
# Of PostgreSQL's client, what may stand behind the URL's question mark; all but the password may be shown.
OPTIONS = {"application_name", "connect_timeout", "password", "passfile", "sslcert", "sslkey", "sslmode", "sslrootcert"}
SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")
OTHERS = ("mysql", "mariadb", "oracle", "mssql", "postgresql", "postgres", "sqlite")  # whose names are no secret
FORM = "postgresql+psycopg://USER:PASSWORD@HOST:PORT/DATABASE"


class StorageError(RuntimeError):
    """The database cannot be used; the text repeats nothing of a server's URL: any part of it may be a password."""


def default_url(out: Path) -> URL:
    """The database of a study that is trained on one machine: a file in its directory."""
    return URL.create("sqlite", database=str(out.resolve() / "optuna.db"))


def parse_url(text: str) -> URL:
    """Read what was given as storage.

    Args:
        text: sqlite:///PATH, or postgresql+psycopg://USER:PASSWORD@HOST:PORT/DATABASE; the password may be left out,
            PostgreSQL's client then looks for it in PGPASSWORD and in ~/.pgpass.

    Raises:
        ValueError: If it is anything else. The text is not repeated: it may hold a password.
    """
    scheme, colon, rest = text.partition(":")
    try:
        url = make_url(f"{scheme.lower()}{colon}{rest}")
    except (ArgumentError, ValueError):
        raise ValueError(f"The storage is not a URL of a database; write {FORM} or sqlite:///PATH.") from None
    if url.drivername == "sqlite":
        return _checked_file(url)
    if text.count("@") > 1 or "@" in f"{url.host}{url.database}":
        raise ValueError("The storage has more than one '@'; write one that belongs to the password as %40.")
    if url.drivername in SCHEMES:
        if url.host == "HOST":
            raise ValueError(f"The storage is the form itself; put names into it: {FORM}.")
        if not url.query.keys() <= OPTIONS:  # which are not repeated: part of a password may have become one
            raise ValueError(f"The storage has an option that is not known; these are: {', '.join(sorted(OPTIONS))}.")
        return url.set(drivername="postgresql+psycopg")
    kind = f" of the kind {url.drivername!r}" if url.drivername.partition("+")[0] in OTHERS else ""
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
        super().__init__(
            url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}"),  # Optuna fills a template
            {"connect_args": {"timeout": LOCK_S}}
            if sqlite
            else {
                "pool_pre_ping": True,
                "connect_args": {"connect_timeout": CONNECT_S, "tcp_user_timeout": 1000 * LOCK_S},
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
            optuna.logging.set_verbosity(verbosity)


@contextlib.contextmanager
def answering(url: URL) -> Generator[None]:
    """Around everything that asks the database: what goes wrong is told in one line, without a password.

    Raises:
        StorageError: In place of the errors of the layers below.
    """
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        raise StorageError(_one_line(url, error)) from None


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


def _one_line(url: URL, error: Exception) -> str:
    cause = error.__cause__ or error
    driver = cause.orig if isinstance(cause, DBAPIError) else None
    reason = " ".join(str(driver or cause).split()).rstrip(".?")
    if url.drivername != "sqlite":
        reason = _by_names(url, reason)
    remedy = "Check that the server runs, and host, port, user, password and database of the URL."
    if url.drivername == "sqlite":
        remedy = "Check that the file is an Optuna database on a disk that can be written; it may be deleted."
    return f"The storage {public_url(url)} does not answer: {reason}. {remedy}"


def _by_names(url: URL, reason: str) -> str:
    """What a driver says, with the names of the URL's parts in place of the parts; short ones only as whole words."""
    parts = [("DATABASE", url.database), ("HOST", url.host), ("USER", url.username), ("PASSWORD", url.password)]
    parts += [(key.upper(), str(value)) for key, value in url.query.items()]
    names = {form: name for name, part in parts if part for form in (str(part), quote(str(part)))}
    for part in sorted(names, key=len, reverse=True):
        around = "" if len(part) > 3 else r"\b"
        reason = re.sub(f"{around}{re.escape(part)}{around}", names[part], reason)
    return reason
