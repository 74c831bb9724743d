"""Which databases are accepted, and that no password is ever shown."""

import re
import socket
import sqlite3
import sys
import warnings

import optuna
import pytest
from optuna.trial import TrialState

from steepest.lab.engine import storage as module
from steepest.lab.engine.storage import FORM, StorageError, answering, connected, default_url, parse_url, public_url
from tests.cases import cases

SECRET = "s3cr3t"


@cases(
    "text, public",
    [
        (f"postgresql+psycopg://me:{SECRET}@host:5432/db", FORM),
        (f"postgresql://me:{SECRET}@host/db?sslmode=require", FORM),
        (f"postgres://me@host/db?password={SECRET}", FORM),
        (f"POSTGRESQL://{SECRET}@host", FORM),
        ("sqlite:///out/optuna.db", "sqlite:///out/optuna.db"),
    ],
)
def test_of_a_server_s_url_only_the_form_is_shown(text, public):
    assert public_url(parse_url(text)) == public


@cases(
    "text, message",
    [
        (SECRET, "The storage is not a URL of a database; write postgresql"),
        (f"postgresql://me:{SECRET}@host:port/db", "The storage is not a URL of a database"),
        (f"postgresql://me:x@{SECRET}@host/db", r"more than one '@'; write one that belongs to the password as %40"),
        (f"postgresql://me:p@{SECRET}/w?x@host/db", r"more than one '@'"),
        (f"postgresql://me@host/db?passwd={SECRET}", "an option that is not known; these are: application_name"),
        (f"postgresql://me@host/db?PASSWORD={SECRET}", "an option that is not known"),
        (f"postgresql://me@host/db?{SECRET}=1", "an option that is not known"),
        (f"mysql://me:{SECRET}@host/db", "A storage of the kind 'mysql' is not supported; write postgresql"),
        (f"postgresql+psycopg2://me:{SECRET}@host/db", "kind 'postgresql\\+psycopg2' is not supported"),
        ("sqlite://", "A storage in memory cannot be shared; write sqlite:///PATH"),
        ("sqlite:///:memory:", "A storage in memory cannot be shared"),
        (f"sqlite://me:{SECRET}@host/db", "A storage in a file is written sqlite:///PATH, without options; one on a"),
        (f"sqlite:///me:{SECRET}@host/db", "A storage in a file is written sqlite:///PATH"),
        (f"sqlite:///some.db?password={SECRET}", "A storage in a file is written sqlite:///PATH, without options"),
        (f"{SECRET}://host/db", "A storage is not supported; write postgresql"),
        (FORM.replace(":PORT", ""), "The storage is the form itself; put names into it"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_repeating_it(text, message):
    with pytest.raises(ValueError, match=message) as refused:
        parse_url(text)
    assert SECRET not in str(refused.value)


def test_a_server_that_is_down_is_told_in_one_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = parse_url(f"postgresql://me:{SECRET}@127.0.0.1:{port}/db")
    with pytest.raises(StorageError, match=f"{re.escape(FORM)} does not answer: .*HOST.*{port}.*efused") as down:
        connected(url, create=True).__enter__()
    assert str(down.value).endswith(
        "Check that the server runs, and host, port, user, password and database of the URL."
    )
    assert SECRET not in str(down.value)
    assert "\n" not in str(down.value)


def test_a_password_that_the_driver_repeats_is_not_shown():
    url = parse_url(f"postgresql://me:{SECRET}@host/db?password=t0psecret")
    with pytest.raises(StorageError) as error, answering(url):
        raise optuna.exceptions.StorageInternalError(f"cannot use {SECRET} and t0psecret")
    assert "does not answer: cannot use PASSWORD and PASSWORD." in str(error.value)


def test_a_missing_driver_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'steepest\[postgres\]'"):
        connected(parse_url("postgresql://me@127.0.0.1:1/db"), create=True).__enter__()


def test_a_file_that_is_no_database_is_told(tmp_path):
    (tmp_path / "optuna.db").write_text("not a database, but long enough to look at")
    with pytest.raises(
        StorageError, match=r"optuna.db is damaged: .*not a database\. Delete .*optuna.db and repeat the"
    ):
        connected(default_url(tmp_path), create=True).__enter__()


def test_nobody_joins_where_nothing_was_started(tmp_path):
    with pytest.raises(StorageError, match=r"optuna.db does not exist. Start the study there first"):
        connected(default_url(tmp_path), create=False).__enter__()
    assert not (tmp_path / "optuna.db").exists()


def test_a_directory_may_have_any_name(tmp_path):
    out = tmp_path / "{a} %41 b?c#d"
    out.mkdir()
    with connected(default_url(out), create=True) as storage:
        optuna.create_study(storage=storage, study_name="one")
    assert (out / "optuna.db").exists()


def test_optuna_is_silent_for_as_long_as_we_speak_and_no_longer(tmp_path, capsys):
    before, level = list(warnings.filters), optuna.logging.get_verbosity()
    with connected(default_url(tmp_path), create=True) as storage:
        study = optuna.create_study(storage=storage)
        study.add_trial(optuna.create_trial(state=TrialState.WAITING))
        study.optimize(lambda _: 1.0, n_trials=1)
    assert (list(warnings.filters), optuna.logging.get_verbosity()) == (before, level)
    assert capsys.readouterr() == ("", "")


def test_two_who_start_in_an_empty_database_at_once_both_get_in(tmp_path, monkeypatch):
    """The second finds half of the tables; that is what a race for them looks like."""
    real, calls = module.RDBStorage.__init__, []

    def collide(self, *arguments, **options):
        calls.append(options)
        if len(calls) == 1:
            reason = Exception("table studies already exists")
            raise module.SQLAlchemyError(str(reason))
        real(self, *arguments, **options)

    monkeypatch.setattr(module.RDBStorage, "__init__", collide)
    with connected(default_url(tmp_path), create=True) as storage:
        assert storage.get_all_studies() == []
    assert len(calls) == 2


def test_whoever_takes_a_trial_has_beaten_already(tmp_path):
    """Optuna never ends a trial without a beat, so one whose process died in between would run for ever."""
    with connected(default_url(tmp_path), create=True, grace_s=1) as storage:
        study = optuna.create_study(storage=storage)
        study.add_trial(optuna.create_trial(state=TrialState.WAITING))
        with storage.engine.connect() as connection:
            beats = "select count(*) from trial_heartbeats"
            assert connection.exec_driver_sql(beats).scalar() == 0
            (trial,) = study.get_trials()
            assert storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            assert connection.exec_driver_sql(beats).scalar() == 1


def test_a_beat_that_does_not_get_through_is_no_error(tmp_path):
    with connected(default_url(tmp_path), create=True) as storage:
        storage.engine.dispose()
        (tmp_path / "optuna.db").write_text("gone")
        storage.record_heartbeat(1)
        with pytest.raises(StorageError), answering(default_url(tmp_path)):
            storage.get_all_studies()


def test_the_tables_of_another_optuna_are_told_from_a_fault_of_ours(tmp_path):
    url = default_url(tmp_path)
    with connected(url, create=True):
        pass
    with sqlite3.connect(tmp_path / "optuna.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
        database.execute("UPDATE version_info SET schema_version = 1")
    database.close()
    with pytest.raises(StorageError, match=r"is of another version of Optuna\. Delete it, or take another database"):
        connected(url, create=True).__enter__()
