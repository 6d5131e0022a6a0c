"""Arguments and results of kernel sets, besides row terms."""

# T = tokens (rows), V = vocabulary (of this rank), H = hidden, K = targets of a row

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Rows of logits, with the targets and options of each row.

    Attributes:
        logits: [..., V] float, any strides.
        labels_T: int64 indices of the targets in the full vocabulary; outside of it for a target that no rank owns.
            [T]; or [T, K], strictly ascending in each row: then terms exclude these columns, see `RowTerms`.
        keep_T: [T] bool, False for ignored rows; None: no row is ignored.
        vocab_start: index of the first column in the full vocabulary.
        softcap: c of z = c * tanh(logits / c); terms are those of z; 0: no softcap.
        inverse_temperature_T: [T] factor of z, applied after the softcap, or None.
    """

    logits: Tensor
    labels_T: Tensor
    keep_T: Tensor | None
    vocab_start: int = 0
    softcap: float = 0.0
    inverse_temperature_T: Tensor | None = None


def whole_rows(rows: Rows) -> tuple[Tensor, Tensor]:
    """z [T, V] in the dtype of the arithmetic, and its derivative dz/dlogits [T, V]; for kernels without blocks."""
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
    """Logits of student and teacher.

    Attributes:
        student, teacher: [..., V] float, any strides.
        keep_T: as in `Rows`.
        inverse_temperature: factor of both.
        chunk_size: maximum number of rows of a temporary; 0: the kernel set chooses.
    """

    student: Tensor
    teacher: Tensor
    keep_T: Tensor | None
    inverse_temperature: float
    chunk_size: int = 0


class HeadOperands(NamedTuple):
    """Operands of the logits h @ W.T + b of a head.

    Attributes:
        h_TH: [T, H] float; w_VH: [V, H] float.
        product_dtype: dtype to which both are rounded.
        bias_V: [V] float, added in the dtype of the arithmetic, or None.
    """

    h_TH: Tensor
    w_VH: Tensor
    product_dtype: torch.dtype
    bias_V: Tensor | None = None


class Linear(NamedTuple):
    """Logits softcap(h @ W.T + b), computed in blocks and never materialized in full. No row is ignored.

    Attributes:
        head: h, W and b.
        labels_T, vocab_start, softcap, inverse_temperature_T: as in `Rows`.
        block_tokens: memory limit, in rows of V elements, for the logits and for their gradient that exist at a time;
            0: the kernel set chooses.
    """

    head: HeadOperands
    labels_T: Tensor
    vocab_start: int = 0
    softcap: float = 0.0
    inverse_temperature_T: Tensor | None = None
    block_tokens: int = 0

    @property
    def heads(self) -> tuple[HeadOperands, ...]:
        return (self.head,)

    def block(self, chosen: int) -> int:
        """Tokens per block: `chosen`, limited by `block_tokens`."""
        return min(chosen, self.block_tokens) if self.block_tokens else chosen


class LinearPairs(NamedTuple):
    """Logits of student and teacher, computed in blocks and never materialized in full.

    Attributes:
        student, teacher: without a bias; hidden sizes may differ; hidden states are 0 in ignored rows.
        keep_T, inverse_temperature: as in `Pairs`.
    """

    student: HeadOperands
    teacher: HeadOperands
    keep_T: Tensor | None
    inverse_temperature: float

    @property
    def heads(self) -> tuple[HeadOperands, ...]:
        return self.student, self.teacher


class Wanted(NamedTuple):
    """Which gradients of a fused loss are computed."""

    hidden: bool
    weight: bool
    bias: bool = False

    @property
    def products(self) -> int:
        """Number of matrix products: one for the logits, and one each for the gradients of hidden states and weight."""
        return 1 + self.hidden + self.weight


class LinearGrads(NamedTuple):
    """Gradients of a fused loss; empty tensors where they are not wanted."""

    hidden_TH: Tensor
    weight_VH: Tensor
    bias_V: Tensor

    def rounded(self, head: HeadOperands) -> LinearGrads:
        """The same, with the gradients of weight and bias in the dtypes of these operands."""
        bias_V = self.bias_V if head.bias_V is None else self.bias_V.to(head.bias_V.dtype)
        return self._replace(weight_VH=self.weight_VH.to(head.w_VH.dtype), bias_V=bias_V)


class BothWanted(NamedTuple):
    """Which gradients of student and teacher are computed."""

    student: Wanted
    teacher: Wanted


class BothGrads(NamedTuple):
    """Gradients of the hidden states and weights of student and teacher."""

    student: LinearGrads
    teacher: LinearGrads


class PairCoefficients(NamedTuple):
    """Which gradient of pairs of rows to compute, and its coefficients.

    Attributes:
        kl_T: [T] KL(teacher || student); with beta, KL(p || mixture), p being the teacher or student (`of_teacher`).
        coef_T: [T] factor of each row, all factors of temperature and, with beta, of the divergence included.
        of_teacher: whether the gradient is that of the teacher's logits, or of the student's.
        beta: weight of the teacher in the mixture, in (0, 1); 0: no mixture.
        factor: scalar factor of coef_T; None for 1.
    """

    kl_T: Tensor
    coef_T: Tensor
    of_teacher: bool
    beta: float = 0.0
    factor: Tensor | None = None

    def folded(self) -> PairCoefficients:
        """The same gradient, with the factor multiplied into coef_T."""
        return self if self.factor is None else self._replace(coef_T=self.coef_T * self.factor, factor=None)


class HeadSizes(NamedTuple):
    """Sizes from which a kernel set chooses its blocks.

    Attributes:
        num_tokens, vocab, hidden: of the head; for pairs, of the student's head.
        logit_bytes: bytes per logit in the dtype of the arithmetic; for pairs, of both logits and a separate gradient.
        beside_bytes: bytes per entry of the logits' gradient in separate memory; 0 if it overwrites the logits.
        rounded_bytes: bytes of the rounded copy of the weight's gradient, allocated after the memory of the last block
            is freed; 0 if the gradient is not rounded.
        device: of the tensors.
    """

    num_tokens: int
    vocab: int
    hidden: int
    logit_bytes: int
    beside_bytes: int
    rounded_bytes: int
    device: torch.device


class Blocks(NamedTuple):
    """Block sizes for the logits of a head.

    Attributes:
        tokens: tokens per block of the logits' gradient.
        logits_tokens: tokens of such a block whose logits exist at a time.
        classes: classes per block.
    """

    tokens: int
    logits_tokens: int
    classes: int
