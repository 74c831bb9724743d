"""What a stranger may have put in a directory: refused by name, never followed, waited for or read without end."""

import ast
import contextlib
import errno
import json
import os
import re
import socket
from pathlib import Path

import pytest

import steepest
from steepest.lab.disk import files
from steepest.lab.disk.fields import RecordError
from steepest.lab.disk.files import (
    DataError,
    one_line,
    open_data,
    read_bytes,
    read_lines,
    read_tail,
    read_text,
    write_whole,
)
from steepest.lab.disk.ours import locked
from steepest.lab.runs.recorder import MetricsFile
from tests.cases import cases

SECRET = "SECRET of somebody else"


def link_outside(path):
    outside = path.parent.parent / "outside"
    outside.write_text(SECRET)
    path.symlink_to(outside)


def listen(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket has at most 108 bytes
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(here)


THINGS = {
    "a link": link_outside,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a pipe": os.mkfifo,
    "a directory": Path.mkdir,
    "a socket": listen,
}
NAMES = re.compile(r"^.*/it: .*it is a (link|pipe|directory|socket), not a regular file.*\. .*[Dd]elete")


@contextlib.contextmanager
def kept_inside(tmp_path):
    (tmp_path / "inside").mkdir()
    yield tmp_path / "inside"
    if (tmp_path / "outside").exists():
        assert (tmp_path / "outside").read_text() == SECRET
    assert sorted(path.name for path in tmp_path.iterdir()) in (["inside"], ["inside", "outside"])


@pytest.fixture
def inside(tmp_path):
    with kept_inside(tmp_path) as folder:
        yield folder


@cases("thing", THINGS)
@cases(
    "use",
    [
        read_bytes,
        read_text,
        read_tail,
        files.digest,
        files.check_regular,
        lambda path: list(read_lines(path)),
        lambda path: write_whole(path, "ours"),
        lambda path: files.append_line(path, "ours"),
        files.remove,
    ],
    ["bytes", "text", "tail", "digest", "check", "lines", "whole", "append", "remove"],
)
def test_only_regular_files_are_opened(tmp_path, thing, use):
    with kept_inside(tmp_path) as inside:
        path = inside / "it"
        THINGS[thing](path)
        with pytest.raises(RecordError, match=NAMES):
            use(path)
        assert os.listdir(inside) == ["it"]


@pytest.mark.parametrize("thing", THINGS)
def test_a_lock_is_a_regular_file(inside, thing):
    THINGS[thing](inside / "lock")
    with pytest.raises(RecordError, match=r"/lock: it is a \w+, not a regular file"), locked(inside):
        pass


@cases("name", ["runs/0123456789abcdef", "plots", "branches", "runs/0123456789abcdef/branches"])
@cases("depth", [0, 1])
def test_a_directory_of_a_study_is_no_link(tmp_path, name, depth):
    linked = Path(*Path(name).parts[: len(Path(name).parts) - depth])
    if not linked.parts:
        return
    (tmp_path / "elsewhere" / Path(name).relative_to(linked)).mkdir(parents=True)
    study = tmp_path / "study"
    (study / linked).parent.mkdir(parents=True)
    (study / linked).symlink_to(tmp_path / "elsewhere")
    (study / name / "secret").write_text(SECRET)
    path = study / name / "secret"
    for use in (
        read_bytes,
        lambda path: write_whole(path, "ours"),
        files.remove,
        lambda path: files.append_line(path, "a"),
    ):
        with pytest.raises(RecordError, match=r"is a link, not a directory"):
            use(path)
    with pytest.raises(RecordError, match=r"is a link, not a directory"):
        files.make_directory(study / name / "branches" if name.endswith("f") else study / name)
    assert path.read_text() == SECRET
    assert [p for p in (tmp_path / "elsewhere").rglob("*") if p.is_file()] == [path.resolve()]


def test_the_directory_that_a_user_gives_may_be_a_link(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").symlink_to("scratch")
    files.make_directory(tmp_path / "out" / "runs" / "0123456789abcdef")
    write_whole(tmp_path / "out" / "runs" / "0123456789abcdef" / "config.json", "{}")
    assert read_text(tmp_path / "scratch" / "runs" / "0123456789abcdef" / "config.json") == "{}"


@pytest.mark.parametrize("name", ["lock", "worker.log"])
def test_a_file_with_a_second_name_is_not_changed(inside, name):
    (inside / "other").write_text(SECRET)
    os.link(inside / "other", inside / name)
    use = locked(inside).__enter__ if name == "lock" else lambda: files.append_line(inside / name, "ours")
    with pytest.raises(RecordError, match=rf"{name}: the file has a second name elsewhere.*Delete"):
        use()
    assert (inside / "other").read_text() == SECRET


def test_replacing_a_file_leaves_its_other_name_alone(inside):
    (inside / "other").write_text(SECRET)
    os.link(inside / "other", inside / "it")
    write_whole(inside / "it", "ours")
    assert ((inside / "other").read_text(), (inside / "it").read_text()) == (SECRET, "ours")


def test_a_file_that_is_far_too_large_is_not_read(inside):
    with (inside / "it").open("wb") as file:
        file.truncate(2**40)  # takes no space on the disk
    for use in (read_bytes, read_text, lambda path: list(read_lines(path))):
        with pytest.raises(RecordError, match=r"it: the file has 1099511627776 bytes, more than \d+"):
            use(inside / "it")
    assert read_tail(inside / "it", size=3) == b"\0\0\0"


def test_a_line_without_an_end_is_not_read_whole(inside):
    with (inside / "it").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(RecordError, match=r"it: line 1 has more than 16777216 bytes"):
        list(read_lines(inside / "it"))


def test_lines_come_without_the_one_that_is_being_written(inside):
    (inside / "it").write_bytes("a\n\u00e9\nhal".encode())
    assert list(read_lines(inside / "it")) == ["a", "\u00e9"]
    (inside / "it").write_bytes(b"\xff\n")
    with pytest.raises(RecordError, match=r"it: the file cannot be read .*utf-8"):
        list(read_lines(inside / "it"))


def test_a_message_and_a_log_have_no_line_of_a_file_s_own(inside):
    text = "0.1\nssh-ed25519 AAAA evil\r\x1b[2J\u2028\u202e\x85"
    assert one_line(text) == "0.1\\nssh-ed25519 AAAA evil\\r\\x1b[2J\\u2028\\u202e\\x85"
    assert one_line("caf\u00e9 \u2265") == "caf\u00e9 \u2265"
    assert "\n" not in str(RecordError(inside, text, text))
    files.append_line(inside / "worker.log", text)
    assert (inside / "worker.log").read_text().count("\n") == 1


def test_what_is_not_ours_is_never_deleted(inside):
    for name in (".notes.tmp", ".cache.123.tmp", ".result.json.abc.tmp", ".result.json.12.tmp~", "result.json.12.tmp"):
        (inside / name).write_text(SECRET)
    (inside / ".checkpoint.pt.12.tmp").mkdir()
    (inside / ".study.json.12.tmp").symlink_to(inside / ".notes.tmp")
    foreign = sorted(os.listdir(inside))
    (inside / ".checkpoint.pt.34.0123abcd.tmp").write_text("ours")
    (inside / ".packed_train_000012.bin.34.0123abcd.tmp").write_text("ours")
    (inside / ".report.html.34.0123abcd.tmp").write_text("of a report that is written just now")
    with locked(inside):
        assert sorted(os.listdir(inside)) == sorted([*foreign, ".report.html.34.0123abcd.tmp", "lock"])


class FullDisk:
    """In place of `os.write`: takes so many bytes, then refuses until it is freed."""

    def __init__(self, room):
        self.room, self.write = room, os.write

    def __call__(self, descriptor, content):
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.write(descriptor, bytes(content)[: self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("room", [0, 1, 10, 30])
def test_a_disk_that_is_full_for_a_moment_glues_no_rows(tmp_path, monkeypatch, room):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", step=0)
    rows = [{"kind": "train", "step": step, "loss": 1 / step} for step in (1, 2, 3)]
    metrics.append(rows[0])
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", FullDisk(room))
        with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
            metrics.append(rows[1])
    metrics.append(rows[2])
    metrics.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [rows[0], rows[2]]


def test_a_row_that_is_written_in_parts_is_whole(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, bytes(content)[:3]))
    metrics = MetricsFile(tmp_path / "metrics.jsonl", step=0)
    metrics.append({"kind": "train", "step": 1})
    metrics.close()
    write_whole(tmp_path / "result.json", "a longer text")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"kind": "train", "step": 1}\n'
    assert (tmp_path / "result.json").read_text() == "a longer text"


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, "old")
    write_whole(path, b"new\xff")
    assert path.read_bytes() == b"new\xff"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, "old")

    def fail(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"


def test_a_large_file_is_replaced_when_all_of_it_is_written(tmp_path):
    path = tmp_path / "packed_val_000000.bin"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as descriptor:
        os.write(descriptor, bytes(1 // 0))
    assert path.read_text() == "old"
    with files.replacing(path, durable=True) as descriptor:
        os.write(descriptor, b"12345")
        assert path.read_text() == "old"
        os.pwrite(descriptor, b"0", 0)
    assert path.read_text() == "02345"
    assert os.listdir(tmp_path) == [path.name]


def test_a_full_disk_is_told_with_the_name_of_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    write_whole(tmp_path / "result.json", "old")
    monkeypatch.setattr(os, "write", FullDisk(2))
    with pytest.raises(OSError, match=r"No space left on device: .*/result\.json'"):
        write_whole(tmp_path / "result.json", "new")
    assert os.listdir(tmp_path) == ["result.json"]
    assert (tmp_path / "result.json").read_text() == "old"


def test_data_of_the_user_may_be_a_link_but_no_pipe(tmp_path):
    (tmp_path / "text").write_text("data")
    (tmp_path / "link").symlink_to("text")
    assert files.read_data(tmp_path / "link", most=4) == b"data"
    with pytest.raises(DataError, match=r"text has 4 bytes; .* may have 3"):
        files.read_data(tmp_path / "text", most=3)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, kind in (("pipe", "pipe"), ("zero", "device"), (".", "directory")):
        with pytest.raises(DataError, match=f"is a {kind}, not a regular file"), open_data(tmp_path / name):
            pass


LAB = [path for room in ("lab", "cli") for path in sorted((Path(steepest.__file__).parent / room).rglob("*.py"))]
OPENERS = {"open", "read_text", "write_text", "read_bytes", "write_bytes", "memmap", "fromfile", "tofile", "touch"}
OPENERS |= {"unlink", "rename", "rmtree", "mkdir", "makedirs", "symlink_to", "hardlink_to", "exists", "load", "save"}
HARMLESS = {  # of the system, of this package, in memory, or of a profiler that has just written it
    ("study.py", "Path('/sys/fs/cgroup/cpu.max').read_text()"),
    ("environment.py", "description.exists()"),
    ("environment.py", "description.read_text(encoding='utf-8', errors='replace')"),
    ("memory.py", "status.exists()"),
    ("memory.py", "status.read_text(encoding='utf-8', errors='replace')"),
    ("memory.py", "trace.read_text(encoding='utf-8')"),
    ("config.py", "path.read_bytes()"),
    ("page.py", "files('steepest.lab.report').joinpath(name).read_text(encoding='utf-8')"),
    ("checkpoint.py", "torch.load(file, map_location='cpu', weights_only=True)"),
    ("train.py", "training.save(run_dir / 'checkpoint.pt')"),
    ("train.py", "training.load(checkpoint)"),
    ("trained.py", "training.load(checkpoint)"),
    *(
        (name, "self.load()") for name in ("bench.py", "plan.py", "runs.py", "study.py")
    ),  # the task that a command names
    ("branch.py", "self.load(checkpoint)"),
    ("verify.py", "torch.save(weights, folder / 'weights.pt')"),  # between processes, in a temporary folder of its own
    ("verify.py", "torch.load(folder / 'weights.pt', weights_only=True)"),
}


@cases("path", LAB)
def test_nothing_in_the_lab_opens_files_in_another_way(path):
    if path.name == "files.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            method = isinstance(node.func, ast.Attribute)
            name = node.func.attr if method else node.func.id
            in_memory = any(re.match(r"buffer\b|BytesIO\(", ast.unparse(argument)) for argument in node.args)
            opens = (name in OPENERS if method else name == "open") and not in_memory
            where = f"{path.name}:{node.lineno} calls {ast.unparse(node)}; use steepest.lab.disk.files"
            assert not opens or (path.name, ast.unparse(node)) in HARMLESS, where
