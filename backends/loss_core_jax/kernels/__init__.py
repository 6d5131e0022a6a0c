"""The seam between losses and kernels: a kernel set makes terms of rows, and gradients from coefficients.

Kernels know rows, not losses: what a row's loss is, and its coefficients, stands in `loss_core.row_terms`.
"""

# T = tokens (any leading dimensions), V = vocabulary or this device's share of it, H = hidden, K = targets of a row

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax

from loss_core.row_terms import Coefficients, MixtureTerms, Objective, PairTerms, RowTerms, Sums

F = TypeVar("F", bound=Callable[..., Any])

# A name in the program of every operation that a kernel makes: it tells which kernels a program runs.
_SCOPE = "loss_core."


class Shard(NamedTuple):
    """What the arrays of a call hold of the whole problem. Hashable: static under jit.

    Attributes:
        axes: mesh axes over which the vocabulary is sharded, in order; () where arrays hold all of it.
        partitioned: whether XLA may spread the arrays over devices: then no kernel slices rows or gathers classes,
            for which XLA would move the logits.
    """

    axes: tuple[str, ...] = ()
    partitioned: bool = False


class Rows(NamedTuple):
    """Rows of logits.

    Attributes:
        logits: [..., V] floating; computed in float32 (float64 for float64).
        target: [...] int32: a column, IGNORED, INVALID or ELSEWHERE.
        num_classes: columns from this one on are padding of -inf; None where there is none.
        inverse_temperature: [...] factor of the logits, after the softcap, or None.
        columns: [..., K] int32, a column, or negative for none here: the row's K targets, which its terms leave out
            (see `RowTerms`). Then `target` only says what is IGNORED or INVALID. None: the row has the one target.
    """

    logits: jax.Array
    target: jax.Array
    num_classes: jax.Array | None = None
    inverse_temperature: jax.Array | None = None
    columns: jax.Array | None = None


class LinearRows(NamedTuple):
    """Rows whose logits are `hidden @ weight_VH.T + bias_V`.

    Attributes:
        hidden: [..., H] floating.
        weight_VH: dtype of hidden, or float32.
        target: as in `Rows`.
        num_classes: rows of the weight from this one on are padding; None where there is none.
        inverse_temperature: as in `Rows`.
        bias_V: floating, or None.
        columns: as in `Rows`.
    """

    hidden: jax.Array
    weight_VH: jax.Array
    target: jax.Array
    num_classes: jax.Array | None = None
    inverse_temperature: jax.Array | None = None
    bias_V: jax.Array | None = None
    columns: jax.Array | None = None


class LinearPairs(NamedTuple):
    """Rows of a student and of a teacher, with the same target and padding, and no temperatures of their own."""

    student: LinearRows
    teacher: LinearRows


class Pairs(NamedTuple):
    """Rows of two logits.

    Attributes:
        student, teacher: [..., V] floating.
        target: [...] int32; only IGNORED matters.
    """

    student: jax.Array
    teacher: jax.Array
    target: jax.Array


class How(NamedTuple):
    """What is static about rows and linear rows. Hashable.

    Attributes:
        sums: which terms are needed.
        softcap: c in c * tanh(logits / c), 0 is off.
        shard: as in `Shard`.
        block_rows: most linear rows whose logits exist at a time, on all devices together; 0: the set chooses.
    """

    sums: Sums = Sums()
    softcap: float = 0.0
    shard: Shard = Shard()
    block_rows: int = 0


class Wanted(NamedTuple):
    """Which gradients of linear rows are made, and whether rows that are ignored may be left out of the products."""

    hidden: bool = True
    weight: bool = True
    bias: bool = True
    skip_ignored: bool = False


class LinearGradients(NamedTuple):
    """Gradients of linear rows in the dtype of the arithmetic; None where not wanted."""

    hidden: jax.Array | None
    weight_VH: jax.Array | None
    bias_V: jax.Array | None


