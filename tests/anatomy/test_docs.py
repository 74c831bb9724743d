"""The page on routing: its code runs, and prints what the page says."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "routing.md"


def test_the_page_prints_what_it_shows(capsys):
    blocks = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for code, shown in blocks:
        exec(code, names)  # noqa: S102 - the page is ours
        assert capsys.readouterr().out == shown
