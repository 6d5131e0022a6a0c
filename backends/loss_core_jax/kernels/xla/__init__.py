"""`jax:xla`: kernels as JAX operations, which XLA compiles and fuses."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from loss_core.row_terms import Coefficients, MixtureTerms, Objective, PairTerms, RowTerms
from loss_core_jax.kernels import (
    BothGradients,
    How,
    LinearGradients,
    LinearPairs,
    LinearRows,
    Mixture,
    PairHow,
    Pairs,
    Rows,
    Shard,
    Wanted,
    recorded,
)
from loss_core_jax.kernels.xla import linear, linear_pairs, pairs, rows
from loss_core_jax.kernels.xla.sizes import ACCELERATOR, CPU, Sizes, by_platform

FLAG = "jax:xla"


@dataclass(frozen=True)
class XlaKernels:
    """The kernel set of `jax:xla`.

    Attributes:
        cpu, accelerator: how rows are cut up, by what the program is compiled for.
    """

    cpu: Sizes = CPU
    accelerator: Sizes = ACCELERATOR

    @recorded(FLAG)
    def row_terms(self, these: Rows, how: How) -> RowTerms:
        found: RowTerms = by_platform(rows.terms, (how,), self.cpu, self.accelerator, these)
        return found

    @recorded(FLAG)
    def row_gradient(self, these: Rows, terms: RowTerms, coefficients: Coefficients, how: How) -> jax.Array:
        return rows.gradient(these, terms, coefficients, how)

    @recorded(FLAG)
    def pair_terms(self, these: Pairs, temperature: float, chunk_size: int, shard: Shard) -> PairTerms:
        how = (temperature, chunk_size, shard)
        found: PairTerms = by_platform(pairs.terms, how, self.cpu, self.accelerator, these)
        return found

    @recorded(FLAG)
    def pair_gradients(
        self, these: Pairs, terms: PairTerms, kl: jax.Array, upstream: jax.Array, temperature: float
    ) -> tuple[jax.Array, jax.Array]:
        return pairs.gradients(these, terms, kl, upstream, temperature)

    @recorded(FLAG)
    def pair_mixture(self, these: Pairs, terms: PairTerms, mixture: Mixture, shard: Shard) -> MixtureTerms:
        how = (mixture, shard)
        found: MixtureTerms = by_platform(pairs.mixture_terms, how, self.cpu, self.accelerator, these, terms)
        return found

    @recorded(FLAG)
    def mixture_gradients(
        self, these: Pairs, terms: PairTerms, sums: MixtureTerms, upstream: jax.Array, mixture: Mixture
    ) -> tuple[jax.Array, jax.Array]:
        return pairs.mixture_gradients(these, terms, sums, upstream, mixture)

    @recorded(FLAG)
    def linear_terms(self, these: LinearRows, how: How) -> RowTerms:
        found: RowTerms = by_platform(linear.terms, (how,), self.cpu, self.accelerator, these)
        return found

    @recorded(FLAG)
    def linear_gradients(
        self, these: LinearRows, terms: RowTerms, coefficients: Coefficients, how: How
    ) -> LinearGradients:
        given = (these, terms, coefficients)
        found: LinearGradients = by_platform(linear.gradients, (how,), self.cpu, self.accelerator, *given)
        return found

    @recorded(FLAG)
    def linear_terms_and_gradients(
        self, these: LinearRows, upstream: jax.Array, objective: Objective, how: How, wanted: Wanted
    ) -> tuple[RowTerms, LinearGradients]:
        found: tuple[RowTerms, LinearGradients] = by_platform(
            linear.terms_and_gradients, (how, objective, wanted), self.cpu, self.accelerator, these, upstream
        )
        return found

    @recorded(FLAG)
    def linear_pair_terms(self, these: LinearPairs, how: PairHow) -> PairTerms:
        found: PairTerms = by_platform(linear_pairs.terms, (how,), self.cpu, self.accelerator, these)
        return found

    @recorded(FLAG)
    def linear_pair_mixture(self, these: LinearPairs, terms: PairTerms, how: PairHow) -> MixtureTerms:
        given = (these, terms)
        found: MixtureTerms = by_platform(linear_pairs.mixture_terms, (how,), self.cpu, self.accelerator, *given)
        return found

    @recorded(FLAG)
    def linear_pair_gradients(
        self, these: LinearPairs, terms: PairTerms, sums: jax.Array | MixtureTerms, upstream: jax.Array, how: PairHow
    ) -> BothGradients:
        given = (these, terms, sums, upstream)
        found: BothGradients = by_platform(linear_pairs.gradients, (how,), self.cpu, self.accelerator, *given)
        return found

    @recorded(FLAG)
    def linear_pair_losses_and_gradients(
        self, these: LinearPairs, upstream: jax.Array, how: PairHow
    ) -> tuple[jax.Array, BothGradients]:
        given = (these, upstream)
        found: tuple[jax.Array, BothGradients] = by_platform(
            linear_pairs.losses_and_gradients, (how,), self.cpu, self.accelerator, *given
        )
        return found


XLA = XlaKernels()
