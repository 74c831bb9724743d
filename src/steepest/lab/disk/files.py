"""Regular files inside their directory: the only way in which the lab opens what lies in a study or in a run.

A directory may come from a stranger. A name in it may be a link to a file elsewhere, a pipe that keeps a reader
waiting, a device without an end or a file that is far too large, and a directory that a study makes inside of its own
may be a link, too. None of them is followed, waited for or read whole: they are refused by name. The directory that a
user gives may be a link itself, and so may the user's own data.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Generator, Iterator
from io import BufferedReader, FileIO
from pathlib import Path

from steepest.lab.errors import Failure

MOST_BYTES = 2**26  # of a record that is read whole
MOST_ROWS_BYTES = 2**32  # of rows that are read one by one
MOST_LINE_BYTES = 2**24
TAIL_BYTES = 2**16

_REMEDY = "Delete it and repeat the command."
_SAFE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_REFUSED = (
    errno.ELOOP,
    errno.ENXIO,
    errno.EISDIR,
    errno.ENODEV,
)  # by the kernel: a link, a pipe, a directory
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFDIR: "a directory",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# what is written under the lock of its directory, so that an unfinished one belongs to nobody who lives
_UNFINISHED = re.compile(
    r"\.(checkpoint\.pt|metrics\.jsonl|environment\.json|result\.json|study\.json|runs\.jsonl\.xz|manifest\.json"
    r"|packed_(train|val)_[0-9]{6}\.bin)\.[0-9]{1,9}(\.[0-9a-f]{8})?\.tmp"
)


class RecordError(Failure, ValueError):
    """A stored file is unreadable or contradicts another one; the text names the file, the problem and the remedy."""

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        self.problem = problem
        super().__init__(one_line(f"{path}: {problem}. {remedy}"))


class DataError(Failure, ValueError):
    """Data of the user that changed or turned out to be damaged while it was read."""


def one_line(text: str) -> str:
    """The text with every character escaped that ends a line, steers a terminal or does not show."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def exists(path: Path) -> bool:
    """Whether there is something of this name, be it what it should be or not; whoever opens it finds out."""
    return os.path.lexists(path)


def read_bytes(path: Path, *, remedy: str = _REMEDY, most: int = MOST_BYTES) -> bytes:
    """The content of a file.

    Args:
        path: The file.
        remedy: What to do if it cannot be read; ends the error message.
        most: Bytes that it may have.

    Raises:
        RecordError: If it is missing, no regular file inside its directory, larger, or cannot be read.
    """
    with open_to_read(path, remedy=remedy, most=most) as file:
        content = file.read(most + 1)
    if len(content) > most:  # it has grown meanwhile
        raise RecordError(path, f"the file has more than {most} bytes", remedy)
    return content


def read_text(path: Path, *, remedy: str = _REMEDY, most: int = MOST_BYTES) -> str:
    """The content of a UTF-8 file; arguments and errors as of `read_bytes`."""
    return _decoded(read_bytes(path, remedy=remedy, most=most), path, remedy)


def read_lines(path: Path, *, remedy: str = _REMEDY, most: int = MOST_ROWS_BYTES) -> Iterator[str]:
    """The whole lines of a UTF-8 file without their ends, one by one; a last one without an end is left out.

    Raises:
        RecordError: As `read_bytes`, or if a line is too long to be one of ours.
    """
    left = most
    with open_to_read(path, remedy=remedy, most=most) as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_LINE_BYTES), b""), start=1):
            left -= len(line)
            if left < 0:
                raise RecordError(path, f"the file has more than {most} bytes", remedy)
            if not line.endswith(b"\n"):
                if len(line) == MOST_LINE_BYTES:
                    raise RecordError(path, f"line {number} has more than {MOST_LINE_BYTES} bytes", remedy)
                return
            yield _decoded(line[:-1], path, remedy)


def read_tail(path: Path, *, remedy: str = _REMEDY, size: int = TAIL_BYTES) -> bytes:
    """The last bytes of a file; errors as of `read_bytes`, but for its size."""
    with open_to_read(path, remedy=remedy, most=None) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        return file.read(size)


