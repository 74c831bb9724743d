"""How a command ends."""

from __future__ import annotations

import sys

from steepest.lab.cli.hidden import without_passwords

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def failed(failure: Exception) -> int:
    """Tell what went wrong, without a password; returns the exit code."""
    print(f"error: {without_passwords(str(failure))}", file=sys.stderr)
    return FAILED
