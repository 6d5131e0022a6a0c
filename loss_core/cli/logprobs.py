"""`loss-core check --logprobs`: explain the differences between a trainer and its inference engine."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from loss_core.cli.common import check_outputs, reject_others, write_outputs
from loss_core.mismatch import explain, read_dump
from loss_core.mismatch.html import mismatch_page
from loss_core.mismatch.text import print_mismatch


def explain_logprobs(ctx: typer.Context, dump: Path, seed: int, json: Path | None, page: Path | None) -> int:
    """Print and write why the two systems of a dump differ.

    Returns:
        0 if one computation explains both systems, else 1.
    """
    reject_others(ctx, "logprobs", ("seed", "json", "page"))
    out, err = Console(), Console(stderr=True)
    check_outputs(json, page)
    report = explain(read_dump(dump), seed=seed)
    print_mismatch(out, report)
    command_line = ctx.obj or "loss-core check --logprobs"
    write_outputs([(json, lambda: report.to_json() + "\n"), (page, lambda: mismatch_page(report, command_line))], err)
    return 0 if report.agree else 1
