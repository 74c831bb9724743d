"""The documentation site: built strictly, whole, its links checked, nothing fetched, readable on a phone."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup
from sphinx.util.inventory import InventoryFile

import steepest
from steepest import integrations
from tests.browser import BROWSER, requests, visit
from tests.cases import cases

ROOT = Path(__file__).parent.parent
SOURCES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *(page for kind in ("md", "rst") for page in (ROOT / "docs").rglob(f"*.{kind}")),
    *(ROOT / "results").glob("*/README.md"),
]
MADE = ("index.html", "search.html")  # by Sphinx: from no source
HOSTS = {
    "arxiv.org",
    "github.com",
    "huggingface.co",
    "keepachangelog.com",
    "kellerjordan.github.io",
    "leloykun.github.io",
    "optuna.org",
    "semver.org",
    "whenwen.github.io",
    "www.cs.toronto.edu",
    "pradyunsg.me",  # furo, at the foot of each page
}
ROOMS = ("anatomy", "batch_size", "batch_size.curve", "geometry", "linalg", "optim", "stages", "testing", "theory")


def built(source, out):
    """What Sphinx says of a site, and how it ends; as `make docs` runs it."""
    docs = re.search(r"-m sphinx ([^\n]*) -c docs \. build/docs", (ROOT / "Makefile").read_text())
    command = [sys.executable, "-m", "sphinx", *docs[1].split(), "-c", str(source / "docs"), str(source), str(out)]
    path = os.pathsep.join([str(ROOT / "src"), *sys.path])
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Page:
    path: Path

    @cached_property
    def soup(self):
        return BeautifulSoup(self.path.read_text(), "html.parser")

    @cached_property
    def anchors(self):
        return {element["id"] for element in self.soup.find_all(id=True)} | {""}


@dataclass(frozen=True)
class Site:
    out: Path

    @cached_property
    def pages(self):
        return {page.relative_to(self.out).as_posix(): Page(page) for page in sorted(self.out.rglob("*.html"))}

    def broken(self, name):
        """Links, pictures and files of a page that lead nowhere."""
        page = self.pages[name]
        found = []
        for link in links(page.soup):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if parts.scheme != "https" or parts.hostname not in HOSTS:
                    found.append(link)
                continue
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
            known = self.pages.get(os.path.relpath(target, self.out))
            if not target.is_file() or (known and unquote(parts.fragment) not in known.anchors):
                found.append(link)
        return found


def links(soup):
    return [element[kind] for kind in ("href", "src") for element in soup.find_all(attrs={kind: True})]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = built(ROOT, out)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return Site(out)


@pytest.mark.slow
def test_every_page_is_built_and_found_from_the_first(site):
    expected = {source.relative_to(ROOT).with_suffix(".html").as_posix() for source in SOURCES}
    assert set(site.pages) == expected | set(MADE)
    first = site.pages["docs/index.html"]
    tree = first.soup.select(".sidebar-tree a.reference.internal")
    listed = {os.path.relpath(first.path.parent / link["href"].partition("#")[0], site.out) for link in tree}
    assert expected - listed <= {"docs/index.html"}


@pytest.mark.slow
def test_every_link_leads_somewhere(site):
    broken = {name: site.broken(name) for name in site.pages}
    assert {name: found for name, found in broken.items() if found} == {}
    assert sum(len(links(page.soup)) for page in site.pages.values()) > 1000


@pytest.mark.slow
@cases("wrong", ["nowhere.html", "optimizers.html#nowhere", "#nowhere", "http://arxiv.org", "https://example.org/a"])
def test_a_broken_link_is_found(wrong, site, tmp_path):
    name = "docs/index.html"
    page = tmp_path / name
    page.parent.mkdir(exist_ok=True)
    page.write_text(f'<a href="{wrong}">here</a>')
    (page.parent / "optimizers.html").write_text("<p id='known'>")
    assert Site(tmp_path).broken(name) == [wrong]
    page.write_text('<a href="optimizers.html#known">here</a>')
    assert Site(tmp_path).broken(name) == []


@pytest.mark.slow
def test_no_page_loads_anything_from_elsewhere(site):
    for name, page in site.pages.items():
        loaded = [
            e.get("src") or e.get("href") for e in page.soup.select("script[src], img, link, iframe, video, source")
        ]
        assert [link for link in loaded if urlsplit(link or "").netloc] == [], name
    for style in site.out.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text()), style


@pytest.mark.slow
def test_a_page_with_a_fault_is_not_built(tmp_path):
    source = tmp_path / "source"
    (source / "docs").mkdir(parents=True)
    for name in ("conf.py", "_ext", "_static", "_templates"):
        (source / "docs" / name).symlink_to(ROOT / "docs" / name)
    (source / "docs" / "index.md").write_text("# Front\n\n[there](nowhere.md)\n")
    done = built(source, tmp_path / "out")
    assert done.returncode != 0
    assert "'nowhere.md'" in done.stderr


def names(module):
    """All that a module says is public; else all that is made in it, or in its folder and imported there."""
    own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", "").startswith(module.__name__)]
    return getattr(module, "__all__", [name for name in own if not name.startswith("_")])


def public():
    """Every name that users may import, but those of the lab and of what ranks say to each other."""
    rooms = [import_module(f"steepest.{room}") for room in ROOMS]
    rooms += [import_module(f"steepest.integrations.{name}") for _, name, _ in iter_modules(integrations.__path__)]
    return sorted({f"steepest.{name}" for name in steepest.__all__} | {written(r, n) for r in rooms for n in names(r)})


def written(room, name):
    return f"steepest.{name}" if name in steepest.__all__ else f"{room.__name__}.{name}"


@pytest.mark.slow
@pytest.mark.hosts
def test_every_public_name_has_an_entry_that_says_something(site):
    inventory = InventoryFile.loads((site.out / "objects.inv").read_bytes(), uri="").data
    entries = {name: item.uri for kind, items in inventory.items() if kind[:3] == "py:" for name, item in items.items()}
    assert [name for name in public() if name not in entries] == []
    silent = []
    for name in public():
        page, _, anchor = entries[name].partition("#")
        head = site.pages[page].soup.find(id=name if anchor == "$" else anchor)
        text = head.find_next_sibling("dd").find("p", recursive=False)
        if text is None or not text.get_text().strip():
            silent.append(name)
    assert silent == []
    assert len(public()) > 120


def reasons():
    """Rows of the tables on how to choose: what is said, and the records that it is said to be from."""
    for line in (ROOT / "docs" / "choose.md").read_text().splitlines():
        records = re.findall(r"\]\(\.\./(results/[^)]+)\)", line)
        if line.startswith("|") and records:
            yield line.split("|")[-3].strip(), records


def unfounded(said, records):
    """Numbers that none of the records has."""
    figures = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?%?")
    text = " ".join((ROOT / record).read_text() for record in records)
    return [figure for figure in figures.findall(said) if figure not in figures.findall(text)]


def test_every_reason_to_choose_has_its_figures_from_a_record():
    assert {said: found for said, records in reasons() if (found := unfounded(said, records))} == {}
    assert len([*reasons()]) >= 15
    assert unfounded("in 53% of the steps", ["results/race_demo/README.md"]) == ["53%"]


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no chromium on the PATH")
def test_no_page_is_wider_than_a_phone(chrome, site):
    widest = "[document.documentElement, ...document.querySelectorAll('.page, .main, .content, article')]"
    wide = {}
    for name, page in site.pages.items():
        visit(chrome, page.path, width=390, height=844)
        width = chrome.execute_script(f"return Math.max(...{widest}.map(e => e.scrollWidth))")
        if width > 390:
            wide[name] = width
        assert [url for url in requests(chrome) if urlsplit(url).scheme not in ("file", "data")] == [], name
        assert chrome.get_log("browser") == [], name
    assert wide == {}


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no chromium on the PATH")
def test_the_first_page_leads_on(chrome, site):
    visit(chrome, site.out / "index.html")
    assert chrome.execute_script("return location.pathname").endswith("/docs/index.html")
