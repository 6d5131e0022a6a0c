"""Text on a terminal: lines, wrapped text, and tables without lines around their cells."""

from __future__ import annotations

import textwrap
from collections.abc import Container
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_lines(console: Console, *lines: str) -> None:
    """Lines as they are: not wrapped, no markup."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_wrapped(console: Console, text: str, indent: str = "") -> None:
    """A text within the width of the terminal; its second line and what follows are indented by two more."""
    print_lines(console, *textwrap.wrap(
        text, console.width - 1, initial_indent=indent, subsequent_indent=indent + "  ",
        break_long_words=False, break_on_hyphens=False,
    ))  # fmt: skip


def plain_table(console: Console, widths: list[int], numbers: Container[int] = ()) -> Table:
    """An empty table without lines, of columns of these widths, of which the last may wrap.

    Args:
        numbers: columns that are aligned to the right.
    """
    from rich.table import Table

    gap = 2 if console.width >= 90 else 1
    table = Table(box=None, show_header=False, padding=(0, gap, 0, 0), pad_edge=False)
    for i, width in enumerate(widths[:-1]):
        table.add_column(width=width, no_wrap=True, justify="right" if i in numbers else "left")
    table.add_column(overflow="fold")
    return table
