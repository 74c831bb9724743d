"""The shape of the source: rooms know only the rooms above them, and no function is too long to see whole."""

import ast
from pathlib import Path

import pytest

import steepest

SOURCE = Path(steepest.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
# Top to bottom; a room may import itself and what stands before it. `names`, `checks` and `notices` serve all.
ROOMS = [
    "names",
    "checks",
    "notices",
    "linalg",
    "geometry",
    "anatomy",
    "optim",
    "testing",
    "parallel",
    "batch_size",
    "theory",
    "lab",
]
LONGEST_FUNCTION = 50


def label(path):
    return path.relative_to(SOURCE).as_posix()


def room(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=label)
def test_imports_point_upward(path):
    if room(path) not in ROOMS:
        assert label(path) in ("__init__.py", "__main__.py")
        return
    allowed = ROOMS[: ROOMS.index(room(path)) + 1]
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            parts = module.split(".")
            if parts[0] == "steepest" and len(parts) > 1:
                assert parts[1] in allowed, f"{label(path)}:{node.lineno} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_no_function_is_too_long(path):
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node) is not None
            start = node.body[0].end_lineno if documented else node.lineno
            length = node.end_lineno - start
            assert length <= LONGEST_FUNCTION, f"{label(path)}: {node.name} has {length} lines"


def test_the_library_needs_nothing_but_torch():
    """Only the lab and the command line may import other packages at all, and fits, which nobody else imports."""
    for path in FILES:
        if room(path) in ("lab",) or label(path).startswith("batch_size/curve"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                top = module.split(".")[0]
                assert not module.startswith("steepest.batch_size.curve"), label(path)
                assert top in ("torch", "steepest") or top in __import__("sys").stdlib_module_names, label(path)