def digest(path: Path, *, remedy: str = _REMEDY) -> str:
    """SHA-256 of a file, in hexadecimal; errors as of `read_bytes`, but for its size."""
    with open_to_read(path, remedy=remedy, most=None) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def open_to_read(path: Path, *, remedy: str = _REMEDY, most: int | None) -> Generator[BufferedReader]:
    """A file of at most so many bytes, open for reading; None for any size.

    Raises:
        RecordError: If it is missing, no regular file inside its directory, larger, or cannot be read.
    """
    try:
        with _directory(path.parent) as directory:
            descriptor = os.open(path.name, os.O_RDONLY | _SAFE, dir_fd=directory)
    except FileNotFoundError:
        raise RecordError(path, "the file is missing", remedy) from None
    except OSError as problem:
        raise RecordError(path, f"the file cannot be read ({_reason(path, problem)})", remedy) from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        problem = f"the file cannot be read (it is {_kind(found.st_mode)}, not a regular file)"
        raise RecordError(path, problem, remedy)
    with open(descriptor, "rb") as file:
        if most is not None and found.st_size > most:
            raise RecordError(path, f"the file has {found.st_size} bytes, more than {most}", remedy)
        try:
            yield file
        except OSError as problem:
            raise RecordError(path, f"the file cannot be read ({problem})", remedy) from None


def open_to_append(path: Path, *, empty: bool = False) -> int:
    """A descriptor of a file, made if need be, to whose end every write goes.

    Args:
        path: The file.
        empty: Whether it may be read, too, and shall be emptied by the caller: for locks.

    Raises:
        RecordError: If it is no regular file inside its directory, or has another name elsewhere, too.
        OSError: If it cannot be opened otherwise.
    """
    access = os.O_RDWR if empty else os.O_WRONLY
    with _told(path), _directory(path.parent) as directory:
        descriptor = os.open(path.name, access | os.O_APPEND | os.O_CREAT | _SAFE, 0o666, dir_fd=directory)
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
        return descriptor
    os.close(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise RecordError(path, f"it is {_kind(found.st_mode)}, not a regular file", _REMEDY)
    raise RecordError(path, "the file has a second name elsewhere, under which it would change, too", _REMEDY)


def append_line(path: Path, line: str) -> None:
    """Add one line to a log; errors as of `open_to_append`."""
    descriptor = open_to_append(path)
    try:
        write_all(descriptor, f"{one_line(line)}\n".encode())
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: bytes) -> None:
    """Write all of it, however many calls that takes.

    Raises:
        OSError: If a part could not be written, as on a full disk.
    """
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def write_whole(
    path: Path, content: str | bytes, *, durable: bool = False, check: Callable[[Path], None] | None = None
) -> None:
    """Replace a file at once: a reader, or a crash at any moment, finds the old content or the new.

    Args:
        path: The file, in a directory that is there.
        content: All of it.
        durable: Whether the name is on the disk before this returns, too, as the content is.
        check: Called with the new file before it gets its name; what it raises leaves the old one in place.

    Raises:
        RecordError: If something else than a regular file has its name.
        OSError: If it cannot be written; what was there stays.
    """
    with replacing(path, durable=durable, check=check) as descriptor, _told(path):
        write_all(descriptor, content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False, check: Callable[[Path], None] | None = None) -> Generator[int]:
    """A descriptor of a file that has another name until the block ends, as `write_whole` for what is too large for it.

    A block that raises leaves what was there.

    Raises:
        RecordError: If something else than a regular file has its name.
        OSError: If it cannot be written.
    """
    temporary = f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    with contextlib.ExitStack() as around:
        with _told(path):
            directory = around.enter_context(_directory(path.parent))
            _check_replaceable(path, directory)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE, 0o666, dir_fd=directory)
        try:
            try:
                yield descriptor
                with _told(path):
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if check is not None:
                check(path.parent / temporary)
            with _told(path):
                os.replace(temporary, path.name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=directory)
            raise
        if durable:
            os.fsync(directory)


def remove(path: Path) -> None:
    """Delete a file if it is there; errors as of `write_whole`."""
    with _told(path), _directory(path.parent) as directory:
        _check_replaceable(path, directory)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path.name, dir_fd=directory)


def remove_unfinished(directory: Path) -> None:
    """Delete what `write_whole` left half-written when it was killed; whoever calls this holds the directory's lock."""
    with _told(directory), _directory(directory) as descriptor:
        for name in os.listdir(descriptor):
            if _UNFINISHED.fullmatch(name) and stat.S_ISREG(_look(name, descriptor)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=descriptor)


def is_unfinished(name: str) -> bool:
    """Whether a name is one that `write_whole` gives while it writes."""
    return re.fullmatch(r"\.[\w.-]+\.[0-9]{1,9}(\.[0-9a-f]{8})?\.tmp", name) is not None


