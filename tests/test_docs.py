"""What the documents say is run and compared."""

import re
from pathlib import Path

import pytest

from steepest.linalg import COEFFICIENTS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_example_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(block, str(page), "exec"), names)  # noqa: S102 - our own documents


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_is_half_written(page):
    assert not re.search(r"^[A-Z_]{5,}$", page.read_text(), flags=re.MULTILINE)


def test_the_table_of_tasks_is_that_of_the_code(tmp_path):
    from steepest.lab.tasks import TASKS, make_task
    from tests.lab.tasks.fake_data import write_cifar10, write_fineweb

    data = {"cifar10": write_cifar10(tmp_path / "cifar"), "fineweb": write_fineweb(tmp_path / "fineweb")}
    page = (ROOT / "docs" / "lab.md").read_text()
    for name in TASKS:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
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
