"""The kinds of study. A new one is a folder beside this file and a line in `KINDS`.

Its folder holds the command that makes one (`command.py`, its `COMMAND`), what is run (`plan.py`, a `StudyPlan`), what
the stored records say (`records.py`, `results.py`), and the page about them (`page.py`, whose `STUDY` is all that
reports know).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from steepest.lab.cli.command import Command
    from steepest.lab.report.page import Study


@dataclass(frozen=True)
class Kind:
    """What is known of a kind of study without loading it.

    Args:
        folder: Beside this file.
        command: The words behind `steepest` that make such a study.
        grows: Whether the results of its runs may ask for further ones.
    """

    folder: str
    command: tuple[str, ...]
    grows: bool = False

    def load_command(self) -> type[Command]:
        """The command that makes one."""
        return cast("type[Command]", importlib.import_module(f"{__name__}.{self.folder}.command").COMMAND)

    def load(self) -> Study[Any]:
        """How its records are read, and what its page says.

        Raises:
            ModuleNotFoundError: If the libraries that draw are not installed.
        """
        return cast("Study[Any]", importlib.import_module(f"{__name__}.{self.folder}.page").STUDY)


KINDS: Mapping[str, Kind] = {
    "race": Kind("race", ("race",)),
    "sweep": Kind("sweep", ("sweep",)),
    "critical-batch": Kind("batch", ("critical-batch", "measure"), grows=True),
}
