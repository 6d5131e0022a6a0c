"""Checks of every loss, backend flag, dtype and case against a float64 oracle, and of backends against each other.

>>> from loss_core.check import check
>>> report = check("MaskedCrossEntropy", ["torch:eager"], dtypes=["float32"])  # doctest: +SKIP
>>> report.passed  # doctest: +SKIP
True
"""

from loss_core.check.compare import compare
from loss_core.check.invariance.batches import check_invariance
from loss_core.check.report import HISTOGRAM_EDGES, Finding, Interrupted, Report, Row, Verdict
from loss_core.check.run import DTYPES, assert_backends_agree, check

__all__ = [
    "DTYPES",
    "HISTOGRAM_EDGES",
    "Finding",
    "Interrupted",
    "Report",
    "Row",
    "Verdict",
    "assert_backends_agree",
    "check",
    "check_invariance",
    "compare",
]
