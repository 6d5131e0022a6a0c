"""The interface between losses and kernels: a kernel set computes terms of rows, and gradients from coefficients.

Kernels are independent of the loss: `loss_core.row_terms` defines a row's loss and coefficients.
"""

# T = tokens (any leading dimensions), V = vocabulary or this device's shard of it, H = hidden, K = targets of a row

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax

from loss_core.row_terms import Coefficients, MixtureTerms, Objective, PairTerms, RowTerms, Sums

F = TypeVar("F", bound=Callable[..., Any])

# Prefix of the named scope of every kernel, by which `kernels_in` finds the kernels of a compiled program.
_SCOPE = "loss_core."


class Shard(NamedTuple):
    """How the arrays of a kernel call are sharded. Hashable: static under jit.

    Attributes:
        axes: mesh axes over which the vocabulary is sharded, in order; () where arrays hold all of it.
        partitioned: whether XLA may partition the arrays over devices. Then kernels neither slice rows nor gather
            classes, for which XLA would communicate the logits.
    """

    axes: tuple[str, ...] = ()
    partitioned: bool = False


class Rows(NamedTuple):
    """Rows of logits.

    Attributes:
        logits: [..., V] floating; computed in float32 (float64 for float64).
        target: [...] int32: a column, IGNORED, INVALID or ELSEWHERE.
        num_classes: columns from this index on are padding of -inf; None for no padding.
        inverse_temperature: [...] factor of the logits, after the softcap, or None.
        columns: [..., K] int32, the columns of the row's K targets, negative where another shard has the target. Its
            terms exclude these columns, see `RowTerms`; `target` then only marks rows IGNORED or INVALID. None: the
            row has one target, `target`.
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
        num_classes: rows of the weight from this index on are padding; None for no padding.
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
    """Rows of a student and of a teacher, with the same target and padding, and no temperature per row."""

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


class RowOptions(NamedTuple):
    """Static options of kernels over rows and linear rows. Hashable.

    Attributes:
        sums: which terms are needed.
        softcap: c in c * tanh(logits / c), 0 is off.
        shard: see `Shard`.
        block_rows: maximum number of linear rows whose logits exist at a time, over all devices; 0: the kernels choose.
    """

    sums: Sums = Sums()
    softcap: float = 0.0
    shard: Shard = Shard()
    block_rows: int = 0


class Wanted(NamedTuple):
    """Which gradients of linear rows are needed, and whether ignored rows may be skipped in the products."""

    hidden: bool = True
    weight: bool = True
    bias: bool = True
    skip_ignored: bool = False


class LinearGradients(NamedTuple):
    """Gradients of linear rows in the dtype of the arithmetic; None where not needed."""

    hidden: jax.Array | None
    weight_VH: jax.Array | None
    bias_V: jax.Array | None


class PairOptions(NamedTuple):
    """Static options of kernels over pairs and linear pairs. Hashable.

    Attributes:
        beta: the teacher's weight in the mixture, in (0, 1); 0: KL(teacher || student), without a mixture.
        temperature: divides the logits of both.
        shard: see `Shard`.
        chunk_size: maximum number of pairs of logits computed at a time; 0: the kernels choose.
    """

    beta: float = 0.0
    temperature: float = 1.0
    shard: Shard = Shard()
    chunk_size: int = 0


BothGradients = tuple[LinearGradients, LinearGradients]


class KernelSet(Protocol):
    """The kernels of one flag. Hashable; kernel sets are equal only if they compute the same.

    Terms have the shape of `target`; those of ignored rows are finite. Gradients of logits have the logits' dtype and
    are exactly 0 in ignored rows, even where these hold inf or NaN.
    """

    def row_terms(self, rows: Rows, options: RowOptions) -> RowTerms:
        """Terms of each row."""
        ...

    def row_gradient(self, rows: Rows, terms: RowTerms, coefficients: Coefficients, options: RowOptions) -> jax.Array:
        """Gradient of the logits from the terms and the coefficients of each row."""
        ...

    def pair_terms(self, pairs: Pairs, options: PairOptions) -> PairTerms:
        """Terms of each pair at logits / temperature, except that m_t and m_s are maxima of the unscaled logits."""
        ...

    def pair_mixture(self, pairs: Pairs, terms: PairTerms, options: PairOptions) -> MixtureTerms:
        """Sums over these columns, from terms of the full rows in the units of `pair_terms`."""
        ...

    def pair_gradients(
        self, pairs: Pairs, terms: PairTerms, sums: MixtureTerms | None, upstream: jax.Array, options: PairOptions
    ) -> tuple[jax.Array, jax.Array]:
        """Gradients of upstream * divergence with respect to student and teacher, from terms of the full rows.

        Args:
            sums: of the mixture; None if beta is 0.
        """
        ...

    def linear_terms(self, rows: LinearRows, options: RowOptions) -> RowTerms:
        """Terms of each row; one matrix product, and never the logits of all rows."""
        ...

    def linear_gradients(
        self, rows: LinearRows, terms: RowTerms, coefficients: Coefficients, options: RowOptions
    ) -> LinearGradients:
        """Gradients from the terms and the coefficients of each row; recomputes the logits: three products."""
        ...

    def linear_terms_and_gradients(
        self, rows: LinearRows, upstream: jax.Array, objective: Objective, options: RowOptions, wanted: Wanted
    ) -> tuple[RowTerms, LinearGradients]:
        """Terms, and gradients of upstream * value, from the same logits of each chunk: three products in all.

        Args:
            objective: has one value and no arrays.
        """
        ...

    def linear_pair_terms(self, rows: LinearPairs, options: PairOptions) -> PairTerms:
        """Terms of each pair at logits / temperature, m_t and m_s included; never the logits of all rows."""
        ...

    def linear_pair_mixture(self, rows: LinearPairs, terms: PairTerms, options: PairOptions) -> MixtureTerms:
        """Sums over these columns, from terms of the full rows; recomputes the logits."""
        ...

    def linear_pair_gradients(
        self, rows: LinearPairs, terms: PairTerms, sums: MixtureTerms | None, upstream: jax.Array, options: PairOptions
    ) -> BothGradients:
        """As `pair_gradients`, with respect to hidden states and weights; recomputes the logits."""
        ...

    def linear_pair_losses_and_gradients(
        self, rows: LinearPairs, upstream: jax.Array, options: PairOptions, wanted: tuple[Wanted, Wanted]
    ) -> tuple[jax.Array, BothGradients]:
        """Divergences, and gradients of upstream * divergence, from the same logits of each chunk."""
        ...


def in_named_scope(flag: str) -> Callable[[F], F]:
    """Decorator of a kernel: its operations are in a named scope with the flag, in the compiled program too."""

    def wrap(kernel: F) -> F:
        named: F = jax.named_call(kernel, name=_SCOPE + flag)
        return named

    return wrap


def kernels_in(program: jax.stages.Compiled) -> str:
    """Flags of the kernels in a compiled program, sorted and joined by " and "; "" for none of this library."""
    return " and ".join(sorted(set(re.findall(rf"{re.escape(_SCOPE)}(\w+:\w+)", program.as_text() or ""))))
