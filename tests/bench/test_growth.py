"""Growth over T, V and the share of valid tokens, on hand-written rows: measured times depend on the machine."""

from __future__ import annotations

import runpy

import pytest

from helpers.bench import row as make_row
from helpers.command import ROOT
from loss_core.bench.figures import growth_pictures
from loss_core.bench.growth import SHARE, T, V, exponent, growth_of, series_of
from loss_core.bench.html import bench_page
from loss_core.bench.report import BenchReport, BenchRow
from loss_core.bench.tables import growth_tables, series_heading
from loss_core.bench.text import bench_text, markdown


def row(seconds: float, shape: tuple[int, ...] = (8, 10), name: str = "torch:eager", **more: object) -> BenchRow:
    return make_row(name, seconds, shape=shape, **more)


def over_t(*points: tuple[int, float], **more: object) -> list[BenchRow]:
    return [row(seconds, (tokens, 1000), **more) for tokens, seconds in points]  # type: ignore[arg-type]


@pytest.mark.parametrize("power", [0, 0.5, 1, 2])
def test_the_exponent_of_a_power_is_that_power(power):
    sizes = [16, 32, 100, 256]
    assert exponent(sizes, [3e-3 * size**power for size in sizes]) == pytest.approx(power, abs=1e-12)


def test_the_exponent_is_fitted_to_all_points_not_to_the_ends():
    # log2 of the times 0, 2, 2 over 0, 1, 2: slope 1 by the ends and by least squares; then 0, 0, 3 over 0, 1, 3.
    assert exponent([1, 2, 4], [1, 4, 4]) == pytest.approx(1)
    assert exponent([1, 2, 8], [1, 1, 8]) == pytest.approx(15 / 14)


def test_a_series_has_factors_exponent_and_both_ends():
    # Unsorted, as a report may be.
    rows = over_t((1024, 8.0), (64, 0.5), (256, 2.0)) + over_t((64, 1.0), (256, 16.0), (1024, 256.0), name="jax:xla")
    (series,) = series_of(BenchReport(rows=rows))
    assert (series.axis, series.sizes) == (T, [64, 256, 1024])
    linear, quadratic = growth_of(series)
    assert (linear.first.seconds, linear.last.seconds) == (0.5, 8.0)
    assert (linear.size_factor, linear.time_factor) == (16, 16)
    assert linear.exponent == pytest.approx(1)
    assert quadratic.first.implementation == "jax:xla"
    assert quadratic.time_factor == 256
    assert quadratic.exponent == pytest.approx(2)


def test_two_sizes_have_a_figure_but_no_exponent():
    report = BenchReport(rows=over_t((64, 0.5), (128, 1.0)))
    (series,) = series_of(report)
    assert growth_of(series) == []
    assert growth_tables(report) == []
    assert len(growth_pictures(report)) == 1
    # Three calls, but still two sizes.
    (series,) = series_of(BenchReport(rows=over_t((64, 0.5), (64, 0.6), (128, 1.0))))
    assert growth_of(series) == []


def test_one_size_is_no_series():
    assert series_of(BenchReport(rows=over_t((64, 0.5), name="roofline") + over_t((64, 1.0)))) == []


@pytest.mark.parametrize(
    "other",
    [
        {"shape": (128, 2000)},
        {"ignored": 0.5},
        {"config": {"name": "KDLoss", "temperature": 2.0}},
        {"shape": (128, 1000, 8)},
    ],
    ids=["V", "share", "config", "H"],
)
def test_calls_that_differ_in_two_respects_are_no_series(other):
    rows = [row(1.0, (64, 1000)), row(2.0, **{"shape": (128, 1000)} | other)]
    assert series_of(BenchReport(rows=rows)) == []
    rows[1].dtype = "bfloat16"
    assert series_of(BenchReport(rows=rows)) == []


def test_two_dtypes_are_two_series():
    rows = over_t((64, 1.0), (128, 2.0)) * 2
    more = over_t((64, 1.0), (128, 2.0))
    for other in more:
        other.dtype = "bfloat16"
    assert [series.rows[0].dtype for series in series_of(BenchReport(rows=rows + more))] == ["float32", "bfloat16"]


