"""The report of `loss-core check` as text: tables, failures, the verdict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from loss_core import __version__
from loss_core.check.cells import condition_text, finds_text, lower_text, ratio_text, worst_of, worst_text
from loss_core.check.judge.matrix import matrices, reasons_not_judged
from loss_core.check.report import Finding, Report, Row
from loss_core.console import plain_table, print_lines, print_wrapped
from loss_core.dispatch.protocol import FlagStatus

if TYPE_CHECKING:
    from rich.console import Console

_HEADINGS = ("", "flag", "against", "dtype", "cases", "lower", "worst", "cond", "finds", "where the worst is")
_NUMBERS = range(4, 9)


def verdict(report: Report) -> str:
    """The check in one line: PASS or FAIL, what was run, and the largest error; clauses come first."""
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
    count = sum(bool(row.insensitive) for row in report.rows)
    insensitive = f"; {_counted(count, 'row')} insensitive to a lower arithmetic" if count else ""
    return f"PASS{so_far}: everything within what rounding explains ({size}){close}{insensitive}."


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
    """Versions of this library, Python, NumPy and the frameworks."""
    return " · ".join(f"{name} {version}" for name, version in {"loss-core": __version__, **report.versions}.items())


def failures_by_command(report: Report) -> Iterator[tuple[str, list[Finding]]]:
    """Failures grouped by call, with the command that reproduces them."""
    by_command: dict[str, list[Finding]] = {}
    for finding in (finding for row in report.rows for finding in row.failures):
        by_command.setdefault(finding.reproduce, []).append(finding)
    yield from by_command.items()


def insensitive_notes(report: Report) -> list[str]:
    """The rows in which a lower arithmetic would have passed every case, and what to do."""
    return [
        f"{row.loss} {row.flag} against {row.against}, {row.dtype}: {' and '.join(row.insensitive)} would have passed "
        "in every case; "
        + ("try more rows, larger logits or more cases (--shape, --cases)" if row.harder
           else "without --case and --inputs, harder cases are added")
        for row in report.rows
        if row.insensitive
    ]  # fmt: skip


def harder_notes(report: Report) -> list[str]:
    """The harder cases that were run for each loss and dtype, by all its flags."""
    notes = [f"{row.loss}, {row.dtype}: {', '.join(row.harder)}" for row in report.rows if row.harder]
    return list(dict.fromkeys(notes))


def reason_without_install(status: FlagStatus) -> str:
    """Why a flag can't be used, without its install command, which is shown separately."""
    reason = status.reason.removesuffix(status.install) if status.install else status.reason
    return reason.rstrip().removesuffix(":")


def print_check(console: Console, report: Report) -> None:
    """Print the full report; lines that are meant to be copied are never wrapped."""
    print_lines(console, versions_text(report))
    if report.verdicts:
        print_verdicts(console, report)
    if report.rows:
        for meaning in (
            "lower: how many cases would fail in the next lower arithmetic (TF32, bfloat16)",
            "worst: largest error ratio, error over allowance; 1 is the most that rounding explains",
            "cond: condition number of the loss there",
            "finds: an error of this relative size, common to a result or a gradient, would have failed",
        ):
            print_wrapped(console, meaning)
        console.print()
        _print_rows(console, report.rows)
    if notes := harder_notes(report):
        print_lines(console, "", "Harder cases, since a lower arithmetic would have passed all others:")
    for note in notes:
        print_wrapped(console, note, indent="  ")
    if notes := insensitive_notes(report):
        print_lines(console, "", "Insensitive:")
    for note in notes:
        print_wrapped(console, note, indent="  ")
    if report.unusable:
        print_lines(console, "", "Can't be used here:")
        print_reasons(console, report.unusable)
    if report.skipped:
        print_lines(console, "", "Skipped:")
        for note in report.skipped:
            print_wrapped(console, note, indent="  ")
    for command, findings in failures_by_command(report):
        first = findings[0]
        against = f" against {first.against}"
        print_lines(console, "", f"FAILED {first.loss} {first.flag}{against}, {first.dtype}, case {first.case}")
        for finding in findings:
            print_wrapped(console, f"{finding.where}: {finding.what}", indent="  ")
        print_lines(console, f"  {command}")
    console.print()
    console.print(verdict(report), style="bold green" if report.passed else "bold red", markup=False, soft_wrap=True)


def print_verdicts(console: Console, report: Report) -> None:
    """Print a matrix of clauses and implementations for each loss, then broken clauses and those not judged."""
    from rich.text import Text

    styles = {"ok": "green", "BROKEN": "bold red"}
    for loss, clauses, names, matrix in matrices(report):
        cells = [(clause, *(matrix.get((clause, name), "-") for name in names)) for clause in clauses]
        widths = [max(map(len, column)) for column in zip((loss, *names), *cells, strict=True)]
        table = plain_table(console, widths)
        table.add_row(Text(loss, style="bold"), *(Text(name, style="dim") for name in names))
        for clause, *marks in cells:
            table.add_row(clause, *(Text(mark, style=styles.get(mark, "dim")) for mark in marks))
        console.print()
        console.print(table)
    for verdict in report.broken:
        worst = verdict.worst
        what = f"{verdict.implementation}, {verdict.loss}, {verdict.clause}"
        print_lines(console, "", f"BROKEN {what}: {verdict.asserts}")
        if worst is not None:
            print_wrapped(console, f"{worst.dtype}, case {worst.case}, {worst.where}: {worst.what}", indent="  ")
            print_lines(console, f"  {worst.reproduce}")
    if reasons := reasons_not_judged(report):
        print_lines(console, "", "Unsupported or not seen:")
    for where, text in reasons:
        print_wrapped(console, f"{where}: {text}", indent="  ")


def _print_rows(console: Console, rows: list[Row]) -> None:
    """Print one heading per config and one line per row; all tables share their column widths."""
    from rich.text import Text

    cells = {id(row): _cells(row) for row in rows}
    widths = [max(map(len, column)) for column in zip(_HEADINGS, *cells.values(), strict=True)]
    head = plain_table(console, widths, numbers=_NUMBERS)
    head.add_row(*(Text(heading, style="dim") for heading in _HEADINGS))
    console.print(head)
    for loss, group in groupby(rows, key=lambda row: row.loss):
        console.print(loss, style="bold", markup=False, highlight=False, soft_wrap=True)
        table = plain_table(console, widths, numbers=_NUMBERS)
        for row in group:
            mark, *rest = cells[id(row)]
            table.add_row(Text(mark, style="green" if row.passed else "bold red"), *map(Text, rest))
        console.print(table)


def _cells(row: Row) -> tuple[str, ...]:
    ratio, where = worst_text(worst_of(row))
    mark = "ok" if row.passed else "FAIL"
    numbers = (str(row.cases), lower_text(row), ratio, condition_text(row), finds_text(row))
    return (mark, row.flag, row.against, row.dtype, *numbers, where)


def print_reasons(console: Console, statuses: Iterable[FlagStatus]) -> None:
    """Print why flags can't be used, grouped by reason, with the install commands."""
    for (reason, install), group in groupby(statuses, key=lambda s: (reason_without_install(s), s.install)):
        flags = [status.flag for status in group if f"'{status.flag}'" not in reason]
        print_wrapped(console, f"{', '.join(flags)}: {reason}" if flags else reason, indent="  ")
        if install:
            print_lines(console, f"    {install}")
