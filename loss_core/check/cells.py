"""Contents of the table's columns, as text; shared by the terminal report and the HTML page."""

from __future__ import annotations

import numpy as np

from loss_core.check.report import Finding, Row


def ratio_text(ratio: float) -> str:
    """An error ratio in at most 3 digits."""
    return f"{ratio:.3f}" if 0.001 <= ratio < 100 else f"{ratio:.2g}"


def finds_text(row: Row) -> str:
    """The smallest relative error that would have been detected in every tensor, such as "3e-6"; "-" for none."""
    return "-" if row.coarsest is None else f"{row.coarsest:.0e}".replace("e-0", "e-")


def condition_text(row: Row) -> str:
    """Condition number of the loss in the call with the row's worst error; "-" where it is undefined."""
    worst = worst_of(row)
    return "-" if worst is None or np.isnan(worst.condition) else f"{worst.condition:.2g}".replace("e+0", "e")


def lower_text(row: Row) -> str:
    """How many cases detect a lower arithmetic, the minimum over these; "insensitive" if one is never detected."""
    return "-" if not row.lower else "insensitive" if row.insensitive else str(min(row.lower.values()))


def worst_of(row: Row) -> Finding | None:
    """The finding that the table shows for a row: its worst failure, or else its largest error."""
    numbers = [finding for finding in row.failures if not finding.problem]
    return max(numbers, key=lambda finding: finding.error_ratio, default=row.failures[0] if row.failures else row.worst)


def worst_text(finding: Finding | None) -> tuple[str, str]:
    """The error ratio, and the case and position of the error."""
    if finding is None:
        return "-", "nothing to compare"
    ratio = "-" if finding.problem else ratio_text(finding.error_ratio)
    return ratio, f"{finding.case}, {finding.where}"
