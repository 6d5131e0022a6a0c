"""`loss-core bench --tune`: the fastest flags of a report, as entries of the machine's cache of tuned choices."""

from __future__ import annotations

from typing import Any

from loss_core.bench.report import FLAG, BenchReport, best_flag_of


def choices_of(report: BenchReport) -> list[dict[str, Any]]:
    """The fastest flag that is not wrong, for each call and backend, with the rows that justify it.

    `auto` flags are excluded: they name no kernel.
    """
    device = str(report.machine.get("device", report.settings.get("device", "")))
    choices = []
    for group in report.groups():
        rows = [row for row in group if row.kind == FLAG and not row.implementation.endswith(":auto")]
        for backend in dict.fromkeys(row.framework for row in rows):
            best = best_flag_of(rows, backend)
            if best is None:
                continue
            choices.append(
                {
                    "loss": best.config["name"],
                    "device": device,
                    "dtype": best.dtype,
                    "shape": list(best.shape),
                    "backend": backend,
                    "version": report.versions[backend],
                    "threads": report.settings["threads"],
                    "flag": best.implementation,
                    "ignored": best.ignored,
                    "versions": report.versions,
                    "date": report.date,
                    "rows": [
                        {
                            "flag": row.implementation, "seconds": row.seconds, "spread": row.spread, "peak": row.peak,
                            "first_call": row.first_call, "grad_error": row.grad_error, "error": row.error,
                        }
                        for row in rows
                        if row.framework == backend
                    ],
                }
            )  # fmt: skip
    return choices
