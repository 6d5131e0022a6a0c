"""Batch invariance: whether a token's loss and gradient depend, in any bit, on the other tokens of a call.

One batch is drawn for each loss, dtype and shape. Its tokens are then evaluated again alone, in halves, in another
order, among other tokens and between ignored ones, and with another chunk size where the config has a field for it.
Compared are the loss of each token and its row of each gradient. The gradient of a weight is a sum over tokens, which
depends on all of them, and is not compared.
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

# V = 507 is no multiple of a vector, so that rows begin and end between two of them. V = 504 is one of 16 bytes in
# every dtype: some kernels keep their promise for such rows alone.
SHAPES = ((24, 507, 24), (24, 504, 24))

# Config fields that bound the tokens of a block.
_CHUNK_FIELDS = ("chunk_size", "chunk_len")

# A token among the others whose logits have this factor: kernels that choose a formula by the largest value of a block
# choose another one beside it.
_HUGE = 2.0**22


class Batch(NamedTuple):
    """A call with some of the tokens of the whole batch.

    Attributes:
        name: how it differs from the whole batch.
        config: that of the whole batch, but for a chunk size.
        arrays, upstream: as in `Case`, rounded to the dtype.
        places: where the compared tokens are in this call; tokens: where they are in the whole batch.
    """

    name: str
    config: Any
    arrays: dict[str, NDArray[Any]]
    upstream: NDArray[np.float64] | None
    places: NDArray[np.int64]
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
    count, so that a token's gradient does not depend on how many there are, and its gradients alone are compared.

    Args:
        config: as of `check`; a config keeps its fields, but for the reduction and the chunk size.
        backends: flags; None for every flag that can be used here but torch:compile.
        dtypes: of the inputs; None for float32 and bfloat16.
        shape: (T, V) or (T, V, H); None for `SHAPES`.
        seed: of the batch.
        device: such as "cuda"; None for each backend's default.
        reproduce_options: what reproduce lines need besides.
    Returns:
        A report. It fails where a flag that promises invariance for such a call does not have it, or raises.
    Raises:
        BackendUnavailable, ValueError, TypeError: for flags, names, dtypes and shapes that don't exist.
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
        if (problem := _scale_depends(config)) is not None:
            report.skipped.append(f"{name}: {problem}")
            continue
        for dtype in dtypes or DTYPES:
            for sizes in [shape] if shape is not None else SHAPES:
                case = _draw(config, sizes, seed)
                words = ",".join(map(str, sizes))
                for flag in flags:
                    suffix = f"--shape {words}{options}{reproduce_options}"
                    row = InvarianceRow(name, flag, dtype, words, reproduce=_reproduce(loss, flag, dtype, suffix))
                    try:
                        _check_row(row, case, sizes, device)
                    except BackendUnavailable as error:
                        report.skip(f"{name} {flag}: {error}")
                        continue
                    except Exception as error:  # a kernel that breaks is a finding, not the end of the check
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


def _scale_depends(config: LossConfig) -> str | None:
    """Why a token's gradient can't be the same in every batch, whatever computes it; None where it can."""
    definition = need_definition(config)
    if _has(config, "reduction") or definition.reduction(config) != "mean" or definition.find("count") is not None:
        return None
    return "its mean is over the tokens of the call, so that a token's gradient depends on how many there are"


def _draw(config: LossConfig, sizes: tuple[int, ...], seed: int) -> Case:
    """The whole batch, of which no token is ignored."""
    definition = need_definition(config)
    config = replace(config, reduction="none") if _has(config, "reduction") else config
    extras = ("upstream",) if definition.reduction(config) == "none" else ("count",)
    hidden = sizes[2] if len(sizes) > 2 else Recipe.hidden
    recipe = Recipe("invariance", "", lead=sizes[:1], vocab=sizes[1], hidden=hidden, ignored=0.0, extras=extras)
    return make_case(recipe, config, seed)


def _has(config: LossConfig, name: str) -> bool:
    return name in {f.name for f in fields(config)}


def _check_row(row: InvarianceRow, case: Case, sizes: tuple[int, ...], device: str | None) -> None:
    """Evaluate the whole batch and each of the others, and enter what differs."""
    definition, flag = need_definition(case.config), parse_flag(row.flag)
    backend = load_backend(flag.backend)
    whole, *others = _batches(case, row.dtype)

    def evaluate(batch: Batch) -> Evaluation:
        loss = batch.config.build(backend=row.flag)
        return backend.evaluate(
            loss, batch.arrays, dtype=row.dtype, upstream=batch.upstream, grad_of=case.grad_of, device=device
        )

    first = evaluate(whole)
    # The products of a fused loss are the vendor's, whose kernels differ by the number of rows; and another's loss of
    # whatever flag, in which none of our kernels ran, promises nothing.
    ours = not definition.products and first.kernel == row.flag
    row.promised = ours and backend.batch_invariant(flag.kernel, sizes[1] * FORMATS[row.dtype].itemsize)
    expected = _rows(first, definition, whole.tokens)
    for batch in others:
        found = evaluate(batch)
        for tensor, values in _rows(found, definition, batch.places).items():
            a, b = (ordered(x, found.dtypes[tensor]) for x in (values, expected[tensor][batch.tokens]))
            row.add(tensor, batch.name, a.reshape(len(a), -1), b.reshape(len(b), -1))


def _rows(found: Evaluation, definition: LossDef, places: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """What is compared, [tokens, ...]: the loss of each token where it has one, and its row of each gradient."""
    by_token = {a.name for a in definition.arguments if a.dims[:1] == ("T",)}
    rows = {name: grad[places] for name, grad in found.grads.items() if name in by_token}
    # Results of several are stacked in front.
    return rows if found.loss.ndim == 0 else {"loss": np.moveaxis(found.loss, -1, 0)[places], **rows}


def _batches(case: Case, dtype: str) -> Iterator[Batch]:
    """The whole batch, then those that hold its tokens again."""
    definition, rng = need_definition(case.config), np.random.default_rng(1)
    by_token = [a for a in definition.arguments if a.dims[:1] == ("T",) and a.name in case.arrays]
    num_tokens = len(case.arrays["labels"])
    every, half = np.arange(num_tokens), num_tokens // 2
    upstream = None if case.upstream is None else round_to(case.upstream, result_dtype(case.config, dtype))
    arrays = {name: round_to(x, dtype) if x.dtype.kind == "f" else x for name, x in case.arrays.items()}

    def batch(name: str, order: NDArray[np.int64], compared: NDArray[np.bool_] | None = None) -> Batch:
        places = np.arange(len(order)) if compared is None else np.flatnonzero(compared)
        taken = arrays | {a.name: arrays[a.name][order] for a in by_token}
        return Batch(
            name, case.config, taken, None if upstream is None else upstream[..., order], places, order[places]
        )

    yield batch("the whole batch", every)
    for token in dict.fromkeys([0, half, num_tokens - 1]):
        yield batch(f"token {token} alone", every[token : token + 1])
    if half:
        yield batch("the first half", every[:half])
        yield batch("the second half", every[half:])
    yield batch("in another order", rng.permutation(num_tokens))

    # Each token, behind one that is not compared.
    among = batch("among other tokens", np.repeat(every, 2), np.arange(2 * num_tokens) % 2 == 1)
    others = np.setdiff1d(np.arange(2 * num_tokens), among.places)
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
    """The values with rows turned round, the first of which is huge, and in logits the second almost ruled out."""
    values = values.copy()
    values[others] = values[others][::-1]
    values[others[0]] = round_to(values[others[0]] * min(_HUGE, FORMATS[dtype].max / 64), dtype)
    if dims == ("T", "V") and len(others) > 1:
        values[others[1], 1:] = -np.inf
    return values


def _reproduce(loss: str | LossConfig, flag: str, dtype: str, suffix: str) -> str:
    """The command that checks this alone; a line of Python for a class that no registry knows."""
    if (config := config_option(loss)) is None:
        return f"check_invariance({loss!r}, [{flag!r}], dtypes=[{dtype!r}])"
    return f"loss-core check --invariance --config {config} --backend {flag} --dtype {dtype} {suffix}"
