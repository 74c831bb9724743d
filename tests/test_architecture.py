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
    "integrations",
    "lab",
]


# Likewise inside the lab. The command that makes a study stands with the study, and belongs to the commands.
LAB = ["errors", "disk", "data", "models", "tasks", "methods", "runs", "report", "studies", "engine", "bench", "cli"]


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
    """Only the lab, the command line, and what is for another library, and fits, which nobody else imports."""
    wrong = []
    for path in FILES:
        if room(path) in ("lab", "integrations") or label(path).startswith("batch_size/curve"):
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


# Source files without a test of their own name: where they are tested, which, and why there.
ELSEWHERE = {
    "ranks/test_boxes.py": (
        "ranks/exchange ranks/team ranks/duties optim/sharing",
        "where boxes go; with real processes in tests/parallel",
    ),
    "anatomy/test_routing.py": ("anatomy/heads anatomy/layouts anatomy/sites", "the plan is what they make"),
    "batch_size/test_noise.py": ("batch_size/noise_collect batch_size/noise_layers", "parts of NoiseScale"),
    "batch_size/test_curve_fit.py": ("batch_size/curve_likelihood", "what a fit makes largest"),
    "geometry/test_layer.py": (
        "geometry/adaptive geometry/norm geometry/scale geometry/spectrum",
        "all norms keep the same laws",
    ),
    "integrations/peers/test_states.py": (
        "integrations/peers/reading integrations/peers/sources",
        "what an import reads, and from whom",
    ),
    "lab/bench/test_contestants.py": ("lab/bench/examine", "it looks at contestants"),
    "lab/cli/test_bench.py": (
        "lab/bench/cost lab/bench/pictures lab/studies/batch/coverage",
        "what these commands show",
    ),
    "lab/cli/test_critical_batch_bound.py": ("lab/cli/bound", "tested as it is typed"),
    "lab/cli/test_critical_batch_fit.py": ("lab/cli/critical_batch", "tested as it is typed"),
    "lab/cli/test_ending.py": ("lab/cli/outcome lab/errors", "how a command ends"),
    "lab/cli/test_examples.py": ("lab/cli/parser", "what is shown where a word is wrong"),
    "lab/cli/test_main.py": (
        "__main__ lab/cli/options lab/cli/plan lab/cli/runs lab/cli/studies lab/cli/study lab/studies/race/command "
        "lab/studies/sweep/command",
        "tested as they are typed",
    ),
    "lab/cli/test_theory.py": ("lab/report/theory_png lab/runs/trained", "what these commands use alone"),
    "lab/cli/test_verify.py": ("lab/models/brought lab/runs/verify", "what the command starts, and what users give it"),
    "lab/engine/test_study.py": ("lab/engine/pool lab/engine/worker", "a study and its processes"),
    "lab/methods/test_methods.py": ("lab/methods/tuned", "a table of options for methods"),
    "lab/models/test_whole_batch.py": ("lab/models/resnet lab/models/vgg", "networks that are made of it"),
    "lab/report/test_page.py": (
        "lab/report/figure lab/report/notices lab/report/palette lab/report/sheet lab/studies/report",
        "what they make is read on the page",
    ),
    "lab/studies/batch/test_page.py": (
        "lab/studies/batch/figures lab/studies/batch/sentences lab/studies/batch/varied",
        "what they make is read on the page",
    ),
    "lab/studies/race/test_plan.py": ("lab/engine/display lab/studies/race/page", "seen in a whole race"),
    "lab/tasks/test_cifar10.py": ("lab/tasks/cifar lab/tasks/cifar100", "files of one form"),
    "lab/tasks/test_tasks.py": (
        "lab/tasks/digits lab/tasks/held_out lab/tasks/images lab/tasks/task lab/tasks/windows",
        "all tasks keep the same laws",
    ),
    "linalg/test_coefficients.py": ("linalg/minimax linalg/odd_polynomial", "what coefficients are made with"),
    "linalg/test_polar.py": ("linalg/iterations linalg/plan", "parts of the polar factor"),
    "linalg/test_products.py": ("linalg/symmetric", "products of blocks, and how they are counted"),
    "optim/momo/test_tap.py": ("optim/momo/losses", "the object that keeps what the tap hears"),
    "optim/test_descent.py": (
        "optim/combine optim/diagnostics optim/move",
        "parts of the step, which the step shows",
    ),
    "optim/test_averaging.py": ("optim/beside optim/follow", "what lends it weights, and calls it after each step"),
    "optim/test_options.py": ("optim/arguments", "every option of every constructor"),
    "optim/test_groups.py": ("optim/guesses", "groups without a model, of which guesses are made"),
    "optim/test_ranks_alike.py": ("ranks/agree ranks/boxes", "they need several ranks"),
    "test_checks.py": ("names notices", "how options are refused"),
    "test_testing.py": ("stages/stage", "the protocol, to which laws hold every stage"),
}


def test_every_file_has_tests_of_its_name_or_stands_in_the_list_with_a_reason():
    tests = ROOT / "tests"
    listed = [name for names, _ in ELSEWHERE.values() for name in names.split()]
    assert sorted(set(listed)) == sorted(listed)
    assert [test for test in ELSEWHERE if not (tests / test).exists()] == []
    own = {label(path).removesuffix(".py") for path in FILES if path.name != "__init__.py"}
    assert set(listed) - own == set(), "these files are not there"
    without = {name for name in own if not (tests / Path(name).parent / f"test_{Path(name).name}.py").exists()}
    assert without - {*listed} == set(), "name a test file after each, or add it to ELSEWHERE with a reason"
