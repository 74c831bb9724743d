"""What the documents say is run and compared.

A ```text block right after a ```python block is the whole of what that block prints. A ```console block begins with
`$ steepest ...` and goes on with the whole of what that command prints. Words are compared as they are, spaces as one,
numbers exactly. Two comments on a line of their own, right before the block, say otherwise:

    <!-- numbers within 2% -->   numbers that depend on the machine, compared with a relative tolerance
    <!-- not run: why -->        a command that takes too long here, or needs what is not there
    <!-- 4 ranks -->             python that so many processes run, as under torchrun; the first one's output is shown
"""

import contextlib
import io
import itertools
import re
import shlex
import sys
import types
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml

import steepest
from steepest.lab.cli import main
from steepest.lab.methods import METHODS
from steepest.lab.studies import KINDS
from steepest.lab.tasks import TASKS
from steepest.linalg import COEFFICIENTS
from tests.cases import cases
from tests.processes import run_scripts

ROOT = Path(__file__).parent.parent
FRONT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*FRONT, *sorted(page for room in ("docs", "results") for page in (ROOT / room).rglob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- (?P<note>[^\n]*) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
RANKS = re.compile(r"(\d+) ranks")
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")


@pytest.fixture
def _registries_as_before():
    """An example may add a task, a method or a kind of study."""
    with patch.dict(TASKS), patch.dict(METHODS), patch.dict(KINDS):
        yield


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own
@pytest.mark.usefixtures("_registries_as_before")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_example_runs_and_prints_what_the_page_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")  # where a class of a page is found when it is pickled
    monkeypatch.setitem(sys.modules, "page", module)
    names = vars(module)
    printed, end, text = "", None, page.read_text()
    for block in BLOCK.finditer(text):
        if ranks_of(block):
            printed, end = None, block.end()
            continue
        if block["kind"] == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block["text"], str(page), "exec"), names)  # noqa: S102 - our own documents
            printed, end = out.getvalue(), block.end()
            continue
        shows_output = end is not None and not text[end : block.start()].strip()
        assert (block["kind"] == "text") == shows_output, f"{page.name}: text shows what the python before it prints"
        if shows_output and printed is not None:
            compare(printed, block["text"], tolerance_of(block["note"]))


def ranks_of(block):
    """How many processes run a block; 0: it is run as all others are."""
    found = RANKS.fullmatch(block["note"] or "") if block["kind"] == "python" else None
    return int(found[1]) if found else 0


def loops():
    """Of all pages, by how many ranks run them: text, and the block with what the first of them prints."""
    found = {}
    for page in PAGES:
        blocks = [*BLOCK.finditer(page.read_text())]
        for block, after in itertools.pairwise(blocks):
            if ranks_of(block):
                found.setdefault(ranks_of(block), {})[f"{page.stem}-{block.start()}"] = block["text"], after
    return found


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
@pytest.mark.parametrize("world", loops())
def test_every_loop_for_several_ranks_runs_and_prints_what_the_page_shows(world, tmp_path):
    chosen = loops()[world]
    stores = [dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in chosen]
    scripts = {name: text for name, (text, _) in chosen.items()}
    mp.spawn(run_scripts, (world, scripts, [store.port for store in stores], str(tmp_path)), nprocs=world)
    for name, (_, shown) in chosen.items():
        compare((tmp_path / f"{name}.0").read_text(), shown["text"], tolerance_of(shown["note"]))


CONSOLE = [
    pytest.param(block["text"], block["note"], id=f"{page.name}-{block['text'].splitlines()[0][11:40].strip()}")
    for page in PAGES
    for block in BLOCK.finditer(page.read_text())
    if block["kind"] == "console" and not (block["note"] or "").startswith("not run: ")
]


