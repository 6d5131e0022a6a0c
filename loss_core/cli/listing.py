"""The tables of `loss-core backends` and `loss-core losses`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loss_core.check.text import print_reasons
from loss_core.console import plain_table, print_lines, print_wrapped
from loss_core.dispatch.protocol import FlagStatus
from loss_core.registry import LOSS_CONFIG_REGISTRY


def print_backends(console: Console, statuses: Iterable[FlagStatus]) -> None:
    """Print every flag with its version, or why it can't be used and what to install."""
    statuses = list(statuses)
    cells = [("flag", "usable", "version")]
    cells += [(status.flag, "yes" if status.usable else "no", status.version or "-") for status in statuses]
    table = plain_table(console, [max(map(len, column)) for column in zip(*cells, strict=True)])
    for i, row in enumerate(cells):
        style = "dim" if i == 0 else ("green" if row[1] == "yes" else "yellow")
        table.add_row(row[0], Text(row[1], style=style), row[2])
    console.print(table)
    unusable = [status for status in statuses if not status.usable]
    if unusable:
        print_lines(console, "", "Can't be used here:")
        print_reasons(console, unusable)
    print_lines(console, "", "`torch` and `jax` alone (or :auto) let the backend choose among its usable kernels.")


def print_losses(console: Console) -> None:
    """Print every config of the registry: fields, types, defaults, and meanings."""
    for i, (name, config_cls) in enumerate(LOSS_CONFIG_REGISTRY.items()):
        if i:
            console.print()
        heading = name if name == config_cls.__name__ else f"{name} ({config_cls.__name__})"
        console.print(heading, style="bold", markup=False, highlight=False, soft_wrap=True)
        summary, meanings = described(config_cls)
        if summary:
            print_wrapped(console, summary, indent="  ")
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for heading in ("  field", "type", "default"):
            table.add_column(heading, no_wrap=True)
        table.add_column("meaning", overflow="fold")
        for f in fields(config_cls):
            table.add_row(f"  {f.name}", _type_text(f), _default_text(f), meanings.get(f.name, ""))
        if table.row_count:
            console.print(table, markup=False, highlight=False)


def _type_text(f: Field[Any]) -> str:
    return f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))


def _default_text(f: Field[Any]) -> str:
    if f.default is not MISSING:
        return repr(f.default)
    return repr(f.default_factory()) if f.default_factory is not MISSING else "required"


def described(config_cls: type) -> tuple[str, dict[str, str]]:
    """First line of a config's docstring, and the meaning of each field from its Attributes section."""
    summary, meanings = "", dict[str, str]()
    for cls in reversed(config_cls.__mro__):
        text = cls.__dict__.get("__doc__") or ""
        if cls is object or text.startswith(f"{cls.__name__}("):  # dataclass's default docstring
            continue
        text = inspect.cleandoc(text)
        summary = text.partition("\n")[0]
        meanings |= _attributes(text)
    return summary, meanings


def _attributes(text: str) -> dict[str, str]:
    meanings: dict[str, str] = {}
    name = ""
    for line in text.partition("\nAttributes:\n")[2].splitlines():
        if line and not line.startswith(" "):
            break
        if line.startswith("     "):
            meanings[name] = f"{meanings.get(name, '')} {line.strip()}".strip()
        elif line.strip():
            name, _, meaning = line.strip().partition(": ")
            meanings[name] = meaning
    return meanings