def test_every_axis_is_found_and_the_others_stay_fixed():
    # A cross: three sizes on each axis through one call.
    middle = (128, 1000, 32)
    rows = [row(1.0, middle)]
    rows += [row(t / 128, (t, 1000, 32)) for t in (64, 256)]
    rows += [row(v / 1000, (128, v, 32)) for v in (500, 2000)]
    rows += [row(1.0 - share, middle, ignored=share) for share in (0.5, 0.75)]
    found = series_of(BenchReport(rows=rows))
    assert [series.axis for series in found] == [T, V, SHARE]
    assert [series.sizes for series in found] == [[64, 128, 256], [500, 1000, 2000], [0.25, 0.5, 1.0]]
    assert [growth.exponent for series in found for growth in growth_of(series)] == pytest.approx([1, 1, 1])
    headings = [heading.partition(": ")[2] for heading, _ in growth_tables(BenchReport(rows=rows))]
    assert headings == [
        "over T, 64 to 256, at V x H = 1,000 x 32",
        "over V, 500 to 2,000, at T x H = 128 x 32",
        "over the share of valid tokens, 25% to 100%, at T x V x H = 128 x 1,000 x 32",
    ]


def test_wrong_and_failed_rows_are_excluded():
    rows = over_t((64, 1.0), (128, 2.0), (256, 4.0), (512, 1e-3), (1024, 1.0))
    rows[3].grad_error = 0.5
    rows[4].rounds, rows[4].error = [], "out of memory"
    (series,) = series_of(BenchReport(rows=rows))
    (growth,) = growth_of(series)
    assert growth.last.shape[0] == 256
    assert growth.exponent == pytest.approx(1)


def growth_report() -> BenchReport:
    """Times linear in T, memory constant except for the gradients, and a roofline that is not linear."""
    mib = 2**20
    rows = []
    for t, roofline in ((64, 6.4e-3), (256, 36e-3), (1024, 204.8e-3)):
        rows += [row(roofline, (t, 1000), "roofline")]
        rows[-1].note = "at 9 GB/s copied"
        rows += [row(t / 1e3, (t, 1000), peak=(t + 20) * mib, gradients=t * mib, note="runs torch:eager")]
    return BenchReport(rows=rows, settings={"forward_only": False})


def test_the_table_shows_time_exponent_and_memory_of_both_ends():
    ((heading, lines),) = growth_tables(growth_report())
    assert [line.note for line in lines] == ["", "runs torch:eager"]
    assert heading == "KDLoss, float32, forward + backward: over T, 64 to 1,024, at V = 1,000"
    assert [line.cells for line in lines] == [
        ("roofline", "16", "6.40 ms to 205 ms", "32", "1.25", "", "", ""),
        (
            "torch:eager",
            "16",
            "64.0 ms to 1.02 s",
            "16",
            "1.00",
            "10% to 20%",
            "84 MiB to 1,044 MiB",
            "20 MiB to 20 MiB",
        ),
    ]


def test_working_memory_is_none_unless_peak_and_gradients_are_known():
    assert row(1.0, peak=5, gradients=3).working == 2
    assert row(1.0, peak=3, gradients=5).working == 0
    assert row(1.0, peak=3).working is None
    assert row(1.0, gradients=3).working is None


def test_terminal_page_and_markdown_have_table_and_figure():
    report = growth_report()
    row_text = "64.0 ms to 1.02 s"
    assert row_text in bench_text(report)
    assert (
        "| **torch:eager** (runs torch:eager) | 16 | 64.0 ms to 1.02 s | 16 | 1.00 | 10% to 20% | 84 MiB to 1,044 MiB"
        in markdown(report)
    )
    page = bench_page(report)
    assert row_text in page
    # Time and memory of each call, and one figure of growth.
    assert page.count("<svg") == 3 * 2 + 1
    (picture,) = growth_pictures(report)
    assert "linear" in picture.svg
    assert "1,024" in picture.svg
    assert picture.title == series_heading(series_of(report)[0], report)


def test_the_benchmark_page_has_a_figure_of_growth_instead_of_one_per_call():
    pictures_of = runpy.run_path(str(ROOT / "examples/benchmark_page.py"), run_name="page")["pictures_of"]
    report = growth_report()
    titles = [title for title, _, _ in pictures_of("name", report)]
    assert titles == [series_heading(series_of(report)[0], report)]
    report.rows = report.rows[:4]
    assert len(list(pictures_of("name", report))) == 2 * 2 + 1
