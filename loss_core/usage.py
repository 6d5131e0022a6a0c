"""What is told to someone whose input can't be used: one exception, and a hint at the closest word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageProblem(Exception):
    """Something that the user gave can't be used; the message says what, and what is accepted."""


def closest(word: object, known: Iterable[str]) -> str:
    """A full stop, or a question that names the closest known word."""
    found = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else "."
