"""How much memory this process has needed."""

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_memory(*, status: Path = _STATUS) -> int:
    """Largest resident memory of this process so far, in bytes.

    Args:
        status: Linux's description of the process. Its VmHWM starts anew in a new program, while `ru_maxrss` begins
            with what the process that started it had; that one is used where the file or the line is missing.
    """
    if status.exists():
        for line in status.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
