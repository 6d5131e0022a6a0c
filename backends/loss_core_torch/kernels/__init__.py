"""Kernel sets. A set makes the terms of rows, and gradients from coefficients; it knows rows, not losses.

The fused losses are drivers around any set: `linear_rows` of one distribution, `linear_pairs` of two.

`KernelSet` is what a set implements. Losses reach it through `loss_core_torch.operators`, which makes each method a
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
    """Matrix products, of operands of one dtype, into the dtype of the arithmetic.

    Attributes:
        columns: most classes of one product; 0: any number.
    """

    columns: int

    def into(self, out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
        """out = a @ b, where out shares no memory with a or b."""
        ...

    def add(self, out_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
        """out += a @ b."""
        ...

    def turned(self, b_KN: Tensor) -> Tensor:
        """What `accumulate` takes beside b."""
        ...

    def accumulate(self, out_MN: Tensor, a_KM: Tensor, b_KN: Tensor, turned: Tensor, first: bool, last: bool) -> None:
        """One of the products of a sum: out = a.T @ b for the first, out += a.T @ b for the others.

        Args:
            first: whether it is the first of the sum.
            last: whether it is the last. Before it, out holds what belongs to this method.
        """
        ...


class KernelSet(Protocol):
    """What a set of kernels computes. Results are in the dtype of the arithmetic, gradients of logits in the logits'.

    Terms of an ignored row are any numbers; its gradient is exactly 0, whatever it holds.
    """

    flag: str

    def batch_invariant(self, row_bytes: int) -> bool:
        """Whether terms and gradient of a row of logits, of so many bytes, do not depend on the other rows, bitwise."""
        ...

    def grad_in_forward(self, device: torch.device) -> bool:
        """Whether terms and gradient of a row are better made together than in two visits."""
        ...

    def row_terms(self, rows: Rows, sums: Sums) -> RowTerms:
        """Terms of each row over these columns."""
        ...

    def row_grad(self, rows: Rows, terms: RowTerms, coefficients: Coefficients, out: Tensor | None = None) -> Tensor:
        """Gradient by the logits, from terms and coefficients over the whole vocabulary.

        Args:
            out: [..., V], where the gradient goes, which may be over the logits; None: into a new contiguous tensor.
                With a factor, it holds what the gradient is for a factor of 1.
        """
        ...

    def row_terms_and_grad(
        self, rows: Rows, coef_T: Tensor, objective: Objective, out: Tensor | None = None
    ) -> tuple[RowTerms, Tensor, Coefficients]:
        """Terms, the gradient of the sum of coef * loss, and its coefficients, in one visit of each row.

        What `linear_rows` needs: `out`, and that a coefficient of 0 gives a gradient of 0, whatever the row holds.

        Args:
            out: [..., V], where the gradient goes, which may be over the logits; None: into a new contiguous tensor.
        """
        ...

    def pair_terms(self, pairs: Pairs) -> PairTerms:
        """Terms of each pair of rows over these columns."""
        ...

    def pair_mixture(self, pairs: Pairs, terms: PairTerms, beta: float) -> MixtureTerms:
        """Sums over these columns, from terms over the whole vocabulary.

        Args:
            beta: the teacher's share of the mixture in (0, 1).
        """
        ...

    def pair_grad(self, pairs: Pairs, terms: PairTerms, wanted: PairCoefficients, out: Tensor | None = None) -> Tensor:
        """Gradient by the student's logits or by the teacher's, given terms over the whole vocabulary.

        Of the sum of coef * KL; with beta: coef * p * (log(p / M) - kl) for the distribution p of these logits.

        Args:
            out: as of `row_grad`.
        """
        ...

    def pair_terms_and_grad(self, pairs: Pairs, coef_T: Tensor, out: Tensor | None = None) -> tuple[PairTerms, Tensor]:
        """Terms, and the student's gradient, in one visit of each pair of rows."""
        ...

    def products(self, operand_dtype: torch.dtype, device: torch.device) -> Products:
        """What multiplies hidden states and weights."""
        ...

    def operand_dtype(self, product_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """Dtype in which the logits' gradient enters its two matrix products."""
        ...

    def chunks(self, sizes: HeadSizes) -> Blocks:
        """Blocks of a fused loss that have all classes."""
        ...

    def tiles(self, sizes: HeadSizes, together: bool) -> Blocks:
        """Blocks of a fused loss whose rows need not be whole.

        Args:
            together: all logits are to exist at a time, if they fit the memory of one block.
        """
        ...

    def scaled(self, grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """A gradient times a scalar, rounded once; it may be overwritten."""
        ...


# The label of an ignored token in what `WholeLosses` get as `Linear`: no number that a caller would give.
IGNORED = -(1 << 63)


class WholeLosses:
    """What `plain` and `te` are: they make the loss of each token whole, in operations that autograd knows.

    Results are [T] in the dtype of the arithmetic. A method that is not overridden is what the flag does not have.
    """

    flag: str
    # Whether cross entropy takes a vocabulary that is sharded over a group, in equal parts.
    takes_shards = False

    def batch_invariant(self, row_bytes: int) -> bool:
        """As of `KernelSet`. No promise: PyTorch shares one long row among its threads, of several it does not."""
        return False

    def values(
        self, rows: Rows | Linear, objective: Objective, group: Any = None, reduction: str = "none"
    ) -> tuple[Tensor, ...]:
        """Values of each row; those of an ignored one are any numbers, of which no gradient reaches it.

        Args:
            group: over which the vocabulary is sharded in equal parts, or None.
            reduction: "none"; or "sum" or "mean" of all rows, where none is ignored.
        Raises:
            BackendUnavailable: what the flag does not have.
        """
        raise NotImplementedError

    def divergence(self, pairs: Pairs | LinearPairs, beta: float) -> Tensor:
        """KL(teacher || student) of each pair, not times T^2; 0 for ignored ones.

        Args:
            beta: in (0, 1): the generalized Jensen-Shannon divergence instead.
        """
        raise NotImplementedError

    def terms(self, rows: Rows | Linear, sums: Sums) -> RowTerms:
        """Terms of each row, for metrics; not differentiated. Those of an ignored row are any numbers.

        Raises:
            BackendUnavailable: the flag makes losses alone.
        """
        raise BackendUnavailable(
            f"{self.flag!r} returns no metrics: use 'torch:eager' or 'torch:triton', or metrics=()."
        )


# Name in the flag -> module with `KERNELS`, imported when a loss is built with it.
_MODULES = {
    "plain": "loss_core_torch.kernels.plain",
    "eager": "loss_core_torch.kernels.eager",
    "compile": "loss_core_torch.kernels.compiled",
    "triton": "loss_core_torch.kernels.gpu",
    "te": "loss_core_torch.kernels.te",
}


@cache
def find(name: str) -> KernelSet | WholeLosses:
    """The kernels of a name in the flag."""
    return cast(KernelSet | WholeLosses, cast(Any, import_module(_MODULES[name])).KERNELS)
