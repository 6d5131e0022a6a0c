"""The report of a benchmark: rows of measurements, and selections such as the fastest flag of a call."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from statistics import median
from typing import Any

# Kinds of rows.
ROOFLINE, FLAG, BASELINE = "roofline", "flag", "baseline"

# Names of a framework's plain implementation: on torch a flag, over ranks a baseline; on JAX a baseline.
PLAIN = ("torch:plain", "plain-torch", "plain-jax")

# Relative error beyond which a result is wrong: 16-bit arithmetic throughout stays below it. A wrong row is shown, but
# is neither a best baseline nor a choice of `--tune`. Smaller errors are shown beside the time.
WRONG = 0.05


@dataclass
class BenchRow:
    """One implementation on one call.

    Attributes:
        loss: display name of the config.
        implementation: flag, baseline's name, or "roofline".
        kind: "roofline", "flag" or "baseline".
        framework: "torch" or "jax".
        shape: (T, V) or (T, V, H).
        dtype: of the inputs.
        config: the loss, as returned by `LossConfig.to_dict`.
        ignored: share of labels that are ignore_index.
        rounds: seconds of one call, a median for each round; over ranks those of the slowest rank.
        calls: count of timed calls.
        peak: peak bytes above the inputs during a call, results included; over ranks the largest. None: not measured.
        gradients: bytes of the gradients among the results; None: not recorded.
        first_call: seconds of the first call, compilation included.
        loss_error: relative error of the loss against float64.
        grad_error: largest over the gradients of ||error|| / ||gradient||; None for forward only.
        error_ratio: largest error / allowance for rounding, as in `loss-core check`.
        error_shape: shape of the call that was compared with float64.
        note: what the implementation chose, or what the roofline counts.
        error: why there is no time.
    """

    loss: str
    implementation: str
    kind: str
    framework: str
    shape: tuple[int, ...]
    dtype: str
    config: dict[str, Any] = field(default_factory=dict)
    ignored: float = 0.0
    rounds: list[float] = field(default_factory=list)
    calls: int = 0
    peak: int | None = None
    gradients: int | None = None
    first_call: float | None = None
    loss_error: float | None = None
    grad_error: float | None = None
    error_ratio: float | None = None
    error_shape: tuple[int, ...] = ()
    note: str = ""
    error: str = ""

    @property
    def seconds(self) -> float | None:
        """Median over the rounds."""
        return median(self.rounds) if self.rounds else None

    @property
    def working(self) -> int | None:
        """Bytes of `peak` without the gradients: the working memory of the implementation."""
        return None if self.peak is None or self.gradients is None else max(self.peak - self.gradients, 0)

    @property
    def spread(self) -> float | None:
        """Largest relative deviation of a round from the median, without the extreme quarter at either end."""
        if not self.rounds or not self.seconds:
            return None
        ordered = sorted(self.rounds)
        cut = len(ordered) // 4
        kept = ordered[cut : len(ordered) - cut]
        return max(kept[-1] - self.seconds, self.seconds - kept[0]) / self.seconds

    @property
    def wrong(self) -> bool:
        """Whether the result is so far from float64 that its time is meaningless."""
        errors = [error for error in (self.loss_error, self.grad_error) if error is not None]
        return any(not error <= WRONG for error in errors)

    @property
    def group(self) -> tuple[str, tuple[int, ...], str, float]:
        """Key of the call: rows with the same key measured the same call."""
        return self.loss, tuple(self.shape), self.dtype, self.ignored


@dataclass(frozen=True)
class Missing:
    """A flag or baseline that was not measured, the reason, and the command that installs it."""

    name: str
    reason: str
    install: str = ""


@dataclass
class BenchReport:
    """Rows, and the conditions of their measurement.

    Attributes:
        rows: groups one after the other; the roofline is the first row of each.
        missing: flags, baselines and calls that could not be run here.
        settings: options of the run.
        versions: of this library, Python and the frameworks.
        machine: processor, accelerators, other processes.
        orders: for each group, the order of the implementations in each round.
        seconds: of the run.
        date: start of the run, ISO 8601.
        command: the command line; "" for a call of `bench`.
    """

    rows: list[BenchRow] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    orders: list[list[list[str]]] = field(default_factory=list)
    seconds: float = 0.0
    date: str = ""
    command: str = ""

    def groups(self) -> list[list[BenchRow]]:
        """Rows grouped by call."""
        return [list(rows) for _, rows in groupby(self.rows, key=lambda row: row.group)]

    def to_json(self) -> str:
        """The report as JSON text, which `from_json` reads."""
        rows = [
            {name: _json_value(value) for name, value in asdict(row).items()}
            | {"seconds": row.seconds, "spread": row.spread}
            for row in self.rows
        ]
        return json.dumps({**asdict(self), "rows": rows}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> BenchReport:
        """A report from `to_json`'s text.

        Raises:
            ValueError: if the text is no such report.
        """
        try:
            data = json.loads(text)
            rows = [_row_from_json(row) for row in data.pop("rows")]
            missing = [Missing(**entry) for entry in data.pop("missing")]
            return cls(rows=rows, missing=missing, **data)
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a report of loss-core bench: {error}") from error


def call_text(loss: str, shape: Iterable[int], dtype: str, ignored: float) -> str:
    """A call in one line: "KDLoss 64x1000 float32, 25% ignored"."""
    share = f", {share_text(ignored)} ignored" if ignored else ""
    return f"{loss} {'x'.join(map(str, shape))} {dtype}{share}"


def share_text(share: float) -> str:
    """A share of 0 to 1 as a percentage of up to four digits."""
    return f"{100 * share:.4g}%"


def _row_from_json(data: Mapping[str, Any]) -> BenchRow:
    # inf and NaN are written as strings.
    values: dict[str, Any] = {
        key: float(value) if key in ("loss_error", "grad_error", "error_ratio") and isinstance(value, str) else value
        for key, value in data.items()
        if key not in ("seconds", "spread")
    }
    return BenchRow(**{**values, "shape": tuple(values["shape"]), "error_shape": tuple(values["error_shape"])})


def _json_value(value: Any) -> Any:
    """inf and NaN as strings: JSON has neither."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def roofline_of(group: Iterable[BenchRow]) -> float | None:
    """Seconds of the roofline of a group."""
    return next((row.seconds for row in group if row.kind == ROOFLINE), None)


def plain_of(group: Iterable[BenchRow], framework: str) -> BenchRow | None:
    """The plain implementation of a group on a framework."""
    return _fastest(row for row in group if row.implementation in PLAIN and row.framework == framework)


def best_baseline_of(group: Iterable[BenchRow], framework: str) -> BenchRow | None:
    """The fastest baseline on a framework whose result is not wrong."""
    return _fastest(row for row in group if row.kind == BASELINE and row.framework == framework and not row.wrong)


def best_flag_of(group: Iterable[BenchRow], framework: str | None = None) -> BenchRow | None:
    """The fastest flag (on one framework) whose result is not wrong."""
    return _fastest(row for row in group if row.kind == FLAG and framework in (None, row.framework) and not row.wrong)


def _fastest(rows: Iterable[BenchRow]) -> BenchRow | None:
    return min((row for row in rows if row.seconds is not None), key=lambda row: row.seconds or 0.0, default=None)
