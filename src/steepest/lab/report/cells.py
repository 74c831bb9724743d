"""Text in tables that spreadsheets open."""

from __future__ import annotations

# after these a spreadsheet takes the rest for a formula; the last four are their wide forms
_STARTS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")


def neutral(text: str) -> str:
    """The text, with an apostrophe before what would be a formula: a name may come from a stranger.

    Examples:
        >>> neutral("=1+1"), neutral("muon")
        ("'=1+1", 'muon')
    """
    return f"'{text}" if text.startswith(_STARTS) else text
