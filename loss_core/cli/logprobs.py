"""`loss-core check --logprobs`: a trainer and its inference engine, explained."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from loss_core.cli.common import check_outputs, only_options, write_outputs
from loss_core.mismatch import explain, read_dump
from loss_core.mismatch.html import mismatch_page
from loss_core.mismatch.text import print_mismatch


def explain_logprobs(ctx: typer.Context, dump: Path, seed: int, json: Path | None, page: Path | None) -> int:
    """Print, and write, why the two systems of a dump differ.

    Returns:
        0 where one computation explains both systems, else 1.
    """
    only_options(ctx, "logprobs", ("seed", "json", "page"))
    out, err = Console(), Console(stderr=True)
    check_outputs(json, page)
    report = explain(read_dump(dump), seed=seed)
    print_mismatch(out, report)
    typed = ctx.obj or "loss-core check --logprobs"
    write_outputs([(json, lambda: report.to_json() + "\n"), (page, lambda: mismatch_page(report, typed))], err)
    return 0 if report.agree else 1
