"""Write the tables and pictures of BENCHMARKS.md from the results in examples/benchmarks.

    python examples/benchmark_page.py            # after adding or replacing a result
    python examples/benchmark_page.py --check    # exit code 1 where the page is not what the results say

A result is the JSON of one `loss-core bench --json`. Each becomes a section between the two marks of the page, with
its command, device, versions and date. Pictures lie beside the JSON: a pair for each call, or, for three or more
calls that differ in one size alone, one of how time and memory grow over it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from loss_core.bench_figures import group_pictures, growth_pictures
from loss_core.bench_growth import growth_of, series_of
from loss_core.bench_report import BenchReport
from loss_core.bench_tables import facts_of, verdict, warnings_of
from loss_core.bench_text import markdown, missing_text

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "BENCHMARKS.md"
RESULTS = ROOT / "examples" / "benchmarks"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def section(name: str, report: BenchReport, pictures: Sequence[tuple[str, str]]) -> str:
    """One result as Markdown. Pictures: title and path from the page."""
    facts = " · ".join(f"{key} {value}" for key, value in facts_of(report).items())
    parts = [f"### {name}", "", facts, "", "```", report.command or "loss_core.bench.bench(...)", "```", ""]
    parts += [line for warning in warnings_of(report) for line in (f"**{warning}**", "")]
    parts += [line for text in verdict(report).splitlines() for line in (f"- {text}",)]
    parts += ["", markdown(report)]
    parts += [line for title, path in pictures for line in (f"![{title}]({path})", "")]
    if report.missing:
        parts += [f"Not measured: {'; '.join(missing_text(entry) for entry in report.missing)}.", ""]
    return "\n".join(parts)


def drawn(name: str, report: BenchReport) -> Iterator[tuple[str, Path, str]]:
    """Title, file and SVG of each picture."""
    # Of many calls along one axis the growth is the picture; a pair for each of them would bury it.
    along = {row.group for series in series_of(report) if growth_of(series) for row in series.rows}
    groups = [group for group in report.groups() if group[0].group not in along]
    alone = [picture for group in groups for picture in group_pictures(group, file=True)]
    for index, picture in enumerate([*alone, *growth_pictures(report, file=True)]):
        yield picture.title, RESULTS / f"{name}-{index}.svg", picture.svg


def generate() -> dict[Path, str]:
    """Every file that the results give, with its text."""
    files: dict[Path, str] = {}
    sections = []
    for path in sorted(RESULTS.glob("*.json")):
        report = BenchReport.from_json(path.read_text("utf-8"))
        pictures = list(drawn(path.stem, report))
        files |= {file: svg for _, file, svg in pictures}
        shown = [(title, file.relative_to(ROOT).as_posix()) for title, file, _ in pictures]
        sections.append(section(path.stem, report, shown))
    page = PAGE.read_text("utf-8")
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    body = "\n".join(sections) or "No result has been committed yet.\n"
    files[PAGE] = f"{head}{BEGIN}\n\n{body.rstrip()}\n\n{END}{tail}"
    return files


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where something would change")
    options = parser.parse_args(argv)
    stale = []
    for path, text in generate().items():
        # Pictures may differ between versions of matplotlib; what a reader relies on is the page.
        if options.check and path != PAGE:
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
