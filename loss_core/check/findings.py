"""Compare the results of a call with expected values, and record errors and failures in a row of the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from loss_core.check.report import Finding, Floats, Row
from loss_core.losses.bounds.errors import errors_as_stored, errors_before_rounding, is_rounded, smallest_found


def add_findings(
    row: Row,
    template: Finding,
    got: Mapping[str, Floats],
    expected: Mapping[str, Floats],
    allowed: Mapping[str, Floats],
    dtypes: Mapping[str, str],
    rounded: bool = False,
) -> list[Floats]:
    """Compare results by name; record failures, the worst finding and the smallest detectable error in the row.

    Args:
        template: a finding with the fields that all tensors share.
        dtypes: dtype by name; decides what may overflow.
        rounded: whether 16-bit results were computed in a wider format and rounded once, to nearest.
    Returns:
        The error ratios of each tensor whose shape is the expected one.
    """
    ratios, errors_of = [], errors_before_rounding if rounded else errors_as_stored
    for tensor, value in got.items():
        if value.shape != expected[tensor].shape:
            problem = f"has shape {value.shape}, not {expected[tensor].shape}"
            row.failures.append(replace(template, tensor=tensor, problem=problem))
            continue
        error, limit, ratio = errors_of(value, expected[tensor], allowed[tensor], dtypes[tensor])
        ratios.append(ratio)
        if not ratio.size:
            continue
        smallest = smallest_found(expected[tensor], allowed[tensor], dtypes[tensor], rounded)
        if smallest < np.inf:
            row.finds[tensor] = min(smallest, row.finds.get(tensor, smallest))
        worst = tuple(int(i) for i in np.unravel_index(int(np.argmax(ratio)), ratio.shape))
        finding = replace(
            template,
            tensor=tensor,
            error_ratio=float(ratio[worst]),
            error=float(error[worst]),
            allowed=float(limit[worst]),
            position=worst,
            got=float(value[worst]),
            expected=float(expected[tensor][worst]),
            rounded_to=dtypes[tensor] if rounded and is_rounded(dtypes[tensor]) else "",
        )
        if finding.failed:
            row.failures.append(finding)
        if row.worst is None or finding.error_ratio > row.worst.error_ratio:
            row.worst = finding
    return ratios


def add_lower(
    row: Row,
    lower: Mapping[str, Mapping[str, Floats]],
    expected: Mapping[str, Floats],
    allowed: Mapping[str, Floats],
    dtypes: Mapping[str, str],
    rounded: bool = False,
) -> None:
    """Compare results of lower arithmetics as `add_findings` does, and count in the row those that would have failed.

    Args:
        lower: from `loss_core.losses.lower.lower_results`.
        dtypes: of the results to compare, by name.
    """
    errors_of = errors_before_rounding if rounded else errors_as_stored
    for name, results in lower.items():
        fails = any(np.any(errors_of(results[t], expected[t], allowed[t], dtypes[t]).ratio > 1) for t in dtypes)
        row.lower[name] = row.lower.get(name, 0) + fails
