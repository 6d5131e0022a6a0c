"""Kernel sets: per-row terms of logits, and gradients of logits from per-row coefficients, for any loss.

`KernelSet` is the protocol. The fused losses run any kernel set block by block: `linear_rows` for one distribution,
`linear_pairs` for two. Losses call a kernel set through `loss_core_torch.operators`, which wraps each method in a
custom operator where a call is traced.
"""

# T = tokens (rows), V = vocabulary (of this rank), H = hidden, K = targets of a row

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from loss_core.dispatch.protocol import BackendUnavailable
from loss_core.row_terms import Coefficients, MixtureTerms, Objective, PairTerms, RowTerms, Sums
from loss_core_torch.kernels.arguments import (
    Blocks,
    BothGrads,
    BothWanted,
    HeadOperands,
    HeadSizes,
    Linear,
    LinearGrads,
    LinearPairs,
    PairCoefficients,
    Pairs,
    Rows,
    Wanted,
    whole_rows,
)

__all__ = [
    "IGNORED",
    "Blocks",
    "BothGrads",
    "BothWanted",
    "HeadOperands",
    "HeadSizes",
    "KernelSet",
    "Linear",
    "LinearGrads",
    "LinearPairs",
    "PairCoefficients",
    "Pairs",
    "Products",
    "Rows",
    "Wanted",
    "WholeLosses",
    "find",
    "whole_rows",
]


