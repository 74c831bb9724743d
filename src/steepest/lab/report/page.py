"""The page: everything a reader sees, put into one HTML file that needs nothing else, ever."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from steepest.lab.records import Run
from steepest.lab.report import notices, sentences, table
from steepest.lab.report.figures import Figure, figures
from steepest.lab.report.matplotlib_png import to_png
from steepest.lab.report.palette import styles
from steepest.lab.report.plotly_html import to_plotly
from steepest.lab.report.results import MethodResult, Race
from steepest.lab.report.wording import plain, shortened

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


def render(race: Race, *, directory: str) -> tuple[str, dict[str, bytes]]:
    """The page and its figures as PNG files.

    Args:
        race: All numbers.
        directory: How the study directory is called in the command that writes the page anew.

    Returns:
        HTML text, and the content of each PNG by file name. The same records give the same bytes.
    """
    drawn = figures(race)
    images = {f"{figure.key}.png": to_png(figure) for figure in drawn}
    scripts = [Markup(get_plotlyjs()), Markup(_part("page.js"))]  # ours, not from outside: not to be escaped
    page = _environment().from_string(_part("page.html.j2"))
    text = page.render(
        race=race,
        study=race.study,
        policy=_policy(scripts),
        scripts=scripts,
        css=Markup(_part("page.css")),
        looks=styles(race.study.methods, baseline=race.study.baseline),
        dashes=_DASHES,
        markers=_MARKERS,
        headline=sentences.headline(race),
        summary=sentences.summary(race),
        facts=sentences.facts(race),
        notices=notices.notices(race),
        pairs=sentences.pairs(race, with_baseline=True),
        other_pairs=sentences.pairs(race, with_baseline=False),
        figures=[(figure, base64.b64encode(images[f"{figure.key}.png"]).decode()) for figure in drawn],
        plots={figure.key: _themes(figure) for figure in drawn},
        columns=table.columns(race),
        methodology=sentences.methodology(race),
        options=_options,
        tuned=notices.tuned,
        created=f"{race.study.created.day} {race.study.created:%B %Y}",
        directory=plain(shlex.quote(directory)),
        machine=_machine([run for method in race.methods for run in method.runs]),
    )
    return text, images


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"plain": plain, "shortened": shortened}
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "allow_nan": False}
    return environment


def _part(name: str) -> str:
    return files("steepest.lab.report").joinpath(name).read_text(encoding="utf-8")


def _policy(scripts: list[Markup]) -> str:
    """Content security policy: these scripts and no others, and no request to anywhere."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:"


def _themes(figure: Figure) -> dict[str, object]:
    return {"light": to_plotly(figure, theme="light"), "dark": to_plotly(figure, theme="dark")}


def _options(method: MethodResult) -> dict[str, str]:
    return (
        {plain(key): plain(_value(value)) for key, value in method.runs[0].config.options.items()}
        if method.runs
        else {}
    )


def _machine(runs: list[Run]) -> dict[str, list[str]]:
    """Each key of the environments with its different values."""
    machine: dict[str, list[str]] = {}
    for run in runs:
        for key, value in _flat(run.environment).items():
            known = machine.setdefault(_MACHINE.get(key, plain(key)), [])
            if (text := plain(_value(value))) not in known:
                known.append(text)
    return dict(sorted(machine.items()))


def _flat(values: Mapping[str, object]) -> dict[str, object]:
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
