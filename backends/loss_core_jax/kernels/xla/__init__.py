"""`jax:xla`: kernels as JAX operations, which XLA compiles and fuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

from loss_core.row_terms import Coefficients, MixtureTerms, Objective, PairTerms, RowTerms
from loss_core_jax.kernels import (
    BothGradients,
    How,
    LinearGradients,
    LinearPairs,
    LinearRows,
    PairHow,
    Pairs,
    Rows,
    Wanted,
    recorded,
)
from loss_core_jax.kernels.xla import pairs, rows
from loss_core_jax.kernels.xla.chunks import ACCELERATOR, CPU, Sizes, by_platform

FLAG = "jax:xla"

Found = TypeVar("Found")


@dataclass(frozen=True)
class XlaKernels:
    """The kernel set of `jax:xla`.

    Attributes:
        cpu, accelerator: how rows are cut up, by what the program is compiled for.
    """

    cpu: Sizes = CPU
    accelerator: Sizes = ACCELERATOR

    def _run(self, kernel: Callable[..., Found], static: tuple[Any, ...], *arrays: Any) -> Found:
        found: Found = by_platform(kernel, static, self.cpu, self.accelerator, *arrays)
        return found

    @recorded(FLAG)
    def row_terms(self, these: Rows, how: How) -> RowTerms:
        return self._run(rows.terms, (how,), these)

    @recorded(FLAG)
    def row_gradient(self, these: Rows, terms: RowTerms, coefficients: Coefficients, how: How) -> jax.Array:
        return rows.gradient(these, terms, coefficients, how)

    @recorded(FLAG)
    def pair_terms(self, these: Pairs, how: PairHow) -> PairTerms:
        return self._run(pairs.terms, (how,), these)

    @recorded(FLAG)
    def pair_mixture(self, these: Pairs, terms: PairTerms, how: PairHow) -> MixtureTerms:
        return self._run(pairs.mixture, (how,), these, terms)

    @recorded(FLAG)
    def pair_gradients(
        self, these: Pairs, terms: PairTerms, sums: MixtureTerms | None, upstream: jax.Array, how: PairHow
    ) -> tuple[jax.Array, jax.Array]:
        return pairs.gradients(these, terms, sums, upstream, how)

    @recorded(FLAG)
    def linear_terms(self, these: LinearRows, how: How) -> RowTerms:
        return self._run(rows.linear_terms, (how,), these)

    @recorded(FLAG)
    def linear_gradients(
        self, these: LinearRows, terms: RowTerms, coefficients: Coefficients, how: How
    ) -> LinearGradients:
        return self._run(rows.linear_gradients, (how,), these, terms, coefficients)

    @recorded(FLAG)
    def linear_terms_and_gradients(
        self, these: LinearRows, upstream: jax.Array, objective: Objective, how: How, wanted: Wanted
    ) -> tuple[RowTerms, LinearGradients]:
        return self._run(rows.linear_terms_and_gradients, (how, objective, wanted), these, upstream)

    @recorded(FLAG)
    def linear_pair_terms(self, these: LinearPairs, how: PairHow) -> PairTerms:
        return self._run(pairs.linear_terms, (how,), these)

    @recorded(FLAG)
    def linear_pair_mixture(self, these: LinearPairs, terms: PairTerms, how: PairHow) -> MixtureTerms:
        return self._run(pairs.linear_mixture, (how,), these, terms)

    @recorded(FLAG)
    def linear_pair_gradients(
        self, these: LinearPairs, terms: PairTerms, sums: MixtureTerms | None, upstream: jax.Array, how: PairHow
    ) -> BothGradients:
        return self._run(pairs.linear_gradients, (how,), these, terms, sums, upstream)

    @recorded(FLAG)
    def linear_pair_losses_and_gradients(
        self, these: LinearPairs, upstream: jax.Array, how: PairHow, wanted: tuple[Wanted, Wanted]
    ) -> tuple[jax.Array, BothGradients]:
        return self._run(pairs.linear_losses_and_gradients, (how, wanted), these, upstream)


XLA = XlaKernels()
