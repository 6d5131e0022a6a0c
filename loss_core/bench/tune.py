"""`loss-core bench --tune`: which flags a report shows to be fastest, as entries of the machine's cache."""

from __future__ import annotations

from typing import Any

from loss_core.bench.report import FLAG, BenchReport, best_flag_of


def choices_of(report: BenchReport) -> list[dict[str, Any]]:
    """For each call and backend the fastest flag that is not wrong, with the rows that justify it.

    Flags that let the backend choose (`auto`) are no answer and are left out.
    """
    device = str(report.machine.get("device", report.settings.get("device", "")))
    found = []
    for group in report.groups():
        rows = [row for row in group if row.kind == FLAG and not row.implementation.endswith(":auto")]
        for backend in dict.fromkeys(row.framework for row in rows):
            best = best_flag_of(rows, backend)
            if best is None:
                continue
            found.append(
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
    return found
