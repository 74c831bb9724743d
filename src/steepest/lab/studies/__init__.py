"""The kinds of study. A new one is a folder beside this file and a line in `KINDS`.

Its folder holds the command that makes one (`command.py`, its `COMMAND`), what is asked for (`plan.py`: a `StudyPlan`
that is run, and a `Listed` as which `study.json` is read), the numbers that come of the records (`results.py`), and the
page about them (`page.py`, whose `content` is all that reports know).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from steepest.lab.cli.command import Command
    from steepest.lab.report.page import Content


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

    def content(self, study_dir: Path) -> Content:
        """What the page of one says.

        Args:
            study_dir: The directory that holds `study.json`, or a packed study.

        Raises:
            RecordError: If `study.json` is damaged; a damaged run is told on the page.
            ModuleNotFoundError: If the libraries that draw are not installed.
        """
        try:
            page = importlib.import_module(f"{__name__}.{self.folder}.page")
        except ModuleNotFoundError as missing:
            problem = f"The report cannot be drawn without {missing.name}. Install what the lab needs"
            raise ModuleNotFoundError(f"{problem}: pip install 'steepest[lab]'.", name=missing.name) from missing
        return cast("Content", page.content(study_dir))


KINDS: Mapping[str, Kind] = {
    "race": Kind("race", ("race",)),
    "sweep": Kind("sweep", ("sweep",)),
    "critical-batch": Kind("batch", ("critical-batch", "measure"), grows=True),
}
