"""The shape of the source: rooms know only the rooms above them."""

import ast
import re
import sys
from pathlib import Path

import steepest

SOURCE = Path(steepest.__file__).parent
ROOT = Path(__file__).parent.parent
FILES = sorted(SOURCE.rglob("*.py"))
# Top to bottom; a room may import itself and what stands before it. `names`, `checks` and `notices` serve all.
ROOMS = [
    "names",
    "checks",
    "notices",
    "ranks",
    "linalg",
    "geometry",
    "anatomy",
    "stages",
    "optim",
    "testing",
    "batch_size",
    "theory",
    "lab",
]


# Likewise inside the lab. The command that makes a study stands with the study, and belongs to the commands.
LAB = ["errors", "disk", "models", "tasks", "methods", "runs", "report", "studies", "engine", "bench", "cli"]


def label(path):
    return path.relative_to(SOURCE).as_posix()


def room(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path):
    """Line and module of each import of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def test_imports_point_upward():
    assert {label(path) for path in FILES if room(path) not in ROOMS} == {"__init__.py", "__main__.py"}
    wrong = []
    for path in FILES:
        if room(path) in ROOMS:
            allowed = ROOMS[: ROOMS.index(room(path)) + 1]
            for line, module in imports(path):
                package, _, below = module.partition(".")
                if package == "steepest" and below and below.split(".")[0] not in allowed:
                    wrong.append(f"{label(path)}:{line} imports {module}")
    assert not wrong


def test_imports_inside_the_lab_point_upward():
    wrong = []
    for path in FILES:
        if room(path) != "lab" or path.parent == SOURCE / "lab":
            continue
        own = path.relative_to(SOURCE / "lab").parts[0]
        if (own, path.name) == ("studies", "command.py"):
            own = "cli"
        for line, module in imports(path):
            parts = module.split(".")
            if parts[:2] == ["steepest", "lab"] and len(parts) > 2 and LAB.index(parts[2]) > LAB.index(own):
                wrong.append(f"{label(path)}:{line} imports {module}")
    assert wrong == ["lab/studies/__init__.py:17 imports steepest.lab.cli.command"]  # for its type, and no more


def test_the_library_needs_nothing_but_torch():
    """Only the lab and the command line may import other packages at all, and fits, which nobody else imports."""
    wrong = []
    for path in FILES:
        if room(path) == "lab" or label(path).startswith("batch_size/curve"):
            continue
        for line, module in imports(path):
            foreign = module.split(".")[0] not in ("torch", "steepest", *sys.stdlib_module_names)
            if foreign or module.startswith("steepest.batch_size.curve"):
                wrong.append(f"{label(path)}:{line} imports {module}")
    assert not wrong


def test_every_file_that_the_map_names_exists_and_it_names_every_room():
    named = re.findall(r"`([\w/]+(?:\.py|/))`", (ROOT / "docs" / "architecture.md").read_text())
    assert [name for name in named if not (SOURCE / name).exists()] == []
    assert {*ROOMS, *(f"lab/{room}" for room in LAB)} <= {name.removesuffix("/").removesuffix(".py") for name in named}
    paths = re.findall(r"`((?:src|tests)/[\w/.]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []
