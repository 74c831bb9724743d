"""What a run ran on, as recorded in `environment.json`."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import steepest

PACKAGES = ("steepest", "torch", "numpy", "scikit-learn")


def describe_environment() -> dict[str, object]:
    """Python, torch, machine, threads, source version and package versions; plain JSON values."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(Path(steepest.__file__).parent),
        "packages": {name: _version(name) for name in PACKAGES},
    }


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
