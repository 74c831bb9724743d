"""Passwords stay unsaid: what looks like the URL of a database is never repeated, but shown as the form to write."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

FORM = "postgresql+psycopg://USER:PASSWORD@HOST:PORT/DATABASE"  # the lab's; a test compares them
_SCHEMES = r"\s*(postgres|\w*sql|pg|jdbc|mariadb|oracle|mongodb|redis|cockroach)[\w+]*:"
_LINK = re.compile(r"https?://[^@]*")
_PATH = re.compile(r"/(?!/)|\.{1,2}/|~/")
_NAMED = re.compile(r"(password|passwd|pwd)\s*=", re.IGNORECASE)  # as PostgreSQL's client and its variable have it
_TOKEN = re.compile(
    r"[^\s'\"()]*(?:@|://|%40|%3a%2f|:/|\uff20|\uff1a|(?:password|passwd|pwd)=|(?:sql|pg|jdbc)\w*:)[^\s'\"()]*",
    re.IGNORECASE,
)
QUOTED = 3  # how often a URL is taken for percent-encoded


def may_hold_password(word: str) -> bool:
    """Whether a word is, or was meant to be, the URL of a database; a path that begins with / or ./ is none."""
    plain = unicodedata.normalize("NFKC", word)
    for _ in range(QUOTED):
        plain = unquote(plain)
    if _NAMED.search(plain):
        return True
    if re.match("sqlite:///", plain, re.IGNORECASE):
        plain = plain[len("sqlite:///") :]
        return not _PATH.match(plain) and any(sign in plain for sign in ("@", "://", "?"))
    if _PATH.match(plain):
        return "://" in plain
    known = plain.startswith("//") or re.match(_SCHEMES, plain, re.IGNORECASE) is not None
    return "@" in plain or "://" in plain or known


def without_passwords(text: str, words: Sequence[str] = ()) -> str:
    """A message in which everything that may hold a password is replaced by the form of a storage's URL.

    Args:
        text: The message.
        words: Of the command line, which the message may repeat whole.
    """
    suspects = [part for word in words for part in (word, word.partition("=")[2]) if may_hold_password(part)]
    pieces = [part for word in suspects for part in re.split(r"[=&,\s]", word) if len(part) > 3]  # as options are split
    said = {form for part in (*suspects, *pieces) for form in (part, repr(part)[1:-1], str(Path(part)))}
    for form in sorted(said, key=len, reverse=True):
        text = text.replace(form, FORM)
    return _TOKEN.sub(_shown, text)


def _shown(token: re.Match[str]) -> str:
    word = token[0]
    if word.strip(".,;:") in (FORM, "@") or _LINK.fullmatch(word) or not may_hold_password(word):
        return word
    return FORM
