"""No password is ever repeated, however wrongly the storage was written, and wherever."""

import contextlib
import shlex

import pytest

from steepest.lab.cli import main
from steepest.lab.cli.hidden import FORM, may_hold_password, without_passwords
from steepest.lab.engine import storage
from tests.cases import cases

SECRET = "s3cr3tw0rd"
WRONG = {
    "one slash too few": f"postgresql+psycopg:/me:{SECRET}@127.0.0.1:1/db",
    "no slashes": f"postgresql:{SECRET}",
    "no scheme": f"me:{SECRET}@127.0.0.1/db",
    "no scheme but slashes": f"//me:{SECRET}@127.0.0.1/db",
    "no user": f"postgresql+psycopg://:{SECRET}@127.0.0.1:1/db",
    "in place of the user": f"postgresql+psycopg://{SECRET}@127.0.0.1:1",
    "in place of the host": f"postgresql+psycopg://me@{SECRET}.invalid:1/db",
    "in place of the port": f"postgresql+psycopg://me@127.0.0.1:{SECRET}/db",
    "in place of the database": f"postgresql+psycopg://me@127.0.0.1:1/{SECRET}",
    "with @": f"postgresql://me:one@{SECRET}@127.0.0.1:1/db",
    "with /": f"postgresql://me:one/{SECRET}@127.0.0.1:1/db",
    "with a number and /": f"postgresql://me@127.0.0.1:1/{SECRET}/@x",
    "with ?": f"postgresql://me@127.0.0.1:1/db?{SECRET}=1",
    "as an option": f"postgresql://me@127.0.0.1:1/db?password={SECRET}",
    "as another option": f"postgresql://me@127.0.0.1:1/db?application_name={SECRET}&sslkey={SECRET}",
    "percent-encoded": f"postgresql%3A%2F%2Fme%3A{SECRET}%40127.0.0.1%3A1%2Fdb",
    "upper-case": f"POSTGRESQL://ME:{SECRET}@127.0.0.1:1/DB",
    "spaces around": f"  postgresql://me:{SECRET}@127.0.0.1:1/db ",
    "spaces inside": f"postgresql://me:one {SECRET} two@127.0.0.1:1/db",
    "another database": f"mysql://me:{SECRET}@127.0.0.1:1/db",
    "another driver": f"postgresql+psycopg2://me:{SECRET}@127.0.0.1:1/db",
    "as the scheme": f"{SECRET}://127.0.0.1/db",
    "as the driver": f"postgresql+{SECRET}://me@127.0.0.1/db",
    "as another driver": f"mysql+{SECRET}://me@127.0.0.1/db",
    "as the client has it": f"host=127.0.0.1 password={SECRET} user=me dbname=db",
    "as its variable has it": f"PGPASSWORD={SECRET}",
    "an unknown scheme": f"psql:me:{SECRET}",
    "two schemes": f"jdbc:postgresql:me:{SECRET}",
    "percent-encoded twice": f"me:{SECRET}%2540127.0.0.1/db",
    "wide signs": f"postgresql\uff1a//me:{SECRET}\uff20127.0.0.1/db",
    "behind a point": f"./postgresql://me:{SECRET}@127.0.0.1:1/db",
    "behind a slash": f"/postgresql://me:{SECRET}@127.0.0.1:1/db",
    "a variable": f"DB=postgresql://me:{SECRET}@127.0.0.1:1/db",
    "a file with a user": f"sqlite://me:{SECRET}@host/db",
    "a file by mistake": f"sqlite:///me:{SECRET}@host/db",
    "a file with an option": f"sqlite:///some.db?password={SECRET}",
}
TINY = ("--task", "digits", "--methods", "sgd", "--seeds", "1", "--steps", "1")
COMMANDS = {
    "race --storage": ("race", *TINY, "--out", "out", "--storage", "URL"),
    "race --storage=": ("race", *TINY, "--out", "out", "--storage=URL"),
    "sweep --storage": ("sweep", *TINY, "--lrs", "0.1", "--out", "out", "--storage", "URL"),
    "work": ("work", "URL", "--runs", "out"),
    "work alone": ("work", "URL"),
    "work --runs": ("work", "out", "--runs", "URL"),
    "--out": ("race", *TINY, "--out", "URL"),
    "--data": ("race", "--task", "text", "--data", "URL"),
    "report": ("report", "URL"),
    "a word too much": ("report", "out", "URL"),
    "a word too much, split": ("report", "out", *["URL"]),
    "an unknown option": ("race", "--database", "URL"),
    "--methods": ("race", "--task", "digits", "--methods", "URL"),
    "--set": ("race", "--task", "digits", "--set", "muon.lr=URL"),
    "--seeds": ("race", "--seeds", "URL"),
    "--lrs": ("sweep", "--task", "digits", "--lrs", "URL"),
    "--batches": ("critical-batch", "measure", "--batches", "URL", "--targets", "1"),
    "train --out": ("train", "--task", "digits", "--method", "sgd", "--steps", "1", "--out", "URL"),
    "no command": ("URL",),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@cases("url", WRONG.values(), WRONG)
def test_a_wrong_storage_is_refused_without_repeating_it(elsewhere, capsys, url):
    for name, words in COMMANDS.items():
        with contextlib.suppress(SystemExit):
            assert main([word.replace("URL", url) for word in words]) in (1, 2), name
        captured = capsys.readouterr()
        assert SECRET not in captured.out + captured.err, name
        assert "Traceback" not in captured.err, name
        assert captured.err, name
    for path in elsewhere.rglob("*"):
        assert SECRET not in str(path)
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


def test_a_password_with_spaces_that_the_shell_has_split_is_not_repeated(capsys):
    with pytest.raises(SystemExit) as left:
        main(["race", *TINY, "--storage", *shlex.split(f"postgresql://me:one {SECRET} two@host/db")])
    told = capsys.readouterr().err
    assert left.value.code == 2
    assert SECRET not in told
    assert f"a storage is one word in quotes, --storage '{FORM}'" in told


def test_the_form_is_that_of_the_lab():
    assert storage.FORM == FORM


@cases(
    "word",
    ["out/x", "/home/me@work/out", "./me@work", "../a@b", "~/a@b", "sqlite:///a.db", "sqlite:////home/a@b/c.db", "x:y"],
)
def test_paths_are_paths(word):
    assert not may_hold_password(word)
    assert without_passwords(f"error: {word}/study.json: no study here", [word]) == (
        f"error: {word}/study.json: no study here"
    )


def test_a_link_and_a_lone_sign_stay():
    text = f"See https://example.org/a?b=c. A @ B is a product; write {FORM}."
    assert without_passwords(text) == text
