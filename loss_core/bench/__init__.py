"""The benchmark: every flag and every baseline on the same inputs, compared with the roofline and with float64.

Each implementation runs in a separate process that lives through all rounds. One process works at a time, and every
round has a new random order: in a fixed order, identical code has different times.

>>> from loss_core.bench import bench
>>> report = bench("KDLoss", ["torch:eager"], shapes=[(64, 1000)], rounds=3)  # doctest: +SKIP
>>> report.rows[0].implementation  # doctest: +SKIP
'roofline'
"""

from loss_core.bench.report import BenchReport, BenchRow
from loss_core.bench.run import bench

__all__ = ["BenchReport", "BenchRow", "bench"]
