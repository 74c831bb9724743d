"""`python -m steepest` is the command `steepest`."""

from steepest.cli import main

raise SystemExit(main())
