"""Batch invariance: whether a token's loss and gradient depend, in any bit, on the other tokens of a call.

One batch is drawn for each loss, dtype and shape. Its tokens are then evaluated again one at a time, in halves, in
another order, among other tokens and between ignored ones, and with another chunk size where the config has a field
for it. The loss of each token and its row of each gradient are compared. The gradient of a weight is a sum over
tokens, which depends on all of them, and is not compared.
"""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loss_core.check.calls import chosen_losses, config_of, config_option, distinct_names
from loss_core.check.invariance.report import InvarianceReport, InvarianceRow
from loss_core.dispatch.flags import COMPILED_AT_FIRST_CALL, all_flags, flag_status, load_backend, parse_flag
from loss_core.dispatch.protocol import BackendUnavailable, Evaluation
from loss_core.dtypes import FORMATS, float_format, ordered, round_to
from loss_core.loss_config import LossConfig
from loss_core.losses.bounds.rounding import result_dtype
from loss_core.losses.cases.drawing import Case, make_case
from loss_core.losses.definition import LossDef, Recipe, need_definition

DTYPES = ("float32", "bfloat16")

# Rows of V = 507 are no multiple of a vector, so they begin and end between two of them. Rows of V = 504 are multiples
# of 16 bytes in every dtype: some kernels are batch-invariant for such rows only.
SHAPES = ((24, 507, 24), (24, 504, 24))

# Config fields that bound the tokens of a block.
_CHUNK_FIELDS = ("chunk_size", "chunk_len")

# Factor of one inserted token's logits, for kernels that choose a formula by the largest value of a block.
_HUGE = 2.0**22


class Batch(NamedTuple):
    """A call with some of the tokens of the full batch.

    Attributes:
        name: how it differs from the full batch.
        config: that of the full batch, except for a chunk size.
        arrays, upstream: as in `Case`, rounded to the dtype.
        rows: indices of the compared tokens in this call; tokens: their indices in the full batch.
    """

    name: str
    config: Any
    arrays: dict[str, NDArray[Any]]
    upstream: NDArray[np.float64] | None
    rows: NDArray[np.int64]
    tokens: NDArray[np.int64]


def check_invariance(
    config: str | LossConfig | Sequence[str | LossConfig] | None = None,
    backends: Sequence[str] | None = None,
    *,
    dtypes: Sequence[str] | None = None,
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
    device: str | None = None,
    reproduce_options: str = "",
) -> InvarianceReport:
    """Check that a token's loss and its rows of the gradients do not depend on the rest of the call, bitwise.

    Losses are computed with reduction="none" where the config has it. A loss that is always reduced is called with a
    count, so that a token's gradient does not depend on the number of tokens, and only its gradients are compared.

    Args:
        config: as in `check`; a config keeps its fields, except for the reduction and the chunk size.
        backends: flags, of which unusable ones are skipped; None for every usable flag except torch:compile.
        dtypes: of the inputs; None for float32 and bfloat16.
        shape: (T, V) or (T, V, H); None for `SHAPES`.
        seed: of the batch.
        device: such as "cuda"; None for each backend's default.
        reproduce_options: further options of reproduce lines.
    Returns:
        A report. It fails if a call raises, or if a flag that promises invariance for such a call violates it.
    Raises:
        ValueError, TypeError: for unknown flags, losses, dtypes and shapes.
    """
    report = InvarianceReport()
    losses, flags = chosen_losses(config), _flags(backends)
    for dtype in dtypes or ():
        float_format(dtype)
    if shape is not None and not (len(shape) in (2, 3) and all(n >= 1 for n in shape)):
        raise ValueError(f"shape must be (T, V) or (T, V, H) with sizes >= 1, got {tuple(shape)}.")
    options = f" --seed {seed}" if seed else ""
    options += f" --device {device}" if device else ""
    for loss, name in zip(losses, distinct_names(losses), strict=True):
        config = config_of(loss)
        if (problem := _batch_dependence(config)) is not None:
            report.skipped.append(f"{name}: {problem}")
            continue
        for dtype in dtypes or DTYPES:
            for sizes in [shape] if shape is not None else SHAPES:
                case = _draw(config, sizes, seed)
                sizes_text = ",".join(map(str, sizes))
                for flag in flags:
                    suffix = f"--shape {sizes_text}{options}{reproduce_options}"
                    row = InvarianceRow(name, flag, dtype, sizes_text, reproduce=_reproduce(loss, flag, dtype, suffix))
                    try:
                        _check_row(row, case, sizes, device)
                    except BackendUnavailable as error:
                        report.skip(f"{name} {flag}: {error}")
                        continue
                    except Exception as error:  # a kernel that raises is a finding, not the end of the check
                        row.problem = f"{type(error).__name__}: {error}"
                    report.rows.append(row)
    if not report.rows and not report.skipped:
        raise ValueError("Nothing to check: no flag can be used here.")
    return report


def _flags(backends: Sequence[str] | None) -> list[str]:
    if backends is not None:
        return list(dict.fromkeys(str(parse_flag(flag)) for flag in backends))
    named = [flag for flag in all_flags() if flag not in COMPILED_AT_FIRST_CALL]
    return [flag for flag in named if flag_status(flag).usable]


def _batch_dependence(config: LossConfig) -> str | None:
    """Why a token's gradient depends on the batch by definition of the loss; None where it does not."""
    definition = need_definition(config)
    if _has(config, "reduction") or definition.reduction(config) != "mean" or definition.find("count") is not None:
        return None
    return "its mean is over the tokens of the call, so a token's gradient depends on how many there are"


