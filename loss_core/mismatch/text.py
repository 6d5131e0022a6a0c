"""The report of `loss-core check --logprobs` as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from loss_core import __version__
from loss_core.console import print_lines, print_wrapped
from loss_core.mismatch.hypotheses import Outcome
from loss_core.mismatch.report import Explanation, MismatchReport, rows_of
from loss_core.mismatch.statistics import Statistics, Token

if TYPE_CHECKING:
    from rich.console import Console

HYPOTHESIS_HEADINGS = ("", "tokens explained", "worst", "rms", "hypothesis")
TOKEN_HEADINGS = ("token", "label", "trainer", "engine", "difference")
LEGEND = (
    "tokens explained: those within what rounding explains; worst: largest error as a share of that allowance; rms: of "
    "observed - predicted, in nats"
)


def statistics_lines(statistics: Statistics) -> list[str]:
    """The distribution of differences as lines of text."""
    quantiles = ", ".join(
        f"{'max' if q == 1 else f'{q:.1%}'.replace('.0%', '%')} {value:.3g}"
        for q, value in statistics.quantiles.items()
    )
    bands = ", ".join(f"{band:g}: {share:.2%}" for band, share in statistics.bands.items())
    not_finite = "".join(f", {count:,} not finite ({name})" for name, count in statistics.not_finite.items() if count)
    estimates = f"k1 {statistics.k1:.3g}, k3 {statistics.k3:.3g}"
    return [
        f"{statistics.tokens:,} tokens compared, {statistics.ignored:,} ignored{not_finite}",
        f"difference = trainer - engine, in nats; mean {statistics.mean:.3g}",
        f"|difference|: {quantiles}",
        f"tokens whose ratio exp(difference) is within a band of 1: {bands}",
        f"KL(engine || trainer), unbiased where the engine sampled the labels: {estimates}",
    ]


def token_cells(token: Token) -> tuple[str, ...]:
    """One line of the table of worst tokens."""
    return (
        "".join(f"[{i}]" for i in token.position),
        str(token.label),
        f"{token.trainer:.6g}",
        f"{token.engine:.6g}",
        f"{token.trainer - token.engine:.3g}",
    )


def hypothesis_cells(word: str, outcome: Outcome) -> tuple[str, ...]:
    """One line of a system's table of hypotheses."""
    return (
        word,
        f"{outcome.within:,} of {outcome.tokens:,}",
        f"{outcome.worst:.3g}",
        f"{outcome.rms:.2g}",
        outcome.hypothesis.name,
    )


def explanation_heading(explanation: Explanation) -> str:
    """The result for one system in one line."""
    return (
        f"{explanation.system} ({explanation.tokens:,} tokens, {explanation.tried} hypotheses): {explanation.finding}"
    )


def print_mismatch(console: Console, report: MismatchReport) -> None:
    """Print the full report."""
    for line in (f"loss-core {__version__}", *statistics_lines(report.statistics)):
        print_wrapped(console, line)
    if report.statistics.worst:
        print_lines(console, "", "The largest differences:")
        _print_table(console, TOKEN_HEADINGS, map(token_cells, report.statistics.worst), left=())
    for explanation in report.explanations.values():
        console.print()
        print_wrapped(console, explanation_heading(explanation))
        rows = [hypothesis_cells(word, outcome) for word, outcome in rows_of(explanation)]
        _print_table(console, HYPOTHESIS_HEADINGS, rows, left=(0, 4))
    for paragraph in ([LEGEND] if report.explanations else [], report.notes):
        if paragraph:
            console.print()
        for line in paragraph:
            print_wrapped(console, line)
    style = "bold green" if report.agree else "bold red"
    console.print()
    console.print(report.conclusion, style=style, markup=False, highlight=False, soft_wrap=True)


def _print_table(console: Console, headings: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for i, heading in enumerate(headings):
        last = i == len(headings) - 1
        table.add_column(
            heading, justify="left" if i in left else "right", no_wrap=not last, overflow="fold" if last else "ellipsis"
        )
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