def make_directory(path: Path) -> None:
    """Make a directory and those above it; one that is there stays.

    Raises:
        RecordError: If one that a study makes itself is a link, or no directory.
        OSError: If it cannot be made.
    """
    given, _ = _split(path)
    given.mkdir(parents=True, exist_ok=True)
    with _told(path), _directory(path, make=True):
        pass


def names_in(path: Path) -> list[str]:
    """What a directory holds, in order.

    Raises:
        RecordError: If it is one that a study makes itself, and a link, or no directory.
        OSError: If it cannot be read.
    """
    with _told(path), _directory(path) as directory:
        return sorted(os.listdir(directory))


def remove_directory(path: Path) -> None:
    """Delete an empty directory; errors as of `names_in`."""
    with _told(path), _directory(path.parent) as directory:
        os.rmdir(path.name, dir_fd=directory)


def rename_directory(path: Path, name: str) -> None:
    """Give a directory another name in the same place; errors as of `names_in`."""
    with _told(path), _directory(path.parent) as directory:
        os.rename(path.name, name, src_dir_fd=directory, dst_dir_fd=directory)


def check_regular(path: Path, *, remedy: str = _REMEDY) -> None:
    """Refuse what is there unless it is a regular file inside its directory; for libraries that open it themselves.

    Raises:
        RecordError: If it is anything else.
    """
    if exists(path):
        with open_to_read(path, remedy=remedy, most=None):
            pass


@contextlib.contextmanager
def open_data(path: Path) -> Generator[FileIO]:
    """A file of the user's, which may be a link, open for reading without a buffer.

    Raises:
        DataError: If it is not a regular file.
        OSError: If it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | (_SAFE & ~os.O_NOFOLLOW))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise DataError(f"{path} is {_kind(mode)}, not a regular file. Take it away, or give other data.")
    with open(descriptor, "rb", buffering=0) as file:
        yield file


def read_data(path: Path, *, most: int) -> bytes:
    """The content of a file of the user's; errors as of `open_data`, and `DataError` if it has more bytes than that."""
    with open_data(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise DataError(f"{path} has {size} bytes; data that is held in memory may have {most}. Give less of it.")
        return file.read(most)


def _split(directory: Path) -> tuple[Path, tuple[str, ...]]:
    """The directory that a user gave, and the names below it that a study makes: runs/HASH, plots, branches."""
    if directory.name in ("plots", "branches"):
        given, names = _split(directory.parent)
        return given, (*names, directory.name)
    if directory.parent.name == "runs" and re.fullmatch("[0-9a-f]{16}", directory.name):
        return directory.parent.parent, ("runs", directory.name)
    return directory, ()


@contextlib.contextmanager
def _directory(path: Path, *, make: bool = False) -> Generator[int]:
    """A descriptor of a directory; what a study makes itself is no link."""
    given, names = _split(path)
    descriptor = os.open(os.fspath(given), _DIRECTORY)
    try:
        for name in names:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, dir_fd=descriptor)
            try:
                inner = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            except OSError as problem:
                if problem.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise
                kind = _kind(_look(name, descriptor))
                raise NotADirectoryError(errno.ENOTDIR, f"{name!r} in {given} is {kind}, not a directory") from None
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _told(path: Path) -> Generator[None]:
    """Around what opens a file to write: what the kernel refuses because it is no regular file is told as such."""
    try:
        yield
    except OSError as problem:
        if problem.errno in (*_REFUSED, errno.ENOTDIR):
            raise RecordError(path, _reason(path, problem), _REMEDY) from None
        if problem.errno is None:
            raise
        raise OSError(problem.errno, problem.strerror, str(path)) from None  # not the name beside it


def _reason(path: Path, problem: OSError) -> str:
    if problem.errno not in _REFUSED:
        return str(problem.args[1]) if problem.errno == errno.ENOTDIR else str(problem)
    return f"it is {_kind(os.lstat(path).st_mode)}, not a regular file"


def _check_replaceable(path: Path, directory: int) -> None:
    mode = _look(path.name, directory)
    if mode and not stat.S_ISREG(mode):
        raise RecordError(path, f"it is {_kind(mode)}, not a regular file", _REMEDY)


def _look(name: str, directory: int) -> int:
    """The mode of what has a name; 0 if there is nothing."""
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return 0


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "something else")


def _decoded(content: bytes, path: Path, remedy: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as problem:
        raise RecordError(path, f"the file cannot be read ({problem})", remedy) from None
