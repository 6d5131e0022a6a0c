"""The benchmark: every flag and every baseline on the same inputs, beside the roofline and beside float64.

Each implementation runs in a process of its own that lives through all rounds; one process works at a time, and
every round asks them in a new random order, because a fixed one makes identical code differ.

>>> from loss_core.bench import bench
>>> report = bench("KDLoss", ["torch:eager"], shapes=[(64, 1000)], rounds=3)  # doctest: +SKIP
>>> report.rows[0].implementation  # doctest: +SKIP
'roofline'
"""

from loss_core.bench.report import BenchReport, BenchRow
from loss_core.bench.run import bench

__all__ = ["BenchReport", "BenchRow", "bench"]
