"""What the command line prints: the check's table, the flags, the losses."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, fields
from itertools import groupby
from typing import TYPE_CHECKING, Any

from loss_core import __version__
from loss_core.check.cells import condition_text, finds_text, lower_text, ratio_text, worst_of, worst_text
from loss_core.check.judge.matrix import matrices, reasons_not_judged
from loss_core.check.report import Finding, Report, Row
from loss_core.dispatch.protocol import FlagStatus
from loss_core.registry import LOSS_CONFIG_REGISTRY

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_HEADINGS = ("", "flag", "against", "dtype", "cases", "lower", "worst", "cond", "finds", "where the worst is")
_NUMBERS = range(4, 9)


def verdict(report: Report) -> str:
    """The check in one line: passed or failed, on what, and how close it was; clauses come first."""
    sentences = [_verdict_on_clauses(report)] if any(v.calls or v.findings for v in report.verdicts) else []
    sentences += [_verdict_on_rows(report)] if report.rows else []
    return " ".join(sentences) or "NOTHING CHECKED: no loss could be run."


def _verdict_on_rows(report: Report) -> str:
    losses = _counted(len({row.loss for row in report.rows}), "config")
    flags = _counted(len({row.flag for row in report.rows}), "flag")
    values = int(sum(int(counts.sum()) for counts in report.histograms.values()))
    size = f"{losses}, {flags}, {_counted(values, 'value')} in {report.seconds:.0f} s"
    if report.stopped:
        size = f"stopped after {report.calls:,} of {_counted(report.total, 'call')}; {size}"
    so_far = " so far" if report.stopped else ""
    if bad := sum(not row.passed for row in report.rows):
        of = _counted(len(report.rows), "row")
        return f"FAIL{so_far}: {bad} of {of} beyond what rounding explains ({size})."
    worst = max((row.worst for row in report.rows if row.worst), key=lambda finding: finding.error_ratio, default=None)
    close = f"; the largest error is {ratio_text(worst.error_ratio)} of its allowance" if worst else ""
    blind = sum(bool(row.insensitive) for row in report.rows)
    told = f"; {_counted(blind, 'row')} insensitive to a lower arithmetic" if blind else ""
    return f"PASS{so_far}: everything within what rounding explains ({size}){close}{told}."


def _verdict_on_clauses(report: Report) -> str:
    judged = [verdict for verdict in report.verdicts if verdict.calls or verdict.findings]
    size = f"{_counted(sum(v.calls for v in judged), 'judgement')} in {report.seconds:.0f} s"
    if report.broken:
        return f"FAIL: {len(report.broken)} of {_counted(len(judged), 'clause')} broken ({size})."
    rest = len(report.verdicts) - len(judged)
    return f"PASS: {_counted(len(judged), 'clause')} ok, {rest} unsupported or not seen ({size})."


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def versions_text(report: Report) -> str:
    """Versions of this library and of what it ran on."""
    return " · ".join(f"{name} {version}" for name, version in {"loss-core": __version__, **report.versions}.items())


def failures_by_command(report: Report) -> Iterator[tuple[str, list[Finding]]]:
    """Failures of one call together, with the line that reproduces them."""
    by_command: dict[str, list[Finding]] = {}
    for finding in (finding for row in report.rows for finding in row.failures):
        by_command.setdefault(finding.reproduce, []).append(finding)
    yield from by_command.items()


def insensitive_notes(report: Report) -> list[str]:
    """The rows of which a lower arithmetic would have passed every case, and what to do."""
    return [
        f"{row.loss} {row.flag} against {row.against}, {row.dtype}: {' and '.join(row.insensitive)} would have passed "
        "in every case; more rows, larger logits or more cases (--shape, --cases) tell more"
        for row in report.rows
        if row.insensitive
    ]


def reason_without_install(status: FlagStatus) -> str:
    """Why a flag can't be used; its install line is shown apart."""
    reason = status.reason.removesuffix(status.install) if status.install else status.reason
    return reason.rstrip().removesuffix(":")


def print_check(console: Console, report: Report) -> None:
    """The whole report as text; lines that are meant to be copied are never wrapped."""
    _print_lines(console, versions_text(report))
    if report.verdicts:
        print_verdicts(console, report)
    if report.rows:
        for meaning in (
            "lower: how many cases would fail in the next lower arithmetic (TF32, bfloat16)",
            "worst: largest error ratio, error over allowance; 1 is the most that rounding explains",
            "cond: condition number of the loss there",
            "finds: an error of this relative size, common to a result or a gradient, would have failed",
        ):
            _print_wrapped(console, meaning, "")
        console.print()
        _print_rows(console, report.rows)
    if notes := insensitive_notes(report):
        _print_lines(console, "", "Insensitive:")
    for note in notes:
        _print_wrapped(console, note, "  ")
    if report.unusable:
        _print_lines(console, "", "Can't be used here:")
        print_reasons(console, report.unusable)
    if report.skipped:
        _print_lines(console, "", "Skipped:")
        for note in report.skipped:
            _print_wrapped(console, note, "  ")
    for command, findings in failures_by_command(report):
        first = findings[0]
        against = f" against {first.against}"
        _print_lines(console, "", f"FAILED {first.loss} {first.flag}{against}, {first.dtype}, case {first.case}")
        for finding in findings:
            _print_wrapped(console, f"{finding.where}: {finding.what}", "  ")
        _print_lines(console, f"  {command}")
    console.print()
    console.print(verdict(report), style="bold green" if report.passed else "bold red", markup=False, soft_wrap=True)


