"""The page: everything a reader sees, put into one HTML file that needs nothing else, ever."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from importlib.resources import files
from typing import Any, Protocol

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from steepest.lab.report.figure import Figure
from steepest.lab.report.notices import Notice
from steepest.lab.report.palette import styles
from steepest.lab.report.sheet import Column
from steepest.lab.report.vega import script, to_png, to_vega
from steepest.lab.report.wording import plain, shortened
from steepest.lab.runs.records import Run

# strokes and outlines of the legend, on a canvas of 34 by 12
_DASHES = {"solid": "", "dash": "7 3.5", "dot": "2 2.4", "dashdot": "7 3 2 3", "longdash": "12 4"}
_MARKERS = {
    "circle": "M17 2a4 4 0 1 0 .01 0z",
    "square": "M13.4 2.4h7.2v7.2h-7.2z",
    "triangle": "M17 1.2l4.8 8.6h-9.6z",
    "diamond": "M17 .8l5.2 5.2-5.2 5.2-5.2-5.2z",
    "cross": "M15.4 1.5h3.2v2.9h2.9v3.2h-2.9v2.9h-3.2v-2.9h-2.9v-3.2h2.9z",
    "x": "M13.9 .9l3.1 3.1 3.1-3.1 2 2-3.1 3.1 3.1 3.1-2 2-3.1-3.1-3.1 3.1-2-2 3.1-3.1-3.1-3.1z",
}

_MACHINE = {"workers": "workers (runs trained at once)"}


@dataclass(frozen=True)
class Fact:
    """A number worth showing large, and what it is."""

    number: str
    meaning: str


@dataclass(frozen=True)
class Comparison:
    """A sentence of the results: what holds, set in bold, and the numbers behind it; either may be empty."""

    claim: str
    evidence: str


@dataclass(frozen=True)
class Settings:
    """What to say of the settings of one method, under its options.

    Args:
        title: A sentence; or, if `folded`, the line behind which the others are hidden until one opens it.
        runs: Each run, and what tells it from the others.
        notes: Lines before those of the runs.
        folded: See `title`.
    """

    title: str
    runs: Sequence[tuple[str, Run]]
    notes: Sequence[str] = ()
    folded: bool = True


@dataclass(frozen=True)
class Content:
    """What every report says.

    Args:
        subject: What kind of study it is, as a title.
        study: What was asked for.
        headline: The result in one line.
        facts: Numbers to show large.
        notices: What to know before believing the others.
        verdicts: The result in full sentences.
        summary: Task, sizes, seeds and data.
        figures: In order.
        columns: Of the table over methods; their cells take one of its rows.
        results: Of each method, with its `name` and `runs`.
        methodology: How the numbers were computed.
        settings: Of one of the results that has runs.
        tables: Files beside the page by name, with what stands in them.
        keys: Of every figure that a study of this kind may have; files of those that no longer hold are removed.
        others: Verdicts that are shown further down.
        hidden: Options that differ between the runs of a method.
        rows: Of the table, where it has more than one for a method; none: `results`.
    """

    subject: str
    study: Described
    headline: str
    facts: Sequence[Fact]
    notices: Sequence[Notice]
    verdicts: Sequence[Comparison]
    summary: str
    figures: Sequence[Figure]
    columns: Sequence[Column[Any]]
    results: Sequence[HasRuns]
    methodology: Sequence[str]
    settings: Callable[[Any], Settings]
    tables: Mapping[str, str]
    keys: Collection[str]
    others: Sequence[Comparison] = ()
    hidden: Sequence[str] = ()
    rows: Sequence[HasRuns] = ()


class HasRuns(Protocol):
    """The results of one method."""

    @property
    def name(self) -> str:
        """As in the study."""
        ...

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs they come from."""
        ...


class Described(Protocol):
    """What a page says of any study."""

    @property
    def task(self) -> str:
        """Its name."""
        ...

    @property
    def preset(self) -> str:
        """Size of the task."""
        ...

    @property
    def command(self) -> str:
        """How to repeat it."""
        ...

    @property
    def methods(self) -> tuple[str, ...]:
        """Names, in the study's order."""
        ...

    @property
    def baseline(self) -> str:
        """The method that is drawn in grey."""
        ...

    @property
    def created(self) -> datetime:
        """When it was begun."""
        ...


Page = tuple[str, dict[str, bytes]]  # HTML text, and the content of each PNG by file name


def pictures(figures: Sequence[Figure]) -> dict[str, bytes]:
    """The figures as PNG files, by file name."""
    return {f"{figure.key}.png": to_png(figure) for figure in figures}


def render(content: Content, *, directory: str) -> Page:
    """The page of a study and its figures as PNG files.

    Args:
        content: What the page says.
        directory: How the study directory is called in the command that writes the page anew.

    Returns:
        HTML text, and the content of each PNG by file name. The same records give the same bytes.
    """
    images = pictures(content.figures)
    study = content.study
    drawing = Markup(script(part_of_page("page.js")))  # ours, not from outside: not to be escaped
    text = (
        environment_of_pages()
        .get_template("page.html.j2")
        .render(
            **{one.name: getattr(content, one.name) for one in fields(content)},
            policy=_policy(drawing),
            script=drawing,
            css=Markup(part_of_page("page.css")),
            looks=styles(study.methods, baseline=study.baseline),
            dashes=_DASHES,
            markers=_MARKERS,
            drawn=[(figure, base64.b64encode(images[f"{figure.key}.png"]).decode()) for figure in content.figures],
            plots={figure.key: to_vega(figure) for figure in content.figures},
            options=lambda result: _options(result, content.hidden),
            created=f"{study.created.day} {study.created:%B %Y}",
            directory=plain(shlex.quote(directory)),
            machine=_machine([run for result in content.results for run in result.runs]),
        )
    )
    return text, images


def environment_of_pages() -> Environment:
    """Templates of pages, which escape whatever is put into them."""
    loader = FunctionLoader(part_of_page)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"plain": plain, "shortened": shortened}
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "allow_nan": False}
    return environment


def part_of_page(name: str) -> str:
    """A file that pages are made of, by its name."""
    return files("steepest.lab.report").joinpath(name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """Content security policy: this script and no other, and no request to anywhere."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"


def _options(result: HasRuns, hidden: Sequence[str]) -> dict[str, str]:
    options = result.runs[0].config.options if result.runs else {}
    return {plain(key): plain(_value(value)) for key, value in options.items() if key not in hidden}


def _machine(runs: list[Run]) -> dict[str, list[str]]:
    """Each key of the environments with its different values."""
    machine: dict[str, list[str]] = {}
    for run in runs:
        for key, value in flat(run.environment).items():
            known = machine.setdefault(_MACHINE.get(key, plain(key)), [])
            if (text := plain(_value(value))) not in known:
                known.append(text)
    return dict(sorted(machine.items()))


def flat(values: Mapping[str, object]) -> dict[str, object]:
    """Nested objects, such as package versions, with their keys joined."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{key} {inner}": deep for inner, deep in value.items()}
        else:
            flat[key] = value
    return flat


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
