"""Our docstrings for the API reference: its parser wants a blank line before each section, which we leave out."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"(?<!\n)\n(?=(?:Args|Attributes|Returns|Raises|Example|Source):)")


class BlankLines(griffe.Extension):
    """Adds it."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Called for each module, class, function and attribute, once its docstring is known."""
        if obj.docstring is not None:
            obj.docstring.value = SECTION.sub("\n\n", obj.docstring.value)