def print_verdicts(console: Console, report: Report) -> None:
    """A matrix of clauses and implementations for each loss, and below it what is broken and what is not judged."""
    from rich.text import Text

    styles = {"ok": "green", "BROKEN": "bold red"}
    for loss, clauses, names, matrix in matrices(report):
        cells = [(clause, *(matrix.get((clause, name), "-") for name in names)) for clause in clauses]
        widths = [max(map(len, column)) for column in zip((loss, *names), *cells, strict=True)]
        table = _plain_table(console, widths)
        table.add_row(Text(loss, style="bold"), *(Text(name, style="dim") for name in names))
        for clause, *marks in cells:
            table.add_row(clause, *(Text(mark, style=styles.get(mark, "dim")) for mark in marks))
        console.print()
        console.print(table)
    for verdict in report.broken:
        worst = verdict.worst
        what = f"{verdict.implementation}, {verdict.loss}, {verdict.clause}"
        _print_lines(console, "", f"BROKEN {what}: {verdict.asserts}")
        if worst is not None:
            _print_wrapped(console, f"{worst.dtype}, case {worst.case}, {worst.where}: {worst.what}", "  ")
            _print_lines(console, f"  {worst.reproduce}")
    if reasons := reasons_not_judged(report):
        _print_lines(console, "", "Unsupported or not seen:")
    for where, text in reasons:
        _print_wrapped(console, f"{where}: {text}", "  ")


def _print_lines(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_wrapped(console: Console, text: str, indent: str) -> None:
    _print_lines(console, *textwrap.wrap(
        text, console.width - 1, initial_indent=indent, subsequent_indent=indent + "  ",
        break_long_words=False, break_on_hyphens=False,
    ))  # fmt: skip


def _print_rows(console: Console, rows: list[Row]) -> None:
    """One heading per config, and below it a line per row; all tables share their widths."""
    from rich.text import Text

    cells = {id(row): _cells(row) for row in rows}
    widths = [max(map(len, column)) for column in zip(_HEADINGS, *cells.values(), strict=True)]
    head = _plain_table(console, widths)
    head.add_row(*(Text(heading, style="dim") for heading in _HEADINGS))
    console.print(head)
    for loss, group in groupby(rows, key=lambda row: row.loss):
        console.print(loss, style="bold", markup=False, highlight=False, soft_wrap=True)
        table = _plain_table(console, widths)
        for row in group:
            mark, *rest = cells[id(row)]
            table.add_row(Text(mark, style="green" if row.passed else "bold red"), *map(Text, rest))
        console.print(table)


def _cells(row: Row) -> tuple[str, ...]:
    ratio, where = worst_text(worst_of(row))
    mark = "ok" if row.passed else "FAIL"
    numbers = (str(row.cases), lower_text(row), ratio, condition_text(row), finds_text(row))
    return (mark, row.flag, row.against, row.dtype, *numbers, where)


def _plain_table(console: Console, widths: list[int]) -> Table:
    from rich.table import Table

    gap = 2 if console.width >= 90 else 1
    table = Table(box=None, show_header=False, padding=(0, gap, 0, 0), pad_edge=False)
    for i, width in enumerate(widths[:-1]):
        table.add_column(width=width, no_wrap=True, justify="right" if i in _NUMBERS else "left")
    table.add_column(overflow="fold")
    return table


def print_reasons(console: Console, statuses: Iterable[FlagStatus]) -> None:
    """Why flags can't be used, those with the same reason together, each with its install line."""
    for (reason, install), group in groupby(statuses, key=lambda s: (reason_without_install(s), s.install)):
        flags = [status.flag for status in group if f"'{status.flag}'" not in reason]
        _print_wrapped(console, f"{', '.join(flags)}: {reason}" if flags else reason, "  ")
        if install:
            _print_lines(console, f"    {install}")


def print_backends(console: Console, statuses: Iterable[FlagStatus]) -> None:
    """Every flag, with the version behind it, or why it can't be used and what to install."""
    from rich.text import Text

    statuses = list(statuses)
    cells = [("flag", "usable", "version")]
    cells += [(status.flag, "yes" if status.usable else "no", status.version or "-") for status in statuses]
    table = _plain_table(console, [max(map(len, column)) for column in zip(*cells, strict=True)])
    for i, row in enumerate(cells):
        style = "dim" if i == 0 else ("green" if row[1] == "yes" else "yellow")
        table.add_row(row[0], Text(row[1], style=style), row[2])
    console.print(table)
    unusable = [status for status in statuses if not status.usable]
    if unusable:
        _print_lines(console, "", "Can't be used here:")
        print_reasons(console, unusable)
    _print_lines(console, "", "`torch` and `jax` alone (or :auto) let the backend choose among its usable kernels.")


def print_losses(console: Console) -> None:
    """Every config of the registry: fields, types, defaults, and what they mean."""
    from rich.table import Table

    for i, (name, config_cls) in enumerate(LOSS_CONFIG_REGISTRY.items()):
        if i:
            console.print()
        heading = name if name == config_cls.__name__ else f"{name} ({config_cls.__name__})"
        console.print(heading, style="bold", markup=False, highlight=False, soft_wrap=True)
        summary, meanings = described(config_cls)
        if summary:
            _print_wrapped(console, summary, "  ")
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
    """First line of a config's docstring, and what its Attributes section says of each field."""
    summary, meanings = "", dict[str, str]()
    for cls in reversed(config_cls.__mro__):
        text = cls.__dict__.get("__doc__") or ""
        if cls is object or text.startswith(f"{cls.__name__}("):  # what dataclass writes where there is no docstring
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
