"""The tokens of a training step, split into calls as in training loops, each divided by the count of the step.

Every registered loss is included; its definition has its arguments.
"""

# B = batch, S = sequence, T = B * S + 1 tokens, of which the last is padding; V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loss_core import LOSS_CONFIG_REGISTRY
from loss_core.losses import Sizes, allowances, definition_of, error_ratio, evaluate
from loss_core.losses.reduction import valid_tokens

B, S, V, H = 4, 8, 11, 5
INDICES = np.arange(B * S).reshape(B, S)
Arrays = Mapping[str, NDArray[Any]]
# (config, arrays, names of the arguments to differentiate, upstream gradient) -> "loss" and gradients in float64.
Call = Callable[[Any, Arrays, tuple[str, ...], float], Mapping[str, NDArray[np.float64]]]

# The same examples in every run, and no clock: JAX compiles in some of them.
repeatable = settings(max_examples=20, derandomize=True, deadline=None, database=None)


# Lengths of the rows -> indices of the tokens of each call, [calls, 2 * S]: one shape, so that JAX compiles once.


def micro_batches(lengths: list[int]) -> NDArray[np.int64]:
    """Two rows per call."""
    return INDICES.reshape(2, 2 * S)


def context_parallel(lengths: list[int]) -> NDArray[np.int64]:
    """Two ranks, each with a piece from the front of every row and one from its end."""
    pieces = np.split(INDICES, 4, axis=1)
    return np.stack([np.concatenate([pieces[rank], pieces[3 - rank]], axis=1).ravel() for rank in range(2)])


def packed(lengths: list[int]) -> NDArray[np.int64]:
    """Rows without their padding, concatenated; -1 after the last token."""
    tokens = np.concatenate([row[:length] for row, length in zip(INDICES, lengths, strict=True)])
    return np.pad(tokens, (0, -len(tokens) % (2 * S)), constant_values=-1).reshape(-1, 2 * S)


class Step(NamedTuple):
    """A random training step.

    Attributes:
        seed: of the values; fields: seed of the config's fields.
        lengths: of the rows without padding; may be 0.
        cut: splits the tokens into calls.
        ranks: number of ranks that run the calls, and over which gradients are averaged.
        optional: whether optional arguments are passed.
    """

    seed: int
    fields: int
    lengths: list[int]
    cut: Callable[[list[int]], NDArray[np.int64]]
    ranks: int
    optional: bool


def steps(**fixed: Any) -> Any:
    """A strategy for `Step`; fixed: fields that are not drawn."""
    drawn = {
        "seed": st.integers(0, 2**16),
        "fields": st.integers(0, 2**16),
        "lengths": st.lists(st.integers(0, S), min_size=B, max_size=B),
        "cut": st.sampled_from([micro_batches, context_parallel, packed]),
        "ranks": st.integers(1, 4),
        "optional": st.booleans(),
    }
    return st.builds(Step, **drawn | {name: st.just(value) for name, value in fixed.items()})


def losses() -> Any:
    """Parametrise a test over the names of the losses that take a count of tokens."""
    defined = {name: definition_of(config_cls) for name, config_cls in LOSS_CONFIG_REGISTRY.items()}
    return pytest.mark.parametrize("loss", [name for name, found in defined.items() if found and found.find("count")])


def assert_adds_up(loss: str, step: Step, call: Call) -> None:
    """Losses and gradients of the calls of a step add up to those of the full batch, by definition in float64."""
    config = _config(loss, np.random.default_rng(step.fields))
    definition, whole = definition_of(config), _whole(config, step)
    given = [argument for argument in definition.arguments if argument.name in whole]
    of_tokens = {argument.name for argument in given if argument.dims[:1] == ("T",)}
    grad_of = tuple(argument.name for argument in given if argument.differentiated)
    oracle = evaluate(config, whole)
    expected = {"loss": oracle.loss, **oracle.grads}
    allowed = allowances(config, whole, oracle, "float64")
    found = {name: np.zeros_like(x) for name, x in expected.items()}
    for indices in step.cut(step.lengths):
        arrays = {name: x[indices] if name in of_tokens else x for name, x in whole.items()}
        limits = allowances(config, arrays, evaluate(config, arrays), "float64")
        for name, result in call(config, arrays, grad_of, float(step.ranks)).items():
            # DDP and FSDP take the mean of gradients over their ranks.
            part = result if name == "loss" else result / step.ranks
            at = indices if name in of_tokens else ...
            found[name][at] += part
            # Errors of the call, and of the product, the quotient and the sum here.
            allowed[name][at] += limits[name] + 3 * 2.0**-53 * (np.abs(part) + np.abs(found[name][at]))
    for name, total in found.items():
        share = error_ratio(total, expected[name], allowed[name], "float64")
        assert share.max(initial=0.0) <= 1.0, (name, config, share.max())


def _config(loss: str, rng: np.random.Generator) -> Any:
    config_cls = LOSS_CONFIG_REGISTRY[loss]
    known = {f.name for f in fields(config_cls)}
    drawn = {name: draw(rng) for name, draw in definition_of(config_cls).random_fields.items() if name in known}
    # Without metrics: only the loss adds up.
    fixed = {name: value for name, value in {"reduction": "sum", "metrics": ()}.items() if name in known}
    return replace(config_cls(), **drawn | fixed)


def _whole(config: Any, step: Step) -> dict[str, NDArray[Any]]:
    """The arguments of all tokens, and the count of valid tokens."""
    definition, sizes, rng = definition_of(config), Sizes((B * S + 1,), V, H), np.random.default_rng(step.seed)
    arrays = dict(definition.draw(definition, sizes, 3.0, rng))
    padding = np.append(np.arange(S) >= np.array(step.lengths)[:, None], True)
    ignored = padding | (rng.random(B * S + 1) < 0.3)
    arrays["labels"] = np.where(ignored, config.ignore_index, rng.integers(0, V, B * S + 1))
    for argument in definition.arguments:
        if step.optional and argument.optional and argument.dims and definition.accepts(config, argument.name):
            values = 2.0 * rng.random(sizes.shape(argument.dims))
            arrays[argument.name] = values if argument.kind == "float" else (values > 0.5).astype(np.int64)
    arrays[definition.find("count").name] = np.asarray(valid_tokens(arrays, config.ignore_index).sum())
    return arrays
