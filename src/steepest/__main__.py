"""`python -m steepest` is the command `steepest`."""

try:
    from steepest.cli import main
except KeyboardInterrupt:
    raise SystemExit(130) from None  # as a shell reports Ctrl-C

raise SystemExit(main())
