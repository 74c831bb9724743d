"""How a command ends."""

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
