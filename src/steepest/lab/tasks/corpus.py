"""Bytes to train on: the source of Python's standard library, or any file or folder of the user's."""

import hashlib
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from steepest.lab.tasks.task import DataIdentity

VALIDATION_SHARE = 0.05
ONE_FILE_IN = 20  # goes to validation
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Training and validation bytes, and the identity of both together."""

    identity: DataIdentity
    train: bytes
    validation: bytes


def read_corpus(path: Path | None = None) -> Corpus:
    """Read the corpus and split it, always in the same way.

    A single file gives its last 5 % to validation. A folder is split by file: those whose relative path has a SHA-256
    divisible by 20 are held out (or the one with the smallest, if there is none), and each part is joined in the order
    of the paths. Hidden files and folders are left out.

    Args:
        path: A file or a folder; None for the `.py` files of the running Python's standard library, without tests.

    Raises:
        FileNotFoundError: If there is nothing there to read.
        ValueError: If a folder holds fewer than two files that are not empty.
    """
    if path is None:
        name = f"python-stdlib {platform.python_version()}"
        return _from_files(name, read_standard_library(Path(sysconfig.get_path("stdlib"))))
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        return _from_files(path.resolve().name, _read_folder(path))
    raise FileNotFoundError(
        f"--data {str(path)!r} is neither a file nor a folder. Give the path of a text to train on."
    )


def read_standard_library(root: Path) -> dict[str, bytes]:
    """The `.py` files below `root` by relative POSIX path, without tests and installed packages.

    Raises:
        FileNotFoundError: If there is none, as in a Python that keeps its library in an archive.
    """
    files = {_relative(p, root): p for p in root.rglob("*.py") if p.is_file()}
    kept = {name: path.read_bytes() for name, path in sorted(files.items()) if not _is_excluded(name)}
    if not kept:
        remedy = "Use a regular Python installation, or give a file or folder with --data PATH."
        raise FileNotFoundError(f"No source of Python's standard library below {str(root)!r}. {remedy}")
    return kept


def split_names(sizes: dict[str, int]) -> tuple[list[str], list[str]]:
    """Divide files into training and validation names, each sorted.

    Args:
        sizes: Bytes of each file.

    Raises:
        ValueError: If one of the two parts would hold nothing.
    """
    ranks = {n: int.from_bytes(hashlib.sha256(n.encode()).digest()) for n, size in sizes.items() if size}
    validation = {n for n, rank in ranks.items() if rank % ONE_FILE_IN == 0} or {
        *sorted(ranks, key=ranks.__getitem__)[:1]
    }
    train = ranks.keys() - validation
    if not train:
        remedy = "Give one file itself instead of its folder: its last 5 % are then held out."
        raise ValueError(f"Of the files {sorted(sizes)}, none is left to train on beside the one held out. {remedy}")
    return sorted(train), sorted(validation)


def _from_files(name: str, files: dict[str, bytes]) -> Corpus:
    train, validation = split_names({n: len(content) for n, content in files.items()})
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file}\0{len(files[file])}\0".encode())
        digest.update(files[file])
    size = sum(map(len, files.values()))
    identity = DataIdentity(name, digest.hexdigest(), size)
    return Corpus(identity, b"".join(files[n] for n in train), b"".join(files[n] for n in validation))


def _from_file(path: Path) -> Corpus:
    content = path.read_bytes()
    cut = len(content) - int(VALIDATION_SHARE * len(content))
    identity = DataIdentity(path.name, hashlib.sha256(content).hexdigest(), len(content))
    return Corpus(identity, content[:cut], content[cut:])


def _read_folder(root: Path) -> dict[str, bytes]:
    files = {_relative(p, root): p for p in root.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in sorted(files.items()) if not _is_hidden(name)}


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _is_excluded(name: str) -> bool:
    return not _NOT_LIBRARY.isdisjoint(PurePosixPath(name).parts)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)
