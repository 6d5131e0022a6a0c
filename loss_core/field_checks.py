"""Validation of config fields.

A check raises a ValueError that names field, value and what is accepted. Inside `accepted_values` it also records what
it accepts as JSON Schema keywords.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

REDUCTIONS = ("sum", "mean", "none")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
# Metrics of each token, and the number of valid tokens.
TOKEN_METRICS = ("accuracy", "entropy", "lse", "z_loss")
NUM_VALID = "num_valid"
METRICS = (*TOKEN_METRICS, NUM_VALID)

_INT64 = 2**63

# Field -> JSON Schema keywords, inside `accepted_values`.
_RECORDED: ContextVar[dict[str, dict[str, Any]] | None] = ContextVar("_RECORDED", default=None)


@contextmanager
def accepted_values() -> Iterator[dict[str, dict[str, Any]]]:
    """Record what checks accept inside this context: field -> JSON Schema keywords such as "enum", "minimum"."""
    recorded: dict[str, dict[str, Any]] = {}
    token = _RECORDED.set(recorded)
    try:
        yield recorded
    finally:
        _RECORDED.reset(token)


def _record(name: str, **keywords: Any) -> None:
    recorded = _RECORDED.get()
    if recorded is not None:
        recorded[name] = keywords


def check_reduction(name: str, value: object) -> None:
    """Require one of REDUCTIONS."""
    _record(name, enum=list(REDUCTIONS))
    if not isinstance(value, str) or value not in REDUCTIONS:
        raise ValueError(f"Invalid reduction: {value!r}. {name} must be one of {', '.join(map(repr, REDUCTIONS))}.")


def check_bool(name: str, value: object) -> None:
    """Require a Python bool; a NumPy bool is refused."""
    _record(name, type="boolean")
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}.")


def check_integer(name: str, value: object, low: int = -_INT64) -> None:
    """Require an integer >= `low` that fits 64 bits."""
    _record(name, type="integer", **({"minimum": low} if low > -_INT64 else {}))
    accepted = "an integer of 64 bits" if low == -_INT64 else f"an integer >= {low}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) < _INT64:
        raise ValueError(f"{name} must be {accepted}, got {value!r}.")


def check_number(name: str, value: object, accepted: str, *, zero: bool = False, below: float = math.inf) -> None:
    """Require a number in 2**-63 to 2**63 that is less than `below`, or 0 if `zero`."""
    _record(
        name,
        type="number",
        **({"minimum": 0} if zero else {"exclusiveMinimum": 0}),
        **({"exclusiveMaximum": below} if below < math.inf else {}),
    )
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        hint = " (a string: YAML reads 1e-3 as text, write 1.0e-3)" if isinstance(value, str) else ""
        raise ValueError(f"{name} must be {accepted}, got {value!r}{hint}.")
    if value < 0 or (value == 0 and not zero) or float(value) >= below:
        raise ValueError(f"{name} must be {accepted}, got {value!r}.")
    # Kernels compute its square and reciprocal in float32, whose normal range is 2**-126 to 2**127.
    if value != 0 and not 2.0**-63 <= float(value) <= 2.0**63:
        raise ValueError(f"{name} must be {accepted}, in 2**-63 to 2**63 (1.1e-19 to 9.2e18), got {value!r}.")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Require one of the choices."""
    _record(name, enum=list(choices))
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_metrics(value: object) -> tuple[str, ...]:
    """The names of metrics as a tuple.

    Raises:
        ValueError: not a list of names, or an unknown or repeated name.
    """
    _record("metrics", type="array", items={"enum": list(METRICS)}, uniqueItems=True)
    accepted = f"a list of names among {', '.join(map(repr, METRICS))}, each once"
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"metrics must be {accepted}, got {value!r}.")
    names = tuple(value)
    if any(name not in METRICS for name in names) or len(set(names)) < len(names):
        raise ValueError(f"metrics must be {accepted}, got {list(names)!r}.")
    return names


def check_fraction(name: str, value: object) -> None:
    """Require a number in [0, 1]."""
    _record(name, type="number", minimum=0, maximum=1)
    # NaN fails the comparison.
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}.")


_OFF_AT_0 = "a finite number >= 0 (0 is off)"

# Field -> its check, the same in every loss that has the field.
_CHECKS: Mapping[str, Callable[[str, object], None]] = {
    "reduction": check_reduction,
    "ignore_index": check_integer,
    "chunk_len": partial(check_integer, low=1),
    "chunk_size": partial(check_integer, low=0),
    "temperature": partial(check_number, accepted="a finite number > 0"),
    "logit_softcapping": partial(check_number, accepted=_OFF_AT_0, zero=True),
    "z_loss": partial(check_number, accepted=_OFF_AT_0, zero=True),
    "label_smoothing": partial(check_number, accepted="a number in [0, 1)", zero=True, below=1.0),
    "divergence": partial(check_choice, choices=DIVERGENCES),
    "beta": check_fraction,
    "compile": check_bool,
    "entropy": check_bool,
    "fp32_upcast": check_bool,
    "inplace_grad": check_bool,
    "sequence_parallel": check_bool,
    "tail": check_bool,
}


def check_fields(config: Any, *names: str) -> None:
    """Check the values of these fields of a config."""
    for name in names:
        _CHECKS[name](name, getattr(config, name))


def plain_value(value: Any) -> Any:
    """The value as YAML and JSON can store it: NumPy scalars as Python numbers, tuples as lists."""
    if isinstance(value, tuple):
        return list(value)
    return value.item() if type(value).__module__ == "numpy" and hasattr(value, "item") else value


def is_runtime_field(f: Any) -> bool:
    """Whether a dataclass field holds a runtime handle, such as a process group, rather than a value."""
    return not f.repr and not f.compare


def fields_of(config_cls: type[Any]) -> tuple[Any, ...]:
    """The fields of a dataclass; () for any other class."""
    return fields(config_cls) if is_dataclass(config_cls) else ()


# Fields of the same losses in NeMo AutoModel -> what to use here.
_REPLACEMENTS = {
    "impl": "The flag names the kernels: backend='torch:triton' for impl='cce', backend='torch:eager' for "
    "impl='torch_compile'.",
}


def check_known(config_cls: type[Any], values: Mapping[str, Any]) -> None:
    """Check that all names are fields of the class.

    Raises:
        TypeError: a name is not a field; says what to use instead, or names the closest field.
    """
    known = [f.name for f in fields_of(config_cls) if f.init]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            hint = f" {_REPLACEMENTS[name]}" if name in _REPLACEMENTS else hint
            raise TypeError(
                f"{config_cls.__name__} has no field {name!r}.{hint} Its fields are: {', '.join(known) or 'none'}."
            )
