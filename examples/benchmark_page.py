"""Write the summary of BENCHMARKS.md, and a page for each result, from the results in examples/benchmarks.

    python examples/benchmark_page.py            # after adding or replacing a result
    python examples/benchmark_page.py --check    # exit code 1 if a page does not match the results

A result is the JSON of one `loss-core bench --json`. Its page in the same folder has the command, device, versions,
date, tables and figures: two for each call or, for three or more calls that differ in one size alone, one of the growth
of time and memory. The summary between the two markers in BENCHMARKS.md has a row for each call and framework, in one
table for each kind of device.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from loss_core.bench.figures import group_pictures, growth_pictures
from loss_core.bench.growth import growth_of, series_of
from loss_core.bench.report import (
    FLAG,
    BenchReport,
    BenchRow,
    best_baseline_of,
    best_flag_of,
    plain_of,
    roofline_of,
    share_text,
)
from loss_core.bench.tables import (
    device_of,
    facts_of,
    memory_text,
    series_heading,
    size_text,
    time_text,
    verdict,
    warnings_of,
)
from loss_core.bench.text import markdown, missing_text

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "BENCHMARKS.md"
RESULTS = ROOT / "examples" / "benchmarks"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

CALLS = ("call", "ours", "time", "x plain", "x best baseline", "of roofline", "memory: ours, baseline's", "result")
GROWTH = ("calls", "ours", "from", "to", "time", "exponent", "memory beside gradients", "result")


def result_page(name: str, report: BenchReport, pictures: Sequence[tuple[str, str]]) -> str:
    """The page of one result as Markdown; `pictures` are titles and file names."""
    facts = " · ".join(f"{key} {value}" for key, value in facts_of(report).items())
    parts = [f"# {name}", "", facts, "", "```", report.command or "loss_core.bench.bench(...)", "```", ""]
    parts += [line for warning in warnings_of(report) for line in (f"**{warning}**", "")]
    parts += [line for text in verdict(report).splitlines() for line in (f"- {text}",)]
    parts += ["", markdown(report)]
    parts += [line for title, path in pictures for line in (f"![{title}]({path})", "")]
    if report.missing:
        parts += [f"Not measured: {'; '.join(missing_text(entry) for entry in report.missing)}.", ""]
    parts += ["[What the columns mean](../../BENCHMARKS.md)", ""]
    return "\n".join(parts)


def single_calls(report: BenchReport) -> list[list[BenchRow]]:
    """Calls that are in no series with an exponent; the others are summarized by the rows of their series."""
    in_series = {row.group for series in series_of(report) if growth_of(series) for row in series.rows}
    return [group for group in report.groups() if group[0].group not in in_series]


def pictures_of(name: str, report: BenchReport) -> Iterator[tuple[str, Path, str]]:
    """Title, file and SVG of each figure."""
    pictures = [picture for group in single_calls(report) for picture in group_pictures(group, file=True)]
    for index, picture in enumerate([*pictures, *growth_pictures(report, file=True)]):
        yield picture.title, RESULTS / f"{name}-{index}.svg", picture.svg


def call_rows(name: str, report: BenchReport) -> Iterator[tuple[str, ...]]:
    """Cells of CALLS: our fastest flag in each call and framework."""
    for group in single_calls(report):
        for framework in dict.fromkeys(row.framework for row in group if row.kind == FLAG):
            ours = best_flag_of(group, framework)
            if ours is None or not ours.seconds:
                continue
            plain, baseline, roofline = (
                plain_of(group, framework),
                best_baseline_of(group, framework),
                roofline_of(group),
            )
            has_baseline = baseline is not None and baseline.seconds
            yield (
                f"{ours.loss} {' x '.join(f'{n:,}' for n in ours.shape)} {ours.dtype}{_options(ours, report)}",
                ours.implementation,
                time_text(ours.seconds),
                f"{ours.seconds / plain.seconds:.2f}" if plain and plain.seconds else "",
                f"{ours.seconds / baseline.seconds:.2f} ({baseline.implementation})" if has_baseline else "",
                f"{roofline / ours.seconds:.0%}" if roofline else "",
                f"{memory_text(ours.peak)}, {memory_text(baseline.peak)}" if has_baseline else memory_text(ours.peak),
                _link(name),
            )


def growth_rows(name: str, report: BenchReport) -> Iterator[tuple[str, ...]]:
    """Cells of GROWTH: each of our flags along each series."""
    for series in series_of(report):
        for growth in growth_of(series):
            if growth.first.kind == FLAG:
                ends = [size_text(size, series.axis) for size in (series.sizes[0], series.sizes[-1])]
                memory = [memory_text(row.working) for row in (growth.first, growth.last)]
                note = f" ({growth.last.note})" if growth.last.note else ""
                yield (
                    series_heading(series, report).partition(", forward")[0] + f" over {series.axis}",
                    growth.first.implementation + note,
                    *ends,
                    f"{time_text(growth.first.seconds)} to {time_text(growth.last.seconds)}",
                    f"{growth.exponent:.2f}",
                    " to ".join(memory),
                    _link(name),
                )


def _options(row: BenchRow, report: BenchReport) -> str:
    ranks = report.settings.get("tp", 1)
    return "".join(
        text
        for text, is_set in (
            (", forward only", report.settings.get("forward_only")),
            (f", {share_text(row.ignored)} ignored", row.ignored),
            (f", over {ranks} ranks", ranks > 1),
        )
        if is_set
    )


def _link(name: str) -> str:
    return f"[{name}](examples/benchmarks/{name}.md)"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|", *cells, ""] if cells else []


def summary(reports: Mapping[str, BenchReport]) -> str:
    """The tables of BENCHMARKS.md: one of calls and one of growth for each kind of device."""
    parts = []
    for device in dict.fromkeys(device_of(report) for report in reports.values()):
        results = {name: report for name, report in reports.items() if device_of(report) == device}
        facts = [f"{name} {', '.join(dict.fromkeys(values))}" for name, values in _values(results.values()).items()]
        parts += [f"### {device}", "", " · ".join(facts), ""]
        parts += _table(CALLS, (row for name, report in results.items() for row in call_rows(name, report)))
        parts += _table(GROWTH, (row for name, report in results.items() for row in growth_rows(name, report)))
    return "\n".join(parts) or "No result has been committed yet.\n"


def _values(reports: Iterable[BenchReport]) -> dict[str, list[str]]:
    """Threads, versions and dates of the reports, by name."""
    values: dict[str, list[str]] = {}
    for report in reports:
        for name, value in (facts_of(report) | {"date": report.date[:10]}).items():
            if name != "device":
                values.setdefault(name, []).append(value)
    return values


def generate() -> dict[Path, str]:
    """Text of every generated file, by path."""
    reports = {path.stem: BenchReport.from_json(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    files: dict[Path, str] = {}
    for name, report in reports.items():
        pictures = list(pictures_of(name, report))
        files |= {file: svg for _, file, svg in pictures}
        files[RESULTS / f"{name}.md"] = result_page(name, report, [(title, file.name) for title, file, _ in pictures])
    head, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    files[PAGE] = f"{head}{BEGIN}\n\n{summary(reports).rstrip()}\n\n{END}{tail}"
    return files


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where something would change")
    options = parser.parse_args(argv)
    stale = []
    for path, text in generate().items():
        # Figures may differ between versions of matplotlib; the numbers are in the pages.
        if options.check and path.suffix == ".svg":
            continue
        if not path.exists() or path.read_text("utf-8") != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if not options.check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, "utf-8")
    print("\n".join(f"{'not up to date' if options.check else 'wrote'}: {name}" for name in stale) or "up to date")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
