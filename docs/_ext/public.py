"""The directives `public` and `publics`: entries for every public name of a module or package; none is forgotten."""

import inspect
import pkgutil
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import ClassVar, Literal, get_origin

from docutils import nodes
from plain import escaped
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import stringify_annotation

import steepest


def modules_of(package: str) -> list[str]:
    """All public modules of a package, in alphabetical order."""
    found = pkgutil.iter_modules(import_module(package).__path__, f"{package}.")
    return sorted(name for _, name, _ in found if not name.rpartition(".")[2].startswith("_"))


ROOMS = [
    "steepest.optim",
    "steepest.geometry",
    "steepest.anatomy",
    "steepest.stages",
    "steepest.linalg",
    "steepest.batch_size",
    "steepest.batch_size.curve",
    "steepest.theory",
    "steepest.testing",
]
PACKAGE = "steepest.integrations"
SHORT = 100  # a constant's value that is shown


def names_of(module: str) -> dict[str, str]:
    """What users write for each public name: of `steepest` itself where it is there, else of its room."""
    found = import_module(module)
    own = [name for name, thing in vars(found).items() if getattr(thing, "__module__", "").startswith(module)]
    names = getattr(found, "__all__", [name for name in own if not name.startswith("_")])
    return {name: f"{'steepest' if name in steepest.__all__ else module}.{name}" for name in names}


def kind_of(thing: object) -> str:
    """The directive of autodoc that shows an object."""
    if inspect.isclass(thing):
        return "autoexception" if issubclass(thing, BaseException) else "autoclass"
    return "autofunction" if inspect.isroutine(thing) else "data"


def comment_of(module: str, name: str) -> list[str]:
    """What the source says of a constant, in whichever file of the package it is made; nothing: no lines."""
    package = import_module(module).__spec__.parent
    parts = [part for _, part, _ in pkgutil.walk_packages(import_module(package).__path__, f"{package}.")]
    for part in (module, *(parts if package != "steepest" else ())):
        comments = ModuleAnalyzer.for_module(part).find_attr_docs()
        if ("", name) in comments:
            return comments["", name]
    return []


def aliases() -> Iterator[tuple[str, str]]:
    """How autodoc writes each public type that is made of others, and its name."""
    for room in ROOMS:
        for name, written in names_of(room).items():
            thing = getattr(import_module(room), name)
            if get_origin(thing) is Literal:
                yield stringify_annotation(thing, "smart"), f"~{written}"


def entry(module: str, name: str, written: str) -> Iterator[str]:
    """Lines of the directive of one name."""
    thing = getattr(import_module(module), name)
    kind = kind_of(thing)
    if kind == "data":
        value = repr(thing).replace("typing.", "")
        yield f".. py:data:: {written}"
        yield from [f"   :value: {value}"] if len(value) < SHORT else []
        yield from ("", *(f"   {escaped(line)}" for line in comment_of(module, name)), "")
        return
    yield f".. {kind}:: {written}{'()' if getattr(thing, '_is_protocol', False) else ''}"
    if isinstance(thing, type):
        yield "   :members:"
        if any(is_shown(base) for base in thing.__bases__ if base is not object):
            yield "   :show-inheritance:"
    yield ""


def entries(module: str, first: Sequence[str] = ()) -> Iterator[str]:
    """Lines of all names of a module, some before the others."""
    names = names_of(module)
    for name in (*first, *(name for name in names if name not in first)):
        yield from entry(module, name, names[name])


def is_shown(base: type) -> bool:
    """Whether a base class is one that users can read about: another library's, or one with an entry."""
    return not base.__module__.startswith("steepest.") or any(
        base is getattr(import_module(room), base.__name__, None) for room in ROOMS if base.__name__ in names_of(room)
    )


def shown_bases(app: Sphinx, name: str, thing: type, options: object, bases: list[type]) -> None:
    """Keep the bases that `is_shown`."""
    bases[:] = [base for base in bases if is_shown(base)]


def named_types(app: Sphinx, domain: str, kind: str, content: nodes.Element) -> None:
    """Show a type by its public name, `Role`, not by all that it may be."""
    for annotations in app.env.current_document.autodoc_annotations.values():
        for parameter, text in annotations.items():
            for long, short in ALIASES.items():
                text = text.replace(long, short)
            annotations[parameter] = text


ALIASES = {**dict(aliases()), "~typing.": ""}


class Public(SphinxDirective):
    """`.. public:: steepest.linalg`, with `:first:` and those of its names that begin the page."""

    required_arguments = 1
    option_spec: ClassVar = {"first": str.split}

    def run(self) -> list[nodes.Node]:
        """The entries."""
        return self.parse_text_to_nodes("\n".join(entries(self.arguments[0], **self.options)))


class Publics(SphinxDirective):
    """`.. publics:: steepest.integrations`: a section for each module of a package."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The sections."""
        lines: list[str] = []
        for module in modules_of(self.arguments[0]):
            lines += [module, "-" * len(module), "", *escaped(inspect.getdoc(import_module(module)) or "").split("\n")]
            lines += ["", *entries(module)]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """As Sphinx wants it."""
    app.setup_extension("sphinx.ext.autodoc")
    app.add_directive("public", Public)
    app.add_directive("publics", Publics)
    app.connect("autodoc-process-bases", shown_bases)
    app.connect("object-description-transform", named_types, priority=400)  # before autodoc reads them
    return {"parallel_read_safe": True}
