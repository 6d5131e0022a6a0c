"""The results of `check --invariance`: rows of its table, and the report with all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class InvarianceRow:
    """One loss, flag, dtype and shape.

    Attributes:
        shape: "T,V,H".
        promised: whether the flag promises batch invariance for such a call.
        compared: rows that were compared, over all tensors and batches; differing: those that differ in any bit.
        ulps: largest difference, in units in the last place.
        tensor, batch: where the largest difference is: "loss" or the argument of the gradient, and the batch.
        problem: the error of a call that raised, else "".
        reproduce: command that runs this row alone.
    """

    loss: str
    flag: str
    dtype: str
    shape: str
    promised: bool = False
    compared: int = 0
    differing: int = 0
    ulps: int = 0
    tensor: str = ""
    batch: str = ""
    problem: str = ""
    reproduce: str = ""

    @property
    def holds(self) -> bool:
        return not self.problem and not self.differing

    @property
    def passed(self) -> bool:
        return self.holds or (not self.promised and not self.problem)

    @property
    def what(self) -> str:
        """The result as text."""
        if self.problem:
            return self.problem
        if self.holds:
            return "holds"
        of = "loss" if self.tensor == "loss" else f"gradient of {self.tensor}"
        return f"differs: {self.differing} of {self.compared} rows, by up to {self.ulps} ulp ({of}, {self.batch})"

    def add(self, tensor: str, batch: str, got: NDArray[np.int64], expected: NDArray[np.int64]) -> None:
        """Compare the rows of one tensor of one batch, [tokens, ...] as returned by `ordered`, and add the result."""
        self.compared += len(got)
        self.differing += int((got != expected).any(-1).sum())
        # The distance of two numbers of opposite signs may exceed the range of int64, but not that of uint64.
        apart = np.maximum(got, expected).astype(np.uint64) - np.minimum(got, expected).astype(np.uint64)
        if (most := int(apart.max(initial=0))) > self.ulps:
            self.ulps, self.tensor, self.batch = most, tensor, batch


@dataclass
class InvarianceReport:
    """The results of `check_invariance`.

    Attributes:
        rows: in the order of the table.
        skipped: losses and flags that can't be combined or checked, with reasons.
    """

    rows: list[InvarianceRow] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether something was run, nothing raised, and every promise was kept."""
        return bool(self.rows) and not self.failures

    @property
    def failures(self) -> list[InvarianceRow]:
        return [row for row in self.rows if not row.passed]

    def skip(self, note: str) -> None:
        """Add a note on what was not checked, unless it is there already."""
        if note not in self.skipped:
            self.skipped.append(note)

    def to_json(self) -> str:
        rows = [asdict(row) | {"holds": row.holds, "passed": row.passed} for row in self.rows]
        plain: dict[str, Any] = {"passed": self.passed, "rows": rows, "skipped": self.skipped}
        return json.dumps(plain, indent=1)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        """The table, skipped losses, failures with their commands, and the verdict."""
        cells = [
            ("" if row.passed and not row.promised else "ok" if row.passed else "FAIL", row.flag, row.dtype, row.shape,
             "promised" if row.promised else "-", row.what)
            for row in self.rows
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)][:-1] if cells else []
        for loss, group in groupby(zip(self.rows, cells, strict=True), key=lambda pair: pair[0].loss):
            yield loss
            for _, line in group:
                yield " ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]])
        if self.skipped:
            yield from ("", "Skipped:", *(f"  {note}" for note in self.skipped))
        for row in self.failures:
            yield from ("", f"FAILED {row.loss} {row.flag}, {row.dtype}: {row.what}", f"  {row.reproduce}")
        yield from ("", self._verdict())

    def _verdict(self) -> str:
        if not self.rows:
            return "NOTHING CHECKED: no loss could be run on any flag."
        promised = sum(row.promised for row in self.rows)
        others = [row for row in self.rows if not row.promised]
        rest = f"without a promise it holds in {sum(row.holds for row in others)} of {len(others)}"
        if self.failures:
            return f"FAIL: {len(self.failures)} of {len(self.rows)} rows; {rest}."
        return f"PASS: bitwise the same in all {promised} rows that promise it; {rest}."
