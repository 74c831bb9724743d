"""A page of tables: what a benchmark found, in one HTML file that needs nothing else and asks for nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from markupsafe import Markup

from steepest.lab.report.notices import Notice
from steepest.lab.report.page import Fact, environment_of_pages, flat, part_of_page


class Sheet(Protocol):
    """A table of texts; the first cell of a row names it."""

    @property
    def title(self) -> str:
        """What stands above it."""
        ...

    @property
    def columns(self) -> Sequence[str]:
        """Headings."""
        ...

    @property
    def rows(self) -> Sequence[Sequence[str]]:
        """Cells."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Lines below it."""
        ...


@dataclass(frozen=True)
class TablesPage:
    """What such a page says.

    Args:
        subject: What kind of benchmark it is.
        headline: The result in one line.
        facts: Numbers to show large.
        notices: What to know before believing the others.
        sheets: In order.
    """

    subject: str
    headline: str
    facts: Sequence[Fact]
    notices: Sequence[Notice]
    sheets: Sequence[Sheet]

    def render(self, *, command: str, environment: Mapping[str, object]) -> str:
        """HTML text, in which nothing from outside is markup.

        Args:
            command: How to repeat it.
            environment: Of the machine.
        """
        return (
            environment_of_pages()
            .get_template("tables.html.j2")
            .render(
                **vars(self),
                css=Markup(part_of_page("page.css")),  # ours, not from outside: not to be escaped
                command=command,
                environment={key: _text(value) for key, value in flat(environment).items()},
            )
        )


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
