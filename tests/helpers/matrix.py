"""The matrix: every flag x loss x case x dtype against float64, each cell a test with its own id.

A new config, kernel, case or dtype is picked up by itself. Ids such as "torch:eager-KDLoss-ragged-bfloat16".

Each case runs half of the dtypes, alternating, or one of them if it takes long; the rest is marked slow. `make check`,
which CI runs as well, covers every loss and case in float32, and in bfloat16 on the flags of torch that do not compile;
those that compile have the other dtypes here. Triton's kernels, of which `make check` has none without a GPU, have
float32 and bfloat16 here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest

from loss_core import LOSS_CONFIG_REGISTRY, BackendUnavailable
from loss_core.check import DTYPES, check
from loss_core.dispatch.flags import COMPILED_AT_FIRST_CALL, all_flags, flag_status
from loss_core.losses.cases.drawing import named_cases

INTERPRETED = ("float32", "bfloat16")
COMPILED = {"torch": ("bfloat16", "float16", "float64"), "jax": ("bfloat16", "float16", "float64")}


def cells(backend: str, *, interpreted: Sequence[str] = ()) -> Any:
    """Parametrise a test over (flag, loss, case, dtype).

    Args:
        backend: "torch" or "jax".
        interpreted: flags whose cells run in another process, in which they are usable.
    """
    made = []
    for flag in all_flags():
        if not flag.startswith(f"{backend}:") or not (flag in interpreted or flag_status(flag).usable):
            continue
        # Those that compile at the first call do so for each kind of input: minutes over all cells.
        slow = flag in COMPILED_AT_FIRST_CALL
        compiled = COMPILED[backend] if backend == "jax" or slow else DTYPES
        dtypes = INTERPRETED if flag in interpreted else compiled
        for number, (loss, case, tokens) in enumerate(_cases()):
            if dtypes is not DTYPES and loss == "TEParallelCrossEntropy":
                # The same code as MaskedCrossEntropy.
                continue
            if flag in interpreted and tokens > 100:
                # Blocks of tokens: tests of the kernels have small ones.
                continue
            if not (flag in interpreted or _serves(flag, loss)):
                continue
            turns = 2 if dtypes is DTYPES else len(dtypes)
            for turn, dtype in enumerate(dtypes):
                later = slow or (number + turn) % turns != 0
                marks = [pytest.mark.slow] if later else []
                made.append(pytest.param(flag, loss, case, dtype, id=f"{flag}-{loss}-{case}-{dtype}", marks=marks))
    return pytest.mark.parametrize(("flag", "loss", "case", "dtype"), made)


def assert_agrees(flag: str, loss: str, case: str, dtype: str, shape: tuple[int, ...] | None = None) -> None:
    """One cell: loss and gradients within the allowance, by the kernel that the flag names.

    Args:
        shape: (T, V) instead of the shape of the case, unless the case is about its shape.
    """
    if shape is not None and not named_cases(loss, shape=shape, only=(case,)):
        shape = None
    report = check(loss, [flag], dtypes=[dtype], only=[case], shape=shape)
    assert report.passed, "\n".join(str(finding) for finding in report.failures)
    assert not report.skipped
    assert [(row.flag, row.dtype, row.cases) for row in report.rows] == [(flag, dtype, 1)]


@functools.cache
def _cases() -> tuple[tuple[str, str, int], ...]:
    """(loss, case, number of tokens) of every named case."""
    return tuple(
        (loss, case.name, case.arrays["labels"].size) for loss in LOSS_CONFIG_REGISTRY for case in named_cases(loss)
    )


@functools.cache
def _serves(flag: str, loss: str) -> bool:
    try:
        LOSS_CONFIG_REGISTRY[loss]().build(backend=flag)
    except BackendUnavailable:
        return False
    return True
