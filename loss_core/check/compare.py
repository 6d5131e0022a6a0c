"""Compare two implementations of any loss without a definition of it, such as a port of a user's own loss.

The reference is the first implementation run in float64; the rounding error that is allowed is estimated from it
(`loss_core.losses.bounds.sensitivity`). The two float64 results must agree too: that detects a wrong formula however
coarse the dtype is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.check.findings import add_findings
from loss_core.check.report import Finding, Report, Row, framework_version
from loss_core.dispatch.flags import load_backend, parse_flag
from loss_core.dispatch.protocol import Evaluation
from loss_core.dtypes import compute_format, float_format, round_to
from loss_core.losses.bounds.sensitivity import Sensitivity

Floats = NDArray[np.float64]


def compare(
    fn_torch: Callable[..., Any],
    fn_jax: Callable[..., Any],
    inputs: Mapping[str, NDArray[Any]],
    *,
    dtype: str = "float32",
    arithmetic: str | None = None,
    grad_of: Sequence[str] | None = None,
    upstream: NDArray[Any] | None = None,
    frameworks: tuple[str, str] = ("torch", "jax"),
    seed: int = 0,
) -> Report:
    """Compare value and gradients of two callables on the same inputs.

    Args:
        fn_torch: accepts the inputs as keyword arguments, as torch tensors, and returns one tensor. It must also run
            in float64.
        fn_jax: the same with JAX arrays.
        inputs: NumPy arrays by argument name; floating ones are rounded to dtype first.
        dtype: of the floating inputs: "float32", "bfloat16", "float16" or "float64".
        arithmetic: dtype of the callables' internal arithmetic; None: float32 (float64 for float64).
        grad_of: arguments to differentiate; None: all floating ones.
        upstream: upstream gradient of the result; None for ones.
        frameworks: of the two callables, so that two of the same framework can be compared as well.
        seed: of the perturbations from which the sensitivity is estimated.
    Returns:
        A Report with four rows: each callable against float64, one against the other, and both in float64.
    Raises:
        ValueError: for names and dtypes that don't exist. Errors of the callables pass through.
    """
    start = time.perf_counter()
    fmt = float_format(dtype)
    internal = float_format(arithmetic) if arithmetic else compute_format(dtype)
    arrays = {name: np.asarray(value) for name, value in inputs.items()}
    floats = [name for name, value in arrays.items() if value.dtype.kind == "f"]
    wanted = tuple(floats if grad_of is None else grad_of)
    unknown = [name for name in wanted if name not in floats]
    if unknown:
        raise ValueError(f"grad_of names {unknown}, which are no floating-point inputs; these are: {floats}.")
    rounded = {name: round_to(value, dtype) if name in floats else value for name, value in arrays.items()}
    functions = (fn_torch, fn_jax)
    labels = _labels(frameworks)

    def run(which: int, values: Mapping[str, NDArray[Any]], kind: str) -> Evaluation:
        backend = load_backend(parse_flag(frameworks[which]).backend)
        return backend.evaluate(functions[which], values, dtype=kind, upstream=upstream, grad_of=wanted)

    sensitivity = Sensitivity(lambda values: _results(run(0, values, "float64")), rounded, floats, internal.u, seed)
    reference, second = sensitivity.reference, _results(run(1, rounded, "float64"))
    report = Report(versions={name: framework_version(name) for name in dict.fromkeys(frameworks)})
    names = [getattr(fn, "__name__", type(fn).__name__) for fn in functions]
    both = names[0] if names[0] == names[1] else f"{names[0]}, {names[1]}"
    got = [_results(run(which, rounded, dtype)) for which in (0, 1)]
    double = float_format("float64")
    allowed = sensitivity.allowed(internal.u, dict.fromkeys(reference, fmt))
    # Between two computed results, each may be off by its own allowance.
    twice = {name: 2 * value for name, value in allowed.items()}
    in_float64 = sensitivity.allowed(double.u, dict.fromkeys(reference, double))
    pairs = [
        (names[0], labels[0], "float64", dtype, got[0], reference, allowed),
        (names[1], labels[1], "float64", dtype, got[1], reference, allowed),
        (both, labels[0], labels[1], dtype, got[0], got[1], twice),
        (both, labels[1], labels[0], "float64", second, reference, {n: 2 * x for n, x in in_float64.items()}),
    ]
    for loss, flag, against, kind, values, expected, limits in pairs:
        row = Row(loss, flag, against, kind, cases=1)
        template = Finding(loss=loss, flag=flag, against=against, dtype=kind, case="inputs")
        add_findings(row, template, values, expected, limits, dict.fromkeys(values, kind))
        report.rows.append(row)
    report.seconds = time.perf_counter() - start
    return report


def _labels(frameworks: tuple[str, str]) -> tuple[str, str]:
    if frameworks[0] != frameworks[1]:
        return frameworks
    return (f"{frameworks[0]} (1st)", f"{frameworks[1]} (2nd)")


def _results(got: Evaluation) -> dict[str, Floats]:
    return {"loss": got.loss, **got.grads}
