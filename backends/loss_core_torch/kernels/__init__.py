"""Kernel sets. A set makes the terms of rows, and gradients from coefficients; it knows rows, not losses.

`KernelSet` is what a set implements. Losses reach it through `loss_core_torch.operators`, which makes each method a
custom operator where a call is traced.
"""

# T = tokens (rows), V = vocabulary (of this rank), H = hidden, K = targets of a row

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from loss_core.dispatch.protocol import BackendUnavailable
from loss_core.row_terms import Coefficients, MixtureTerms, Objective, PairTerms, RowTerms, Sums, TopK


class Rows(NamedTuple):
    """Logits, and what is known of each row before they are read.

    Attributes:
        logits: [..., V] float, any strides.
        labels_T: the targets, int64, counted over the whole vocabulary; no class of it for a target that nobody owns.
            [T]; or [T, K], which differ and ascend in each row: then terms leave these columns out, see `RowTerms`.
        keep_T: [T] bool, False for rows to ignore; None: no row is ignored.
        vocab_start: first class of these columns.
        softcap: c of z = c * tanh(logits / c), of which the terms are; 0 is off.
        inverse_temperature_T: [T] factor of z, after the softcap, or None.
    """

    logits: Tensor
    labels_T: Tensor
    keep_T: Tensor | None
    vocab_start: int = 0
    softcap: float = 0.0
    inverse_temperature_T: Tensor | None = None


def whole_rows(rows: Rows) -> tuple[Tensor, Tensor]:
    """z [T, V] of all rows in the dtype of the arithmetic, and its slope by the logits: for kernels without blocks."""
    logits_TV = rows.logits.reshape(-1, rows.logits.shape[-1])
    z_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    slope_TV = torch.ones_like(z_TV)
    if rows.softcap:
        tanh_TV = torch.tanh(z_TV / rows.softcap)
        z_TV, slope_TV = rows.softcap * tanh_TV, 1.0 - tanh_TV.square()
    if rows.inverse_temperature_T is not None:
        inverse_T1 = rows.inverse_temperature_T[:, None]
        z_TV, slope_TV = z_TV * inverse_T1, slope_TV * inverse_T1
    return z_TV, slope_TV


class Pairs(NamedTuple):
    """Logits of two distributions.

    Attributes:
        student, teacher: [..., V] float, any strides.
        keep_T: as in `Rows`.
        inverse_temperature: factor of both.
        chunk_size: most rows of a temporary; 0: the set chooses.
    """

    student: Tensor
    teacher: Tensor
    keep_T: Tensor | None
    inverse_temperature: float
    chunk_size: int = 0


class Linear(NamedTuple):
    """Operands of logits softcap(h @ W.T + b) that are never held whole. No row is ignored.

    Attributes:
        h_TH: [T, H] float; w_VH: [V, H] float.
        labels_T, vocab_start: as in `Rows`.
        softcap, inverse_temperature_T: as in `Rows`.
        product_dtype: dtype to which the operands are rounded.
        bias_V: [V] float, added in the dtype of the arithmetic, or None.
        block_tokens: most tokens whose logits exist at a time, and most rows of logits whose entries their gradient
            takes; 0: the set chooses.
    """

    h_TH: Tensor
    w_VH: Tensor
    labels_T: Tensor
    vocab_start: int
    softcap: float
    product_dtype: torch.dtype
    inverse_temperature_T: Tensor | None = None
    bias_V: Tensor | None = None
    block_tokens: int = 0

    def block(self, chosen: int) -> int:
        """Tokens of a block where the set would choose so many."""
        return min(chosen, self.block_tokens) if self.block_tokens else chosen


class LinearPairs(NamedTuple):
    """Operands of logits h @ W.T of a student and of a teacher, that are never held whole.

    Attributes:
        student_TH, student_VH: hidden states [T, H], 0 in rows to ignore, and weight [V, H]; float.
        teacher_TH, teacher_VH: likewise, with a hidden size of their own.
        student_dtype, teacher_dtype: dtypes to which the operands of either are rounded.
        keep_T, inverse_temperature: as in `Pairs`.
    """

    student_TH: Tensor
    teacher_TH: Tensor
    student_VH: Tensor
    teacher_VH: Tensor
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    keep_T: Tensor | None
    inverse_temperature: float


class Wanted(NamedTuple):
    """Which gradients of a fused loss are made."""

    hidden: bool
    weight: bool
    bias: bool = False


class LinearGrads(NamedTuple):
    """Gradients of a fused loss; empty where they are not wanted."""

    hidden_TH: Tensor
    weight_VH: Tensor
    bias_V: Tensor

    def rounded(self, linear: Linear) -> LinearGrads:
        """Those of weight and bias in the dtypes of these operands."""
        by_b_V = self.bias_V if linear.bias_V is None else self.bias_V.to(linear.bias_V.dtype)
        return self._replace(weight_VH=self.weight_VH.to(linear.w_VH.dtype), bias_V=by_b_V)


class BothWanted(NamedTuple):
    """Which gradients of student and teacher are made."""

    student: Wanted
    teacher: Wanted


class BothGrads(NamedTuple):
    """Gradients by hidden states and weight of student and teacher."""

    student: LinearGrads
    teacher: LinearGrads


class PairCoefficients(NamedTuple):
    """Which gradient of pairs is meant.

    Attributes:
        kl_T: [T] divergences: of the teacher from the student; with beta, of `of_teacher`'s distribution from the
            mixture.
        coef_T: [T] factor of each, every factor of the temperature included, and with beta that of the divergence.
        of_teacher: by the teacher's logits, or by the student's.
        beta: the teacher's share of the mixture in (0, 1); 0: there is none.
    """

    kl_T: Tensor
    coef_T: Tensor
    of_teacher: bool
    beta: float = 0.0


