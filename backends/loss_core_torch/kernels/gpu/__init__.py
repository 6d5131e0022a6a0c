"""The kernels of `torch:triton`: Triton kernels for NVIDIA and AMD GPUs, around the vendor's matrix products.

With TRITON_INTERPRET=1 in the environment before the first import, they run on a CPU, slowly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loss_core.row_terms import (
    Coefficients,
    CrossEntropy,
    MixtureTerms,
    Objective,
    PairTerms,
    RowTerms,
    Sums,
)
from loss_core_torch.kernels import (
    Blocks,
    Linear,
    LinearGrads,
    LinearPairs,
    PairCoefficients,
    Pairs,
    Rows,
    Wanted,
)
from loss_core_torch.kernels.gpu import linear, linear_tiles, pairs, products, rows, sizes
from loss_core_torch.kernels.gpu.launch import Launcher
from loss_core_torch.tracing import compute_dtype


class GpuKernels:
    """A `KernelSet`; see there for each method."""

    flag = "torch:triton"

    def __init__(self, launcher: Launcher | None = None) -> None:
        self._launcher = launcher or Launcher()

    def batch_invariant(self, row_bytes: int) -> bool:
        """Where each row begins at a whole vector; else the order of its sum depends on where it begins."""
        return row_bytes % sizes.VECTOR_BYTES == 0

    def grad_in_forward(self, device: torch.device) -> bool:
        """The second read of a row finds it in the L2 cache."""
        return True

    def row_terms(self, rows_: Rows, sums: Sums) -> RowTerms:
        return rows.terms(self._launcher, rows_, sums)

    def row_grad(
        self,
        rows_: Rows,
        terms: RowTerms,
        coefficients: Coefficients,
        factor: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        return rows.grad(self._launcher, rows_, terms, coefficients, factor, out)

    def row_terms_and_grad(
        self, rows_: Rows, coef_T: Tensor, objective: Objective
    ) -> tuple[RowTerms, Tensor, Coefficients]:
        if not isinstance(objective, CrossEntropy):
            terms = rows.terms(self._launcher, rows_, objective.sums)
            coefficients = objective.coefficients(torch, terms, [coef_T])
            return terms, rows.grad(self._launcher, rows_, terms, coefficients), coefficients
        return rows.terms_and_grad(self._launcher, rows_, coef_T, objective)

    def pair_terms(self, pairs_: Pairs) -> PairTerms:
        return pairs.terms(self._launcher, pairs_)

    def pair_mixture(self, pairs_: Pairs, terms: PairTerms, beta: float) -> MixtureTerms:
        return pairs.mixture(self._launcher, pairs_, terms, beta)

    def pair_grad(
        self,
        pairs_: Pairs,
        terms: PairTerms,
        wanted: PairCoefficients,
        factor: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        return pairs.grad(self._launcher, pairs_, terms, wanted, factor, out)

    def pair_terms_and_grad(self, pairs_: Pairs, coef_T: Tensor, out: Tensor | None = None) -> tuple[PairTerms, Tensor]:
        return pairs.terms_and_grad(self._launcher, pairs_, coef_T, out)

    def operand_dtype(self, product_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return self._launcher.operand_dtype(product_dtype, device)

    def products(self, operand_dtype: torch.dtype, device: torch.device) -> products.Products:
        return products.Products()

    def linear_blocks(self, linear_: LinearPairs) -> Blocks:
        """Chunks as the fused cross entropy's, of the memory of both logits; the whole vocabulary."""
        student_TH, dtype = linear_.student_TH, compute_dtype(linear_.student_TH.dtype)
        operand = self.operand_dtype(linear_.student_dtype, student_TH.device)
        num_tokens, vocab = len(student_TH), len(linear_.student_VH)
        both = 2 * dtype.itemsize + (operand.itemsize if operand != dtype else 0)
        tokens, _ = self._launcher.chunk_tokens(num_tokens, vocab, both, both, 0)
        return Blocks(tokens, vocab)

    def linear_terms(self, linear_: Linear, sums: Sums, keep_logits: bool) -> tuple[RowTerms, Tensor]:
        return linear_tiles.terms(self._launcher, linear_, sums, keep_logits)

    def linear_grads(
        self, linear_: Linear, terms: RowTerms, coefficients: Coefficients, want: Wanted, logits: Tensor
    ) -> LinearGrads:
        return linear_tiles.grads(self._launcher, linear_, terms, coefficients, want, logits)

    def linear_terms_and_grads(
        self, linear_: Linear, coef_T: Tensor, objective: CrossEntropy, want: Wanted
    ) -> tuple[RowTerms, LinearGrads]:
        return linear.terms_and_grads(self._launcher, linear_, coef_T, objective, want)

    def scaled(self, grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        return linear.scaled(self._launcher, grad, factor, dtype)


KERNELS = GpuKernels()