@pytest.mark.slow
@pytest.mark.parametrize(("text", "note"), CONSOLE)
def test_every_command_prints_what_the_page_shows(text, note, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command, shown = re.fullmatch(r"\$ steepest ((?:[^\n]*\\\n)*[^\n]*)\n(.*)", text, flags=re.DOTALL).groups()
    words = shlex.split(command.replace("\\\n", " "))
    for folder in (Path(word).parent for word in words if word.endswith(".png")):
        folder.mkdir(parents=True)
    assert main(words) == 0
    compare(capsys.readouterr().out, shown, tolerance_of(note))


def tolerance_of(note):
    """The relative tolerance that the comment before a block states; None: exact."""
    if note is None:
        return None
    return float(re.fullmatch(r"numbers within (\d+(?:\.\d+)?)%", note)[1]) / 100


def compare(printed, shown, tolerance):
    """Words one by one, numbers within the tolerance."""
    for ours, pages in zip(lines(printed), lines(shown), strict=True):
        if tolerance is None:
            assert ours == pages
            continue
        assert NUMBER.sub("#", ours) == NUMBER.sub("#", pages)
        numbers = [[float(found.replace(",", "")) for found in NUMBER.findall(line)] for line in (ours, pages)]
        assert numbers[0] == pytest.approx(numbers[1], rel=tolerance, abs=0), f"printed {ours!r}, shown {pages!r}"


def lines(text):
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


TABLE = "kind  scale  interval\ntotal  2,018  165 to 287\n"


@pytest.mark.parametrize(("was", "becomes"), [("  ", "      "), ("165", "166"), ("2,018", "2,000")])
def test_spaces_and_the_last_digits_of_a_machine_do_not_count(was, becomes):
    compare(TABLE.replace(was, becomes), TABLE, 0.01)


@cases("tolerance", [None, 0.01])
@cases(
    "was, becomes",
    [("2,018", "2,118"), ("165", "168"), ("total", "sum"), ("to 287", "or more"), ("kind  scale  interval\n", "")],
)
def test_a_wrong_figure_in_a_page_is_found(was, becomes, tolerance):
    with pytest.raises((AssertionError, ValueError)):
        compare(TABLE, TABLE.replace(was, becomes), tolerance)


def test_numbers_are_exact_unless_a_page_says_otherwise():
    with pytest.raises(AssertionError):
        compare(TABLE, TABLE.replace("165", "166"), tolerance_of(None))
    compare(TABLE, TABLE.replace("165", "166"), tolerance_of("numbers within 1%"))


@cases("page", PAGES)
def test_every_link_to_a_file_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@cases("page", PAGES)
def test_no_page_is_half_written(page):
    assert not re.search(r"^[A-Z_]{5,}$", page.read_text(), flags=re.MULTILINE)


@pytest.mark.slow
def test_the_table_of_tasks_is_that_of_the_code(tmp_path):
    from steepest.lab.tasks import make_task
    from tests.lab.tasks.fake_data import write_cifar10, write_cifar100, write_fineweb

    data = {"cifar10": write_cifar10(tmp_path / "cifar"), "fineweb": write_fineweb(tmp_path / "fineweb")}
    data["cifar100"] = write_cifar100(tmp_path / "cifar100")
    lines = (ROOT / "docs" / "lab.md").read_text().splitlines()
    first = {line.split("`")[1]: line for line in reversed(lines) if line.startswith("| `")}
    rows = {name: first[name] for name in TASKS if name in first}
    assert {"text", "digits", *data} <= rows.keys()  # a new task may come before its row
    for name, row in rows.items():
        cells = [cell.strip().replace(",", "") for cell in row.strip("|").split("|")][-3:]
        for preset, cell in zip(("demo", "tiny", "small"), cells, strict=True):
            task = make_task(name, preset, data=data.get(name))
            assert [int(number) for number in re.findall(r"\d+", cell)] == [
                task.budget.steps,
                task.budget.batch_size * task.tokens_per_example,
            ]


def test_the_table_of_coefficients_is_that_of_the_code():
    rows = re.findall(r"^\| `([\w.]+)`.*$", (ROOT / "docs" / "coefficients.md").read_text(), flags=re.MULTILINE)
    assert set(rows) == set(COEFFICIENTS)
    text = (ROOT / "docs" / "coefficients.md").read_text()
    for name, chosen in COEFFICIENTS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        coarse, fine = chosen.certify(1e-2), chosen.certify(1e-3)
        assert cells[1] == str(len(chosen.steps))
        assert cells[2] == f"{fine.slope:.0f}"
        assert cells[3] == "{:.3f} … {:.3f}".format(*coarse.image)
        assert cells[4] == "{:.3f} … {:.3f}".format(*fine.image)


def test_the_citation_names_this_version_and_every_entry_has_its_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == steepest.__version__
    assert citation["authors"] == [{"name": "the steepest developers"}]
    for paper in citation["references"]:
        assert paper["title"]
        assert paper["authors"]
        if paper["type"] == "article":  # what is published elsewhere has no number
            assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", paper["identifiers"][0]["value"])