class PairHow(NamedTuple):
    """What is static about pairs and linear pairs. Hashable.

    Attributes:
        beta: the teacher's share of the mixture in (0, 1); 0: KL(teacher || student), there is none.
        temperature: divides the logits of both.
        shard: as in `Shard`.
        chunk_size: most pairs of logits that are computed at a time; 0: the set chooses.
    """

    beta: float = 0.0
    temperature: float = 1.0
    shard: Shard = Shard()
    chunk_size: int = 0


BothGradients = tuple[LinearGradients, LinearGradients]


class KernelSet(Protocol):
    """Kernels behind one flag. Hashable, and equal only to sets that compute the same.

    Terms have the shape of `target`; those of ignored rows are finite. Gradients over logits have the logits' dtype and
    are exactly 0 in ignored rows, whatever these hold.
    """

    def row_terms(self, rows: Rows, how: How) -> RowTerms:
        """Terms of each row."""
        ...

    def row_gradient(self, rows: Rows, terms: RowTerms, coefficients: Coefficients, how: How) -> jax.Array:
        """Gradient of the logits from the terms and the coefficients of each row."""
        ...

    def pair_terms(self, pairs: Pairs, how: PairHow) -> PairTerms:
        """Terms of each pair at logits / temperature; m_t and m_s alone are in units of the logits."""
        ...

    def pair_mixture(self, pairs: Pairs, terms: PairTerms, how: PairHow) -> MixtureTerms:
        """Sums over these columns, given terms of the whole rows as `pair_terms` gives them."""
        ...

    def pair_gradients(
        self, pairs: Pairs, terms: PairTerms, sums: MixtureTerms | None, upstream: jax.Array, how: PairHow
    ) -> tuple[jax.Array, jax.Array]:
        """Gradients of upstream * divergence by student and teacher, given terms of the whole rows.

        Args:
            sums: with beta those of the mixture; None without.
        """
        ...

    def linear_terms(self, rows: LinearRows, how: How) -> RowTerms:
        """Terms of each row; one product, no logits of all rows."""
        ...

    def linear_gradients(
        self, rows: LinearRows, terms: RowTerms, coefficients: Coefficients, how: How
    ) -> LinearGradients:
        """Gradients from the terms and the coefficients of each row; makes the logits again: three products."""
        ...

    def linear_terms_and_gradients(
        self, rows: LinearRows, upstream: jax.Array, objective: Objective, how: How, wanted: Wanted
    ) -> tuple[RowTerms, LinearGradients]:
        """Terms and gradients of upstream * value while a chunk's logits are at hand: three products in all.

        Args:
            objective: one of one value that holds no array.
        """
        ...

    def linear_pair_terms(self, rows: LinearPairs, how: PairHow) -> PairTerms:
        """Terms of each pair, m_t and m_s after the temperature as the others; no logits of all rows."""
        ...

    def linear_pair_mixture(self, rows: LinearPairs, terms: PairTerms, how: PairHow) -> MixtureTerms:
        """Sums over these columns, given terms of the whole rows; makes the logits again."""
        ...

    def linear_pair_gradients(
        self, rows: LinearPairs, terms: PairTerms, sums: MixtureTerms | None, upstream: jax.Array, how: PairHow
    ) -> BothGradients:
        """As `pair_gradients`, by hidden states and weights; makes the logits again."""
        ...

    def linear_pair_losses_and_gradients(
        self, rows: LinearPairs, upstream: jax.Array, how: PairHow, wanted: tuple[Wanted, Wanted]
    ) -> tuple[jax.Array, BothGradients]:
        """Divergences, and gradients of upstream * divergence, while a chunk's logits are at hand."""
        ...


def recorded(flag: str) -> Callable[[F], F]:
    """Decorator of a kernel: each operation that it makes carries the flag in the compiled program."""

    def wrap(kernel: F) -> F:
        named: F = jax.named_call(kernel, name=_SCOPE + flag)
        return named

    return wrap


def kernels_in(program: jax.stages.Compiled) -> str:
    """Flags of the kernels that a compiled program runs, sorted; "" for none of ours."""
    return " and ".join(sorted(set(re.findall(rf"{re.escape(_SCOPE)}(\w+:\w+)", program.as_text() or ""))))
