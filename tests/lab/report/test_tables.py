"""A page of tables: what it says, and that nothing from outside is markup in it."""

from html.parser import HTMLParser

from steepest.lab.cli.outcome import Table
from steepest.lab.report.notices import Notice
from steepest.lab.report.page import Fact
from steepest.lab.report.tables import TablesPage

EVIL = "<script>alert(1)</script>\u202e"


class Seen(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def seen(page, **options):
    parser = Seen()
    text = page.render(**{"command": "steepest bench gpu", "environment": {"torch": "2"}, **options})
    parser.feed(text)
    return text, parser


def test_everything_is_on_the_page():
    table = Table("Times", ["who", "ms"], [["ours", "1.5"], ["theirs", "2"]], ["a note"])
    page = TablesPage("bench", "All is well", [Fact("3 of 3", "checks")], [Notice("note", "Left out", ("x",))], [table])
    _, parser = seen(page, environment={"torch": "2.13", "packages": {"numpy": "2"}, "threads": 4})
    text = [line.strip() for line in parser.text]
    for word in ("bench", "All is well", "3 of 3", "checks", "Left out", "x", "Times", "who", "ours", "1.5", "a note"):
        assert word in text
    for word in ("torch", "2.13", "packages numpy", "threads", "4", "steepest bench gpu"):
        assert word in text
    assert parser.tags.count("tr") == 3
    assert not {"script", "img", "link"} & set(parser.tags)


def test_nothing_from_outside_is_markup():
    table = Table(EVIL, [EVIL, EVIL], [[EVIL, EVIL]], [EVIL])
    page = TablesPage(EVIL, EVIL, [Fact(EVIL, EVIL)], [Notice("stop", EVIL, (EVIL,))], [table])
    text, parser = seen(page, command=EVIL, environment={EVIL: EVIL})
    assert "script" not in parser.tags
    assert "<script" not in text
    assert "\u202e" not in text
    assert text.count("&lt;script&gt;") >= 14
