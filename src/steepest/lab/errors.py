"""What went wrong, by whose fault: the two kinds of error that end a command with a message and no traceback."""


class Failure(Exception):  # noqa: N818 - its kinds are errors
    """A run, a file or a database failed; the text says what, and what to do."""


class UsageError(Exception):
    """What was asked for cannot be meant; the text says why, and what can."""
