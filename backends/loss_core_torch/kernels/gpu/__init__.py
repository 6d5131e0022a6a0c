"""The kernels of `torch:triton`: Triton kernels for NVIDIA and AMD GPUs, around the vendor's matrix products.

With TRITON_INTERPRET=1 in the environment before the first import, they run on a CPU, slowly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loss_core.row_terms import Coefficients, Objective, PairTerms, RowTerms
from loss_core_torch.kernels import Linear, Pairs, Rows
from loss_core_torch.kernels.gpu import linear, pairs, rows
from loss_core_torch.kernels.gpu.launch import Launcher


class GpuKernels:
    """A `KernelSet`; see there for each method."""

    flag = "torch:triton"

    def __init__(self, launcher: Launcher | None = None) -> None:
        self._launcher = launcher or Launcher()

    def grad_in_forward(self, device: torch.device) -> bool:
        """The second read of a row finds it in the L2 cache."""
        return True

    def row_terms(self, rows_: Rows, objective: Objective) -> RowTerms:
        return rows.terms(self._launcher, rows_, objective)

    def row_grad(
        self,
        rows_: Rows,
        terms: RowTerms,
        coefficients: Coefficients,
        out: Tensor | None = None,
        unless_one: Tensor | None = None,
    ) -> Tensor:
        return rows.grad(self._launcher, rows_, terms, coefficients, out, unless_one)

    def row_terms_and_grad(self, rows_: Rows, coef_T: Tensor, objective: Objective) -> tuple[RowTerms, Tensor]:
        return rows.terms_and_grad(self._launcher, rows_, coef_T, objective)

    def pair_terms(self, pairs_: Pairs) -> PairTerms:
        return pairs.terms(self._launcher, pairs_)

    def pair_grad(
        self,
        pairs_: Pairs,
        terms: PairTerms,
        kl_T: Tensor,
        coef_T: Tensor,
        of_teacher: bool,
        out: Tensor | None = None,
        unless_one: Tensor | None = None,
    ) -> Tensor:
        return pairs.grad(self._launcher, pairs_, terms, kl_T, coef_T, of_teacher, out, unless_one)

    def pair_terms_and_grad(self, pairs_: Pairs, coef_T: Tensor) -> tuple[PairTerms, Tensor]:
        return pairs.terms_and_grad(self._launcher, pairs_, coef_T)

    def operand_dtype(self, product_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return self._launcher.operand_dtype(product_dtype, device)

    def linear_terms(self, linear_: Linear, objective: Objective, keep_logits: bool) -> tuple[RowTerms, Tensor]:
        return linear.terms(self._launcher, linear_, objective, keep_logits)

    def linear_grads(
        self,
        linear_: Linear,
        terms: RowTerms,
        upstream_T: Tensor,
        objective: Objective,
        want: tuple[bool, bool],
        logits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return linear.grads(self._launcher, linear_, terms, upstream_T, objective, want, logits)

    def linear_terms_and_grads(
        self, linear_: Linear, coef_T: Tensor, objective: Objective, want: tuple[bool, bool]
    ) -> tuple[RowTerms, Tensor, Tensor]:
        return linear.terms_and_grads(self._launcher, linear_, coef_T, objective, want)


KERNELS = GpuKernels()
