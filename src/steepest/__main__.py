"""`python -m steepest` is the command `steepest`."""

import os
import sys
from pathlib import Path

# Python puts the current directory first, whose random.py or torch.py would run instead of what is meant.
if not sys.flags.safe_path and Path(__file__).parent.parent != Path.cwd():
    sys.path[:] = [entry for entry in sys.path if entry not in ("", os.getcwd())]

try:
    from steepest.lab.cli import main
except KeyboardInterrupt:
    raise SystemExit(130) from None  # as a shell reports Ctrl-C

raise SystemExit(main())
