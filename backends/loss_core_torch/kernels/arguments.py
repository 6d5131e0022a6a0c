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


class HeadOperands(NamedTuple):
    """What the logits h @ W.T + b of a head are made of.

    Attributes:
        h_TH: [T, H] float; w_VH: [V, H] float.
        product_dtype: dtype to which these are rounded.
        bias_V: [V] float, added in the dtype of the arithmetic, or None.
    """

    h_TH: Tensor
    w_VH: Tensor
    product_dtype: torch.dtype
    bias_V: Tensor | None = None


class Linear(NamedTuple):
    """Logits softcap(h @ W.T + b) that are never held whole. No row is ignored.

    Attributes:
        head: h, W and b.
        labels_T, vocab_start, softcap, inverse_temperature_T: as in `Rows`.
        block_tokens: most tokens whose logits exist at a time, and most rows of logits whose entries their gradient
            takes; 0: the set chooses.
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
        """Tokens of a block where the set would choose so many."""
        return min(chosen, self.block_tokens) if self.block_tokens else chosen


class LinearPairs(NamedTuple):
    """Logits of two distributions that are never held whole.

    Attributes:
        student, teacher: without a bias; with hidden sizes of their own, and hidden states of 0 in rows to ignore.
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

    def rounded(self, head: HeadOperands) -> LinearGrads:
        """Those of weight and bias in the dtypes of these operands."""
        by_b_V = self.bias_V if head.bias_V is None else self.bias_V.to(head.bias_V.dtype)
        return self._replace(weight_VH=self.weight_VH.to(head.w_VH.dtype), bias_V=by_b_V)


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
