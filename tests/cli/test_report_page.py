"""The page of `loss-core check --report`."""

from __future__ import annotations

import html.parser
import re
from dataclasses import replace

import pytest

from helpers.command import QUICK, run
from loss_core import LOSS_CONFIG_REGISTRY
from loss_core.check import Finding, Report, Row, check
from loss_core.check.html import check_page


class Page(html.parser.HTMLParser):
    """Text of the table's cells by row, the tags, and the attributes that would load a resource."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags, self.loads, self._cell = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data") and v[:1] != "#"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data):
        if self._cell:
            self.rows[-1][-1] += data


def page_of(report, command="loss-core check"):
    text = check_page(report, command)
    page = Page(text)
    assert page.loads == []
    assert "http" not in text
    assert "script" not in page.tags
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)
    return text, page


def test_the_page_has_the_table_and_a_figure_per_flag_and_loads_nothing(tmp_path):
    result = run("check", *QUICK, "--dtype", "bfloat16", "--report", tmp_path / "r.html", obj="loss-core check --typed")
    assert result.exit_code == 0, result.output
    page = Page((tmp_path / "r.html").read_text("utf-8"))
    rows = [row for row in page.rows if row[0] == "ok"]
    assert len(rows) == 2 * len(LOSS_CONFIG_REGISTRY)
    assert [row[1:4] for row in rows[:2]] == [["torch:eager", "float64", d] for d in ("float32", "bfloat16")]

    report = check(None, ["torch:eager"], dtypes=["float32"], only=["basic"])
    report.histograms["jax:xla", "float32"] = report.histograms["torch:eager", "float32"]
    text, page = page_of(report, "loss-core check --typed")
    assert page.tags.count("svg") == 2
    assert "PASS" in text
    assert "loss-core check --typed" in text
    for version in report.versions.values():
        assert version in text


@pytest.mark.usefixtures("forgetful", "no_jax")
def test_the_page_marks_failures_and_lists_unusable_flags():
    report = check("ForgetfulKD", dtypes=["float32"], only=["temperature"])
    text, page = page_of(report)
    assert [row[0] for row in page.rows[2:]] == ["FAIL"]
    assert "loss-core check --config ForgetfulKD --backend torch:eager --dtype float32 --case temperature" in text
    assert "backend &#39;jax&#39; needs absent_framework" in text
    assert "pip install &#39;loss-core[jax]&#39;" in text


def test_the_page_marks_an_insensitive_row():
    report = check("MaskedCrossEntropy", ["torch:eager"], dtypes=["float32"], only=["all-ignored"])
    text, page = page_of(report)
    assert page.rows[2][4:6] == ["1", "insensitive"]
    assert "float32: bfloat16 softmax would have passed in every case" in text
    seen, page = page_of(check("MaskedCrossEntropy", ["torch:eager"], dtypes=["float32"], only=["basic"]))
    assert page.rows[2][4:6] == ["1", "1"]
    assert "would have passed" not in seen


def test_the_page_names_harder_cases():
    report = check("MaskedCrossEntropy", ["torch:eager"], dtypes=["float32"], shape=(1, 1))
    text, _ = page_of(report)
    assert "<li>MaskedCrossEntropy, float32: harder-1</li>" in text


def test_hostile_names_are_escaped():
    evil = "<script>alert('x')</script>"
    finding = Finding(evil, "torch:eager", "float64", "float32", evil, evil, 2.0, 1.0, 0.5, (0,), 1.0, 0.0, evil, evil)
    number = replace(finding, problem="")
    row = Row(evil, "torch:eager", "float64", "float32", 1, number, [finding, number])
    report = Report(rows=[row], skipped=[evil], versions={"numpy": evil})
    text, page = page_of(report, evil)
    assert evil not in text
    assert evil in [cell for r in page.rows for cell in r], "shown as text"


def test_a_report_with_infinite_and_missing_numbers_is_shown():
    nan = float("nan")
    finding = Finding(
        "L", "torch:eager", "float64", "float32", "c", "loss", float("inf"), nan, 0.0, (), nan, 0.0, "", "l"
    )
    rows = [Row("L", "torch:eager", "float64", "float32", 1, finding, [finding]), Row("L", "x", "float64", "float32")]
    _, page = page_of(Report(rows=rows))
    assert [row[0] for row in page.rows[2:]] == ["FAIL", "ok"]
    assert page.rows[2][5:8] == ["-", "inf", ""]