class Into(NamedTuple):
    """Where a gradient goes.

    Attributes:
        out: [..., V]; may be the logits themselves. None: a new contiguous tensor.
        unless_one: scalar; where it is exactly 1, `out` holds the result already and nothing is done.
    """

    out: Tensor | None = None
    unless_one: Tensor | None = None


NEW = Into()


class Blocks(NamedTuple):
    """How the logits of two heads are cut up: tokens of a block, classes of a tile of the weights."""

    tokens: int
    classes: int


class Products(Protocol):
    """Matrix products, of operands of one dtype, into the dtype of the arithmetic."""

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

    def row_grad(self, rows: Rows, terms: RowTerms, coefficients: Coefficients, into: Into = NEW) -> Tensor:
        """Gradient by the logits, from terms and coefficients over the whole vocabulary."""
        ...

    def row_terms_and_grad(self, rows: Rows, coef_T: Tensor, objective: Objective | TopK) -> tuple[RowTerms, Tensor]:
        """Terms, and the gradient of the sum of coef * loss, in one visit of each row."""
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

    def pair_grad(self, pairs: Pairs, terms: PairTerms, wanted: PairCoefficients, into: Into = NEW) -> Tensor:
        """Gradient by the student's logits or by the teacher's, given terms over the whole vocabulary.

        Of the sum of coef * KL; with beta: coef * p * (log(p / M) - kl) for the distribution p of these logits.
        """
        ...

    def pair_terms_and_grad(self, pairs: Pairs, coef_T: Tensor, into: Into = NEW) -> tuple[PairTerms, Tensor]:
        """Terms, and the student's gradient, in one visit of each pair of rows."""
        ...

    def products(self, operand_dtype: torch.dtype, device: torch.device) -> Products:
        """What multiplies, for `kernels.linear_pairs`."""
        ...

    def linear_blocks(self, linear: LinearPairs) -> Blocks:
        """How `kernels.linear_pairs` cuts up the logits."""
        ...

    def operand_dtype(self, product_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """Dtype in which the logits' gradient enters its two matrix products."""
        ...

    def linear_terms(self, linear: Linear, sums: Sums, keep_logits: bool) -> tuple[RowTerms, Tensor]:
        """Terms over these rows of the weight; and what `linear_grads` takes as `logits`.

        Args:
            keep_logits: whether `linear_grads` will follow. The logits are kept if they fit the memory of one block
                and are no more than `block_tokens` rows, else (or if False) the second result is empty.
        """
        ...

    def linear_grads(
        self, linear: Linear, terms: RowTerms, coefficients: Coefficients, want: Wanted, logits: Tensor
    ) -> LinearGrads:
        """Gradients by h in the dtype of the arithmetic, by W and b in their own.

        Args:
            terms: over the whole vocabulary.
            coefficients: likewise.
            want: which of them are made; another is empty.
            logits: of `linear_terms`, overwritten; empty: they are computed again.
        """
        ...

    def linear_terms_and_grads(
        self, linear: Linear, coef_T: Tensor, objective: Objective, want: Wanted
    ) -> tuple[RowTerms, LinearGrads]:
        """Terms, and the gradients of the sum of coef * loss in the dtype of the arithmetic, with three products."""
        ...

    def scaled(self, grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """A gradient times a scalar, rounded once; it may be overwritten."""
        ...


# The label of an ignored token in what `WholeLosses.linear_cross_entropy` gets: no number that a caller would give.
IGNORED = -(1 << 63)


class WholeLosses:
    """What `plain` and `te` are: they make the loss of each token whole, in operations that autograd knows.

    A method that is not overridden is a loss that the flag does not have.
    """

    flag: str

    def batch_invariant(self, row_bytes: int) -> bool:
        """As of `KernelSet`. No promise: PyTorch shares one long row among its threads, of several it does not."""
        return False

    def cross_entropy(self, rows: Rows, objective: Objective, group: Any, reduction: str = "none") -> Tensor:
        """Loss of each token, [T] in the dtype of the arithmetic; 0 for ignored ones.

        Args:
            group: over which the vocabulary is sharded in equal parts, or None.
            reduction: "none"; or "sum" or "mean" of all tokens, where none is ignored.
        """
        raise NotImplementedError

    def distillation(self, pairs: Pairs, beta: float) -> Tensor:
        """KL(teacher || student) of each token, not times T^2; else as `cross_entropy`.

        Args:
            beta: in (0, 1): the generalized Jensen-Shannon divergence instead.
        """
        raise NotImplementedError

    def linear_distillation(self, linear: LinearPairs, beta: float) -> Tensor:
        """As `distillation`, of the logits of each token."""
        raise NotImplementedError

    def log_probs(self, rows: Rows, with_entropy: bool) -> tuple[Tensor, ...]:
        """Log-probability of each token's label, and its entropy if asked for; else as `cross_entropy`."""
        raise NotImplementedError

    def linear_log_probs(self, linear: Linear, with_entropy: bool) -> tuple[Tensor, ...]:
        """As `log_probs`, of the logits of each token."""
        raise NotImplementedError

    def linear_cross_entropy(self, linear: Linear, objective: Objective) -> Tensor:
        """Cross entropy of the logits of each token; else as `cross_entropy`."""
        raise NotImplementedError

    def top_k_distillation(self, rows: Rows, teacher: TopK) -> Tensor:
        """Divergence of each token from a teacher of the row's K labels, not times T^2; else as `cross_entropy`."""
        raise NotImplementedError

    def linear_top_k_distillation(self, linear: Linear, labels_TK: Tensor, teacher: TopK) -> Tensor:
        """As `top_k_distillation`, of the logits of each token."""
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
