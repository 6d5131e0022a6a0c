"""`loss-core check --invariance`: from options to a report on the terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from loss_core.check.invariance.batches import check_invariance
from loss_core.cli.common import note, write_outputs
from loss_core.dispatch.protocol import BackendUnavailable
from loss_core.usage import UsageProblem


def run_invariance(
    config: Sequence[Any] | None, backends: Sequence[str] | None, json: Path | None, **options: Any
) -> int:
    """Check, print and write; the exit code.

    Args:
        config, backends, options: of `check_invariance`.
        json: file to write.
    """
    out, err = Console(), Console(stderr=True)
    try:
        report = check_invariance(config, backends, **options)
    except (BackendUnavailable, ValueError, TypeError) as error:
        raise UsageProblem(str(error)) from error
    if not report.rows:
        raise UsageProblem("Nothing could be run: " + "; ".join(report.skipped).rstrip(".") + ".")
    note(out, str(report))
    write_outputs([(json, lambda: report.to_json() + "\n")], err)
    return 0 if report.passed else 1


def refuse_beside_invariance(options: Mapping[str, object]) -> None:
    """Refuse options, by name, that were given and that belong to the check against float64."""
    if given := [name for name, value in options.items() if value]:
        raise UsageProblem(
            f"{', '.join(given)} can't be used beside --invariance, which draws batches of its own and compares a flag "
            "with itself: it takes --config, --backend, --dtype, --shape, --seed, --device, --json and --import."
        )
