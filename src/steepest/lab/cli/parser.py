"""A parser whose errors show how the command is written, and no password."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, Never

from steepest.lab.cli.hidden import FORM, may_hold_password, without_passwords


class Parser(argparse.ArgumentParser):
    """argparse's, with an example at the end of each error: the command's own first, or that of its first command."""

    example = ""
    saves = False  # whether what it has done so far outlives an interruption
    _words: Sequence[str] = ()
    _commands: Any = None

    def add_subparsers(self, **options: Any) -> Any:
        """As in argparse, which does not tell what was added."""
        self._commands = super().add_subparsers(**options)
        return self._commands

    @property
    def nearest_example(self) -> str:
        """Of this command, or of the first that it has."""
        if self.example or self._commands is None:
            return self.example
        inner: Sequence[Parser] = tuple(self._commands.choices.values())
        return next((example for one in inner if (example := one.nearest_example)), "")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As in argparse, which tells `error` nothing of the words."""
        self._words = () if args is None else tuple(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> Never:
        """End with exit code 2, a message and an example."""
        if message.startswith("unrecognized arguments") and any(map(may_hold_password, self._words)):
            # a password with spaces becomes several words, of which the last ones look like nothing
            message = f"unrecognized arguments, not repeated; a storage is one word in quotes, --storage '{FORM}'"
        example = self.nearest_example
        shown = f"\nexample:\n{example}\n" if example else "\n"
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {without_passwords(message, self._words)}{shown}")


def first_example(examples: str, *, of: str) -> str:
    """The lines up to the first call of a command, indented: what it needs is made before.

    Args:
        examples: Of its help.
        of: The words of the command.
    """
    lines = [line for line in examples.replace("\\\n", "\\\0").splitlines() if line.startswith("  steepest ")]
    own = next((index for index, line in enumerate(lines) if f"{line} ".startswith(f"  {of} ")), -1)
    return "\n".join(lines[: own + 1]).replace("\0", "\n")