class Products(Protocol):
    """Matrix products of operands of one dtype, computed in the dtype of the arithmetic.

    Attributes:
        columns: maximum number of classes per product; 0: no limit.
    """

    columns: int

    def into(self, out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
        """out = a @ b; out must share no memory with a or b."""
        ...

    def add(self, out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
        """out += a @ b."""
        ...

    def turned(self, b_KN: Tensor) -> Tensor:
        """b in the layout that `accumulate` takes as `turned`: its transpose, or b itself."""
        ...

    def accumulate(self, out_MN: Tensor, a_KM: Tensor, b_KN: Tensor, turned: Tensor, first: bool, last: bool) -> None:
        """One product of a sum: out = a.T @ b for the first, out += a.T @ b for the others.

        Args:
            turned: `turned(b_KN)`.
            first: whether this is the first product of the sum.
            last: whether it is the last; until then, out holds internal data.
        """
        ...


class KernelSet(Protocol):
    """Kernels for rows of logits, and for pairs of rows.

    Results are in the dtype of the arithmetic, gradients of logits in the logits' dtype. The terms of an ignored row
    are arbitrary; its gradient is exactly 0, whatever the row holds.
    """

    flag: str

    def batch_invariant(self, row_bytes: int) -> bool:
        """Whether terms and gradient of a row of `row_bytes` bytes do not depend on the other rows, bitwise."""
        ...

    def grad_in_forward(self, device: torch.device) -> bool:
        """Whether computing terms and gradient in one pass over the logits is faster than in two."""
        ...

    def row_terms(self, rows: Rows, sums: Sums) -> RowTerms:
        """Terms of each row over the columns of these logits."""
        ...

    def row_grad(self, rows: Rows, terms: RowTerms, coefficients: Coefficients, out: Tensor | None = None) -> Tensor:
        """Gradient of the logits, from terms and coefficients over the full vocabulary.

        Args:
            out: [..., V], receives the gradient, may be the logits themselves; None: a new contiguous tensor. With
                `coefficients.factor`, it already holds the gradient for a factor of 1.
        """
        ...

    def row_terms_and_grad(
        self, rows: Rows, coef_T: Tensor, objective: Objective, out: Tensor | None = None
    ) -> tuple[RowTerms, Tensor, Coefficients]:
        """Terms, the gradient of the sum of coef * loss, and its coefficients, in one pass over the logits.

        `linear_rows` requires `out`, and that a coefficient of 0 gives a gradient of 0, whatever the row holds.

        Args:
            out: [..., V], receives the gradient, may be the logits themselves; None: a new contiguous tensor.
        """
        ...

    def pair_terms(self, pairs: Pairs) -> PairTerms:
        """Terms of each pair of rows over the columns of these logits."""
        ...

    def pair_mixture(self, pairs: Pairs, terms: PairTerms, beta: float) -> MixtureTerms:
        """Sums against the mixture over these columns, from terms over the full vocabulary.

        Args:
            beta: weight of the teacher in the mixture, in (0, 1).
        """
        ...

    def pair_grad(self, pairs: Pairs, terms: PairTerms, wanted: PairCoefficients, out: Tensor | None = None) -> Tensor:
        """Gradient of the student's or the teacher's logits, from terms over the full vocabulary.

        It is that of the sum of coef * KL; with beta: coef * p * (log(p / M) - kl), with p the softmax of these logits.

        Args:
            out: as in `row_grad`.
        """
        ...

    def pair_terms_and_grad(self, pairs: Pairs, coef_T: Tensor, out: Tensor | None = None) -> tuple[PairTerms, Tensor]:
        """Terms, and the gradient of the student's logits, in one pass over both."""
        ...

    def products(self, operand_dtype: torch.dtype, device: torch.device) -> Products:
        """Matrix products for hidden states and weights of this dtype."""
        ...

    def operand_dtype(self, product_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """Dtype of the logits' gradient as an operand of its two matrix products."""
        ...

    def chunks(self, sizes: HeadSizes) -> Blocks:
        """Block sizes of a fused loss, for blocks of all classes."""
        ...

    def tiles(self, sizes: HeadSizes, together: bool) -> Blocks:
        """Block sizes of a fused loss, for blocks that may hold a part of the classes.

        Args:
            together: put all logits into one block if they fit its memory.
        """
        ...

    def scaled(self, grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """grad * factor, a scalar, rounded once to `dtype`; grad may be overwritten."""
        ...


# Label of ignored tokens in the `Linear` that `WholeLosses` accept: a value that no caller passes.
IGNORED = -(1 << 63)


class WholeLosses:
    """Per-token losses in operations that autograd differentiates: the base class of `plain` and `te`.

    Results are [T] in the dtype of the arithmetic. The flag does not support what a subclass does not override.
    """

    flag: str
    # Whether cross entropy accepts a vocabulary sharded over a group in equal parts.
    takes_shards = False

    def batch_invariant(self, row_bytes: int) -> bool:
        """See `KernelSet`. False: PyTorch splits a single long row among its threads, but not one of several rows."""
        return False

    def values(
        self, rows: Rows | Linear, objective: Objective, group: Any = None, reduction: str = "none"
    ) -> tuple[Tensor, ...]:
        """Values of each row; those of an ignored row are arbitrary, and its gradient is 0.

        Args:
            group: process group over which the vocabulary is sharded in equal parts, or None.
            reduction: "none"; or "sum" or "mean" over all rows, if none is ignored.
        Raises:
            BackendUnavailable: for an option that the flag does not support.
        """
        raise NotImplementedError

    def divergence(self, pairs: Pairs | LinearPairs, beta: float) -> Tensor:
        """KL(teacher || student) of each pair, not scaled by T^2; 0 for ignored pairs.

        Args:
            beta: if not 0, the generalized Jensen-Shannon divergence with this weight of the teacher, in (0, 1).
        """
        raise NotImplementedError

    def terms(self, rows: Rows | Linear, sums: Sums) -> RowTerms:
        """Terms of each row, for metrics; not differentiated. Those of an ignored row are arbitrary.

        Raises:
            BackendUnavailable: if the flag computes no metrics.
        """
        raise BackendUnavailable(
            f"{self.flag!r} returns no metrics: use 'torch:eager' or 'torch:triton', or metrics=()."
        )


# Name in the flag -> module that defines `KERNELS`, imported when the first loss with this flag is built.
_MODULES = {
    "plain": "loss_core_torch.kernels.plain",
    "eager": "loss_core_torch.kernels.eager",
    "compile": "loss_core_torch.kernels.compiled",
    "triton": "loss_core_torch.kernels.gpu",
    "te": "loss_core_torch.kernels.te",
}


@cache
def find(name: str) -> KernelSet | WholeLosses:
    """The kernels for the flag `torch:name`."""
    return cast(KernelSet | WholeLosses, cast(Any, import_module(_MODULES[name])).KERNELS)
