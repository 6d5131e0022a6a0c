"""Usage errors: the exception for unusable user input, and a hint with the closest known word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageProblem(Exception):
    """User input that can't be used; the message says what is wrong, and what is accepted."""


def closest(word: object, known: Iterable[str]) -> str:
    """End of an error message: "; did you mean ...?" with the closest known word, or "."."""
    found = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else "."