def _draw(config: LossConfig, sizes: tuple[int, ...], seed: int) -> Case:
    """Draw the full batch, without ignored tokens."""
    definition = need_definition(config)
    config = replace(config, reduction="none") if _has(config, "reduction") else config
    extras = ("upstream",) if definition.reduction(config) == "none" else ("count",)
    hidden = sizes[2] if len(sizes) > 2 else Recipe.hidden
    recipe = Recipe("invariance", "", lead=sizes[:1], vocab=sizes[1], hidden=hidden, ignored=0.0, extras=extras)
    return make_case(recipe, config, seed)


def _has(config: LossConfig, name: str) -> bool:
    return name in {f.name for f in fields(config)}


def _check_row(row: InvarianceRow, case: Case, sizes: tuple[int, ...], device: str | None) -> None:
    """Evaluate the full batch and each of the others, and record the differences in the row."""
    definition, flag = need_definition(case.config), parse_flag(row.flag)
    backend = load_backend(flag.backend)
    full, *others = _batches(case, row.dtype)

    def evaluate(batch: Batch) -> Evaluation:
        loss = batch.config.build(backend=row.flag)
        return backend.evaluate(
            loss, batch.arrays, dtype=row.dtype, upstream=batch.upstream, grad_of=case.grad_of, device=device
        )

    first = evaluate(full)
    # No promise for fused losses, whose products run in vendor kernels that depend on the number of rows, nor for
    # user-defined losses in which none of our kernels ran.
    ours = not definition.products and first.kernel == row.flag
    row.promised = ours and backend.batch_invariant(flag.kernel, sizes[1] * FORMATS[row.dtype].itemsize)
    expected = _rows_of(first, definition, full.tokens)
    for batch in others:
        found = evaluate(batch)
        for tensor, values in _rows_of(found, definition, batch.rows).items():
            a, b = (ordered(x, found.dtypes[tensor]) for x in (values, expected[tensor][batch.tokens]))
            row.add(tensor, batch.name, a.reshape(len(a), -1), b.reshape(len(b), -1))


def _rows_of(found: Evaluation, definition: LossDef, rows: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """These rows of the results to compare [tokens, ...]: per-token losses, unless reduced, and gradients."""
    by_token = {a.name for a in definition.arguments if a.dims[:1] == ("T",)}
    grads = {name: grad[rows] for name, grad in found.grads.items() if name in by_token}
    # Several results per token are stacked along the first dimension.
    return grads if found.loss.ndim == 0 else {"loss": np.moveaxis(found.loss, -1, 0)[rows], **grads}


def _batches(case: Case, dtype: str) -> Iterator[Batch]:
    """The full batch, then batches that contain its tokens in other surroundings."""
    definition, rng = need_definition(case.config), np.random.default_rng(1)
    by_token = [a for a in definition.arguments if a.dims[:1] == ("T",) and a.name in case.arrays]
    num_tokens = len(case.arrays["labels"])
    every, half = np.arange(num_tokens), num_tokens // 2
    upstream = None if case.upstream is None else round_to(case.upstream, result_dtype(case.config, dtype))
    arrays = {name: round_to(x, dtype) if x.dtype.kind == "f" else x for name, x in case.arrays.items()}

    def batch(name: str, order: NDArray[np.int64], compared: NDArray[np.bool_] | None = None) -> Batch:
        rows = np.arange(len(order)) if compared is None else np.flatnonzero(compared)
        gathered = arrays | {a.name: arrays[a.name][order] for a in by_token}
        return Batch(name, case.config, gathered, None if upstream is None else upstream[..., order], rows, order[rows])

    yield batch("the full batch", every)
    for token in dict.fromkeys([0, half, num_tokens - 1]):
        yield batch(f"token {token} alone", every[token : token + 1])
    if half:
        yield batch("the first half", every[:half])
        yield batch("the second half", every[half:])
    yield batch("in another order", rng.permutation(num_tokens))

    # Each token after an inserted one that is not compared.
    among = batch("among other tokens", np.repeat(every, 2), np.arange(2 * num_tokens) % 2 == 1)
    others = np.setdiff1d(np.arange(2 * num_tokens), among.rows)
    for argument in by_token:
        if argument.kind == "float":
            among.arrays[argument.name] = _other_rows(among.arrays[argument.name], others, argument.dims, dtype)
    yield among

    between = batch("between ignored tokens", np.repeat(every, 2), np.arange(2 * num_tokens) % 2 == 1)
    between.arrays["labels"][others] = getattr(case.config, "ignore_index", -100)
    for argument in by_token:
        if argument.kind == "float":
            between.arrays[argument.name][others] = np.nan
    yield between

    for name in (name for name in _CHUNK_FIELDS if _has(case.config, name)):
        size = max(num_tokens // 3, 1)
        yield batch(f"with {name}={size}", every)._replace(config=replace(case.config, **{name: size}))


def _other_rows(
    values: NDArray[np.float64], others: NDArray[np.int64], dims: tuple[str, ...], dtype: str
) -> NDArray[np.float64]:
    """The values with the rows `others` reversed, the first of them huge, and logits of the second -inf but for one."""
    values = values.copy()
    values[others] = values[others][::-1]
    values[others[0]] = round_to(values[others[0]] * min(_HUGE, FORMATS[dtype].max / 64), dtype)
    if dims == ("T", "V") and len(others) > 1:
        values[others[1], 1:] = -np.inf
    return values


def _reproduce(loss: str | LossConfig, flag: str, dtype: str, suffix: str) -> str:
    """The command that runs this row alone; a line of Python for a config class that is not registered."""
    if (config := config_option(loss)) is None:
        return f"check_invariance({loss!r}, [{flag!r}], dtypes=[{dtype!r}])"
    return f"loss-core check --invariance --config {config} --backend {flag} --dtype {dtype} {suffix}"
