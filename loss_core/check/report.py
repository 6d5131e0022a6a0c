"""The results of a check: findings, rows of the table, verdicts on clauses, and the report with all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.dispatch.flags import all_flags, load_backend, parse_flag
from loss_core.dispatch.protocol import FlagStatus

Floats = NDArray[np.float64]

# Edges of the histogram of errors, as powers of ten of the error ratio.
HISTOGRAM_EDGES = np.linspace(-6, 2, 33)


@dataclass(frozen=True)
class Finding:
    """The largest error of one tensor, which may be a failure, or another kind of failure.

    Attributes:
        loss, flag, against, dtype, case: what was run; against is "float64" or another flag.
        tensor: "loss", or the argument whose gradient was compared.
        error_ratio: error over allowance; above 1 is a failure.
        error, allowed, got, expected: at the worst position.
        position: index of the worst element.
        rounded_to: dtype of the rounding that followed the error; "" where the stored values were compared.
        condition: condition number of the loss in this call, see `loss_core.losses.bounds.sensitivity`; NaN where it
            is undefined.
        problem: a failure that is no numerical error (wrong dtype, mutated input, exception), else "".
        reproduce: command that runs this case alone.
    """

    loss: str
    flag: str
    against: str
    dtype: str
    case: str
    tensor: str = ""
    error_ratio: float = float("inf")
    error: float = float("nan")
    allowed: float = float("nan")
    position: tuple[int, ...] = ()
    got: float = float("nan")
    expected: float = float("nan")
    problem: str = ""
    reproduce: str = ""
    rounded_to: str = ""
    condition: float = float("nan")

    @property
    def failed(self) -> bool:
        return bool(self.problem) or not self.error_ratio <= 1.0

    @property
    def where(self) -> str:
        """The tensor and the position in it, such as `logits[0][3]`."""
        return self.tensor + "".join(f"[{i}]" for i in self.position)

    @property
    def what(self) -> str:
        """Description of the error."""
        if self.problem:
            return self.problem
        before = f" before it was rounded to {self.rounded_to}" if self.rounded_to else ""
        return (
            f"{self.got:.9g} where {self.expected:.9g} was expected; error {self.error:.3g}{before} is "
            f"{self.error_ratio:.3g} times the allowance of {self.allowed:.3g}"
        )

    def __str__(self) -> str:
        run = f"{self.loss} {self.flag} against {self.against}, {self.dtype}, case {self.case}"
        again = f"\n  {self.reproduce}" if self.reproduce else ""
        return f"{run}, {self.where}: {self.what}{again}"


@dataclass
class Row:
    """One line of the table: all cases of one loss, flag and dtype.

    Attributes:
        worst: the finding with the largest error ratio; None when nothing was run.
        cases: count of cases that were run; failures: findings that failed.
        finds: for each tensor, the smallest relative error common to all its elements that would have failed; tensors
            that are 0 everywhere have no entry.
        lower: for each lower arithmetic (`loss_core.losses.lower`), how many of the cases would have failed in it.
        harder: names of the cases that were added because all others would have passed such an arithmetic.
    """

    loss: str
    flag: str
    against: str
    dtype: str
    cases: int = 0
    worst: Finding | None = None
    failures: list[Finding] = field(default_factory=list)
    finds: dict[str, float] = field(default_factory=dict)
    lower: dict[str, int] = field(default_factory=dict)
    harder: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def insensitive(self) -> list[str]:
        """The lower arithmetics that would have passed in every case."""
        return [name for name, failed in self.lower.items() if not failed]

    @property
    def coarsest(self) -> float | None:
        """The smallest relative error that would have been detected in every tensor; None where all are 0."""
        return max(self.finds.values(), default=None)


@dataclass(frozen=True)
class Verdict:
    """The result of a check for one clause of the contract and one implementation of one loss.

    Attributes:
        asserts: what the clause requires.
        status: "ok"; "broken"; "unsupported", where every call raises before it returns a result; or "not seen", where
            no case can test the clause.
        calls: how many calls were judged.
        words: error messages of the calls that the implementation refuses, or why the clause could not be tested.
        findings: the violations.
    """

    implementation: str
    loss: str
    clause: str
    asserts: str
    status: str
    calls: int = 0
    words: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def worst(self) -> Finding | None:
        """The finding with the largest error ratio; one without a numerical error only if there is no other."""
        return max(self.findings, key=lambda f: -1.0 if f.problem else f.error_ratio, default=None)


@dataclass
class Report:
    """The results of a check.

    Attributes:
        rows: in the order of the table.
        verdicts: on implementations that were judged clause by clause.
        unusable: flags that can't be used here, with reasons.
        skipped: losses and flags that can't be combined, and flags that run only when named, with reasons.
        histograms: for each flag and dtype, counts of error ratios between HISTOGRAM_EDGES, with one bin below for
            smaller and exact ones, and one above.
        versions: of Python, NumPy and the frameworks.
        calls, total: how many calls were run, over all losses and dtypes, and how many were planned.
        next_first: index of the random case from which a stopped check can be continued; None where it can't be.
    """

    rows: list[Row] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    unusable: list[FlagStatus] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    histograms: dict[tuple[str, str], NDArray[np.int64]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    calls: int = 0
    total: int = 0
    next_first: int | None = None

    @property
    def stopped(self) -> bool:
        """Whether its time limit or Ctrl-C ended the check before all cases were run."""
        return self.calls < self.total

    @property
    def passed(self) -> bool:
        """Whether something was run and nothing failed."""
        ran = bool(self.rows) or any(verdict.calls for verdict in self.verdicts)
        return ran and all(row.passed for row in self.rows) and not self.broken

    @property
    def broken(self) -> list[Verdict]:
        """The verdicts on clauses that an implementation violates."""
        return [verdict for verdict in self.verdicts if verdict.status == "broken"]

    @property
    def failures(self) -> list[Finding]:
        of_rows = [finding for row in self.rows for finding in row.failures]
        return of_rows + [finding for verdict in self.broken for finding in verdict.findings]

    def count(self, flag: str, dtype: str, ratios: Sequence[Floats]) -> None:
        """Add error ratios to the histogram of a flag and dtype."""
        edges = np.concatenate([[-np.inf], HISTOGRAM_EDGES, [np.inf]])
        counts = self.histograms.setdefault((flag, dtype), np.zeros(len(edges) - 1, np.int64))
        for ratio in ratios:
            with np.errstate(divide="ignore"):
                logs = np.log10(ratio.reshape(-1))
            counts += np.histogram(np.clip(logs, -1e9, 1e9), bins=np.clip(edges, -2e9, 2e9))[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; infinities and NaN become strings."""
        return {
            "passed": self.passed,
            "seconds": round(self.seconds, 3),
            "calls": self.calls,
            "total": self.total,
            "next_first": self.next_first if self.stopped else None,
            "versions": self.versions,
            "rows": [
                _plain(asdict(row) | {name: getattr(row, name) for name in ("passed", "coarsest", "insensitive")})
                for row in self.rows
            ],
            "verdicts": [_plain(asdict(verdict)) for verdict in self.verdicts],
            "unusable": [asdict(status) for status in self.unusable],
            "skipped": self.skipped,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        lines = [
            f"{row.loss} {row.flag} against {row.against} {row.dtype}: {row.cases} cases"
            + (f" with {' and '.join(row.harder)}, " if row.harder else ", ")
            + (f"worst {row.worst.error_ratio:.3g} of the allowance ({row.worst.case}, {row.worst.tensor})"
               if row.worst else "nothing to compare") + ("" if row.passed else f", {len(row.failures)} FAILED")
            + (f", insensitive to {' and '.join(row.insensitive)}" if row.insensitive else "")
            for row in self.rows
        ]  # fmt: skip
        lines += [
            f"{v.implementation} {v.loss} {v.clause}: {v.status}" + (f" ({v.words[0]})" if v.words else "")
            for v in self.verdicts
        ]
        return "\n".join([*lines, *(str(finding) for finding in self.failures)])


class Interrupted(KeyboardInterrupt):
    """KeyboardInterrupt with the report of the calls that were completed."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value


def framework_version(backend: str) -> str:
    """Version of the framework behind a backend, such as "2.13.0"."""
    first = next(flag for flag in all_flags() if flag.startswith(f"{backend}:"))
    return load_backend(backend).kernel_status(parse_flag(first).kernel).version.partition(" ")[2]
