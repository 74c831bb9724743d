"""What a run ran on, as recorded in `environment.json`."""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import steepest

PACKAGES = ("steepest", "torch", "numpy", "scikit-learn")
WORKERS = "STEEPEST_WORKERS"  # set by whoever trains several runs at once


def describe_environment() -> dict[str, object]:
    """Python, torch, machine, threads, workers, source version and package versions; plain JSON values.

    Raises:
        ValueError: If the environment variable with the number of workers holds anything else.
    """
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "workers": _workers(),
        "git_commit": _git_commit(Path(steepest.__file__).parent),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _workers() -> int | None:
    """How many runs train at once on this machine; None if nobody said so."""
    value = os.environ.get(WORKERS)
    if value is None:
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,8}", value):
        raise ValueError(f"{WORKERS} must be a whole number of at least 1, got {value!r}. Unset it: a race sets it.")
    return int(value)


def _cpu_model() -> str:
    description = Path("/proc/cpuinfo")
    if description.exists():
        for line in description.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit(package: Path) -> str | None:
    """The commit of the checkout that tracks the package; None for an installed one, or without git."""
    tracked = ["git", "-C", str(package), "ls-files", "--error-unmatch", "__init__.py"]
    head = ["git", "-C", str(package), "rev-parse", "HEAD"]
    try:
        subprocess.run(tracked, check=True, capture_output=True, timeout=10)
        return subprocess.run(head, check=True, capture_output=True, timeout=10, text=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
