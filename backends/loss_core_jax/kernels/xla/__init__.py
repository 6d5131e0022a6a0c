"""`jax:xla`: kernels written as JAX operations, which XLA compiles and fuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

from loss_core.row_terms import Coefficients, MixtureTerms, Objective, PairTerms, RowTerms
from loss_core_jax.kernels import (
    BothGradients,
    LinearGradients,
    LinearPairs,
    LinearRows,
    PairOptions,
    Pairs,
    RowOptions,
    Rows,
    Wanted,
    in_named_scope,
)
from loss_core_jax.kernels.xla import pairs as pair_kernels
from loss_core_jax.kernels.xla import rows as row_kernels
from loss_core_jax.kernels.xla.chunks import ACCELERATOR, CPU, Sizes, by_platform

FLAG = "jax:xla"

Result = TypeVar("Result")


@dataclass(frozen=True)
class XlaKernels:
    """The kernel set of `jax:xla`.

    Attributes:
        cpu, accelerator: sizes of chunks and tiles, by the platform that the program is compiled for.
    """

    cpu: Sizes = CPU
    accelerator: Sizes = ACCELERATOR

    def _run(self, kernel: Callable[..., Result], static: tuple[Any, ...], *arrays: Any) -> Result:
        result: Result = by_platform(kernel, static, self.cpu, self.accelerator, *arrays)
        return result

    @in_named_scope(FLAG)
    def row_terms(self, rows: Rows, options: RowOptions) -> RowTerms:
        return self._run(row_kernels.terms, (options,), rows)

    @in_named_scope(FLAG)
    def row_gradient(self, rows: Rows, terms: RowTerms, coefficients: Coefficients, options: RowOptions) -> jax.Array:
        return row_kernels.gradient(rows, terms, coefficients, options)

    @in_named_scope(FLAG)
    def pair_terms(self, pairs: Pairs, options: PairOptions) -> PairTerms:
        return self._run(pair_kernels.terms, (options,), pairs)

    @in_named_scope(FLAG)
    def pair_mixture(self, pairs: Pairs, terms: PairTerms, options: PairOptions) -> MixtureTerms:
        return self._run(pair_kernels.mixture, (options,), pairs, terms)

    @in_named_scope(FLAG)
    def pair_gradients(
        self, pairs: Pairs, terms: PairTerms, sums: MixtureTerms | None, upstream: jax.Array, options: PairOptions
    ) -> tuple[jax.Array, jax.Array]:
        return pair_kernels.gradients(pairs, terms, sums, upstream, options)

    @in_named_scope(FLAG)
    def linear_terms(self, rows: LinearRows, options: RowOptions) -> RowTerms:
        return self._run(row_kernels.linear_terms, (options,), rows)

    @in_named_scope(FLAG)
    def linear_gradients(
        self, rows: LinearRows, terms: RowTerms, coefficients: Coefficients, options: RowOptions
    ) -> LinearGradients:
        return self._run(row_kernels.linear_gradients, (options,), rows, terms, coefficients)

    @in_named_scope(FLAG)
    def linear_terms_and_gradients(
        self, rows: LinearRows, upstream: jax.Array, objective: Objective, options: RowOptions, wanted: Wanted
    ) -> tuple[RowTerms, LinearGradients]:
        return self._run(row_kernels.linear_terms_and_gradients, (options, objective, wanted), rows, upstream)

    @in_named_scope(FLAG)
    def linear_pair_terms(self, rows: LinearPairs, options: PairOptions) -> PairTerms:
        return self._run(pair_kernels.linear_terms, (options,), rows)

    @in_named_scope(FLAG)
    def linear_pair_mixture(self, rows: LinearPairs, terms: PairTerms, options: PairOptions) -> MixtureTerms:
        return self._run(pair_kernels.linear_mixture, (options,), rows, terms)

    @in_named_scope(FLAG)
    def linear_pair_gradients(
        self, rows: LinearPairs, terms: PairTerms, sums: MixtureTerms | None, upstream: jax.Array, options: PairOptions
    ) -> BothGradients:
        return self._run(pair_kernels.linear_gradients, (options,), rows, terms, sums, upstream)

    @in_named_scope(FLAG)
    def linear_pair_losses_and_gradients(
        self, rows: LinearPairs, upstream: jax.Array, options: PairOptions, wanted: tuple[Wanted, Wanted]
    ) -> tuple[jax.Array, BothGradients]:
        return self._run(pair_kernels.linear_losses_and_gradients, (options, wanted), rows, upstream)


XLA = XlaKernels()
