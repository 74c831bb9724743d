"""Docstrings are plain text with names in `backticks`; Sphinx would read |w|, m* and W_ in them as markup."""

import re
from collections.abc import Iterator

from sphinx.application import Sphinx

CODE = re.compile(r"``?([^`]+)``?")
KEYWORDS = re.compile(r"^\s+\*\*?(?=\w+:)")  # of a parameter, which napoleon knows
MARKUP = re.compile(r"[\\*|_]")


def escaped(text: str) -> str:
    """Text that comes out of reStructuredText as it went in, code but for its backticks."""
    pieces, end = [], 0
    for code in CODE.finditer(text):
        pieces += [MARKUP.sub(r"\\\g<0>", text[end : code.start()]), f"``{code[1]}``"]
        end = code.end()
    return "".join([*pieces, MARKUP.sub(r"\\\g<0>", text[end:])])


def blocks(lines: list[str]) -> Iterator[list[str]]:
    """Paragraphs with the empty line after them."""
    block: list[str] = []
    for line in lines:
        block.append(line)
        if not line.strip():
            yield block
            block = []
    if block:
        yield block


def plain(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Escape a docstring before napoleon reads its sections; examples stay as they are."""
    found: list[str] = []
    for block in blocks(lines):
        if any(line.lstrip().startswith(">>>") for line in block):
            found += block
            continue
        stars = [KEYWORDS.match(line) for line in block]
        bare = [line[star.end() :] if star else line for line, star in zip(block, stars, strict=True)]
        marked = escaped("\n".join(bare)).split("\n")
        found += [f"{star[0] if star else ''}{line}" for star, line in zip(stars, marked, strict=True)]
    lines[:] = without_types(found, value=what in ("attribute", "property"))


def without_types(lines: list[str], *, value: bool) -> Iterator[str]:
    """Words before a colon, in the first line of what is returned, are no type: annotations say that.

    An escaped end of line comes out as nothing, and is the line in which napoleon looks for one.
    """
    if value:
        yield "\\"
    for line in lines:
        yield line
        if line.strip() in ("Returns:", "Yields:"):
            yield f"{' ' * (len(line) - len(line.lstrip()) + 4)}\\"


def setup(app: Sphinx) -> dict[str, bool]:
    """As Sphinx wants it."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", plain, priority=100)
    return {"parallel_read_safe": True}
