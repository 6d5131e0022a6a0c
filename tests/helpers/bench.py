"""Rows and calls for the tests of the benchmark."""

from __future__ import annotations

from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig
from loss_core.bench.measure.job import Job
from loss_core.bench.report import FLAG, ROOFLINE, BenchReport, BenchRow

LOSSES = {
    "cross_entropy": MaskedCrossEntropyConfig(reduction="mean"),
    "linear_cross_entropy": FusedLinearCEConfig(reduction="mean", logit_softcapping=5.0),
    "distillation": KDLossConfig(temperature=2.0),
}


def job(loss: str, vocab: int, tp: int = 2, **more: object) -> Job:
    """A call of one of LOSSES, over two ranks."""
    shape = (24, vocab, 16) if loss == "linear_cross_entropy" else (24, vocab)
    return Job(LOSSES[loss].to_dict(), shape, "float32", ignored=0.25, tp=tp, **more)  # type: ignore[arg-type]


def row(name: str, seconds: float, kind: str = "", shape: tuple[int, ...] = (8, 10), **more: object) -> BenchRow:
    """A row of KDLoss with this time; its framework, and its kind unless given, follow from the name."""
    kind = kind or (ROOFLINE if name == ROOFLINE else FLAG)
    framework = "jax" if "jax" in name or name == "optax" else "torch"
    values = {"config": {"name": "KDLoss"}, "rounds": [seconds], **more}
    return BenchRow("KDLoss", name, kind, framework, shape, "float32", **values)  # type: ignore[arg-type]


def by_name(report: BenchReport) -> dict[str, BenchRow]:
    """The rows of a report with one call."""
    return {row.implementation: row for row in report.rows}
