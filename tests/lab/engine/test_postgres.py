"""Many machines share a study through PostgreSQL: a real server, with a password, on this machine."""

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from steepest.lab.cli import main
from steepest.lab.engine.storage import FORM, StorageError, connected, parse_url
from steepest.lab.engine.study import join_study
from steepest.lab.studies.study import write_study
from steepest.lab.studies.sweep.plan import Sweep
from steepest.lab.tasks import make_task
from tests.lab.processes import ended, modified, rows_of, sessions, steepest, wait_for, workers_of

PASSWORD = "s3cr3t-{%}"
QUOTED = "s3cr3t-%7B%25%7D"
PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
COMMAND = ("sweep", "--task", "digits", "--methods", "sgd", "--lrs", "0.03,0.1", "--seeds", 1, "--steps", 80)

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.skipif(not PROGRAMS, reason="PostgreSQL is not installed: apt-get install postgresql"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Port of a server that asks for a password; it cannot run as root, so it runs as nobody then."""
    folder = Path(f"/tmp/steepest-postgres-{os.getpid()}")  # short, for its socket; and open to another user
    folder.mkdir()
    user = "nobody" if os.getuid() == 0 else None
    shutil.chown(folder, user or os.getuid())
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    binaries, data = PROGRAMS[-1].parent, folder / "data"

    def run(program, *words):
        command = [binaries / program, *words]
        subprocess.run(command, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=60)

    try:
        run("initdb", "-D", data, "-U", "me", "-A", "scram-sha-256", f"--pwfile={folder}/password", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        run("pg_ctl", "-D", data, "-o", options, "-l", folder / "log", "-w", "start")
        yield port
    finally:
        if (data / "postmaster.pid").exists():
            run("pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder)


def command_lines(*pids):
    return b"\n".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids).decode()


def test_a_killed_dispatcher_is_survived_and_no_password_is_left_anywhere(server, tmp_path):
    """One dispatcher has the password in its URL, the other one takes it from its environment."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    public = f"postgresql+psycopg://me@127.0.0.1:{server}/postgres"
    url = f"postgresql://me:{QUOTED}@127.0.0.1:{server}/postgres"
    first = steepest(*COMMAND, "--workers", 1, "--out", out, "--storage", url)
    wait_for(lambda: workers_of(out))
    second = steepest("work", public, "--runs", out, "--workers", 1, PGPASSWORD=PASSWORD)
    wait_for(lambda: len(workers_of(out)) == 2)
    shown = command_lines(second.pid, *workers_of(out).values())
    os.kill(first.pid, signal.SIGKILL)
    shown += first.communicate()[0].decode()
    shown += ended(second)
    assert len(modified(out)) == 2
    before = modified(out)
    shown += ended(steepest(*COMMAND, "--workers", 1, "--out", out, "--storage", public, PGPASSWORD=PASSWORD))
    assert modified(out) == before
    assert sorted(sessions(out).values()) in ([1, 1], [1, 2])

    one = ("--lrs", "0.1", "--workers", 1, "--out", alone)  # another study, the same database
    ended(steepest(*COMMAND[:5], *one, *COMMAND[7:], "--storage", url))
    assert rows_of(alone).items() <= rows_of(out).items()
    assert list(sessions(alone).values()) == [1]

    kept = b"".join(path.read_bytes() for folder in (out, alone) for path in folder.rglob("*") if path.is_file())
    assert FORM.encode() in kept
    for secret in (PASSWORD, QUOTED, "s3cr3t"):
        assert secret not in shown
        assert secret.encode() not in kept


def test_a_wrong_password_is_told_in_one_line(server, tmp_path, capsys):
    url = f"postgresql://me:wr0ng@127.0.0.1:{server}/postgres"
    assert main([*map(str, COMMAND), "--out", str(tmp_path / "out"), "--storage", url]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"error: The storage {FORM} does not answer: " in told
    assert f'connection to server at "HOST", port {server} failed' in told
    assert 'password authentication failed for user "USER"' in told
    assert "wr0ng" not in told


def test_a_study_that_the_server_does_not_know_cannot_be_joined(server, tmp_path, monkeypatch):
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    asked = Sweep(task=make_task("digits", "demo"), methods=("sgd",), seeds=(0,), options={}, lrs={"sgd": (0.1,)})
    write_study(tmp_path, asked, asked.configs(), command="steepest sweep ...")
    url = parse_url(f"postgresql://me@127.0.0.1:{server}/postgres")
    with connected(url, create=True):  # the tables are there, the study is not
        pass
    with pytest.raises(StorageError, match=r"does not know the study 'sweep digits-demo .*\. Give the"):
        join_study(tmp_path, workers=1, storage=url.render_as_string())
