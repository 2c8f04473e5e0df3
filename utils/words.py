"""Words of messages: numbers with their noun, names that are near another one, the beginning of a long text."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable


def count_of(n: int, noun: str, plural: str | None = None) -> str:
    """`1 spot`, `2 spots`; `plural` where it is not the noun with an s."""
    return f"{n} {noun if n == 1 else plural or noun + 's'}"


def nearest(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """Names that a misspelt one may have been meant for, the nearest first; none where none is near."""
    by_lower = {other.lower(): other for other in known}
    return [by_lower[other] for other in difflib.get_close_matches(name.lower(), by_lower, most)]


def cut(text: object, most: int = 160) -> str:
    """A library's message as one line, shortened behind a whole word."""
    line = " ".join(str(text).split())
    return textwrap.shorten(line, most, placeholder=" ...") if " " in line[:most] else line[:most]
