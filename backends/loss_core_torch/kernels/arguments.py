"""What kernel sets take and give, besides row terms."""

# T = tokens (rows), V = vocabulary (of this rank), H = hidden, K = targets of a row

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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

    @property
    def heads(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Hidden states and weight."""
        return ((self.h_TH, self.w_VH),)

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

    @property
    def heads(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Hidden states and weight of student and teacher."""
        return (self.student_TH, self.student_VH), (self.teacher_TH, self.teacher_VH)


class Wanted(NamedTuple):
    """Which gradients of a fused loss are made."""

    hidden: bool
    weight: bool
    bias: bool = False

    @property
    def products(self) -> int:
        """Matrix products: one for the logits, and one for each gradient that needs one."""
        return 1 + self.hidden + self.weight


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
        factor: of coef_T, a scalar; None for 1.
    """

    kl_T: Tensor
    coef_T: Tensor
    of_teacher: bool
    beta: float = 0.0
    factor: Tensor | None = None

    def folded(self) -> PairCoefficients:
        """The same gradient with the factor in coef_T."""
        return self if self.factor is None else self._replace(coef_T=self.coef_T * self.factor, factor=None)


class HeadSizes(NamedTuple):
    """What sizes of blocks are chosen by.

    Attributes:
        num_tokens, vocab, hidden: of the head, or of the student's.
        logit_bytes: of a logit in the dtype of the arithmetic, or of one of each head and what is beside them.
        beside_bytes: of an entry of the logits' gradient that has memory of its own; 0 where it is written over them.
        rounded_bytes: of the tensor to which the gradient of the weight is rounded in the end, when the memory of a
            block is free again; 0 where it is not rounded.
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
    """How the logits of a head are cut up.

    Attributes:
        tokens: of a block of the logits' gradient.
        logits_tokens: those of them whose logits exist at a time.
        classes: of a block.
    """

    tokens: int
    logits_tokens: int
    classes: int
