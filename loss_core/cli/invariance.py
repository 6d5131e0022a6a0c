"""`loss-core check --invariance`: run the check, write the report to the terminal and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from loss_core.check.invariance.batches import check_invariance
from loss_core.cli.common import print_text, write_outputs
from loss_core.usage import UsageProblem


def run_invariance(
    config: Sequence[Any] | None, backends: Sequence[str] | None, json: Path | None, **options: Any
) -> int:
    """Check, print and write; returns the exit code.

    Args:
        config, backends, options: of `check_invariance`.
        json: file to write.
    """
    out, err = Console(), Console(stderr=True)
    try:
        report = check_invariance(config, backends, **options)
    except (ValueError, TypeError) as error:
        raise UsageProblem(str(error)) from error
    if not report.rows:
        raise UsageProblem("Nothing could be run: " + "; ".join(report.skipped).rstrip(".") + ".")
    print_text(out, str(report))
    write_outputs([(json, lambda: report.to_json() + "\n")], err)
    return 0 if report.passed else 1
