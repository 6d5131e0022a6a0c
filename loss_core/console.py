"""Terminal output: lines, wrapped text, and tables without borders."""

from __future__ import annotations

import textwrap
from collections.abc import Container
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_lines(console: Console, *lines: str) -> None:
    """Print lines unchanged: no wrapping, no markup."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_wrapped(console: Console, text: str, indent: str = "") -> None:
    """Print text wrapped to the width of the terminal; lines after the first are indented by two more columns."""
    print_lines(console, *textwrap.wrap(
        text, console.width - 1, initial_indent=indent, subsequent_indent=indent + "  ",
        break_long_words=False, break_on_hyphens=False,
    ))  # fmt: skip


def plain_table(console: Console, widths: list[int], numbers: Container[int] = ()) -> Table:
    """An empty table without borders; the text of its last column wraps.

    Args:
        widths: of the columns.
        numbers: indices of the columns that are right-aligned.
    """
    from rich.table import Table

    gap = 2 if console.width >= 90 else 1
    table = Table(box=None, show_header=False, padding=(0, gap, 0, 0), pad_edge=False)
    for i, width in enumerate(widths[:-1]):
        table.add_column(width=width, no_wrap=True, justify="right" if i in numbers else "left")
    table.add_column(overflow="fold")
    return table
