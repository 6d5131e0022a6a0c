"""Configs of the cross entropies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from loss_core.field_checks import check_fields, check_metrics
from loss_core.loss_config import LossConfig
from loss_core.registry import typed_loss

# Fields of all cross entropies but the chunked one.
_OPTIONS = ("ignore_index", "reduction", "label_smoothing", "z_loss", "logit_softcapping")


@typed_loss("MaskedCrossEntropy", "cross_entropy")
@dataclass
class MaskedCrossEntropyConfig(LossConfig):
    """Cross entropy over logits `[..., V]`, with a mask.

    Attributes:
        fp32_upcast: True: the loss comes in float32 (float64 for float64 logits);
            False: in the dtype of the logits, as F.cross_entropy gives it.
        ignore_index: label that marks a position to leave out; any integer of 64 bits.
        reduction: "sum", "mean" (over valid positions) or "none".
        tp_group: as in TEParallelCEConfig.
        inplace_grad: True: the backward writes the gradient over the caller's logits (torch only).
        label_smoothing: e in [0, 1): (1 - e) * cross entropy, plus e times its mean over all V classes taken as the
            label, as F.cross_entropy has it.
        z_loss: l in l * (log-sum-exp of the logits)^2, which each token's loss has besides; 0 is off.
        logit_softcapping: c in `c * tanh(logits / c)`, in logit units; 0 is off, else 2**-63 to 2**63.
        metrics: names among "accuracy", "entropy", "lse", "z_loss", "num_valid"; with any, a call returns the loss and
            a dict of them, not differentiated: of each token whether no logit is above its label's, the entropy of
            its distribution in nats, log-sum-exp, its share of z_loss, each reduced as the loss is (count and weights
            included); and how many tokens count.
    """

    fp32_upcast: bool = True
    ignore_index: int = -100
    reduction: str = "sum"
    tp_group: Any = field(default=None, repr=False, compare=False)
    inplace_grad: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logit_softcapping: float = 0.0
    metrics: tuple[str, ...] = ()

    def validate(self) -> None:
        check_fields(self, *_OPTIONS, "fp32_upcast", "inplace_grad")
        self.metrics = check_metrics(self.metrics)


@typed_loss("FusedLinearCrossEntropy", "linear_cross_entropy")
@dataclass
class FusedLinearCEConfig(LossConfig):
    """Cross entropy of `hidden_states @ lm_weight.T`, without ever holding all logits.

    Attributes:
        ignore_index: label that marks a position to leave out; any integer of 64 bits.
        logit_softcapping: c in `c * tanh(logits / c)`, in logit units; 0 is off, else 2**-63 to 2**63.
        reduction: "sum", "mean" (over valid positions) or "none".
        tp_group: as in TEParallelCEConfig, for the rows of lm_weight.
        sequence_parallel: True: each rank of tp_group holds an equal share of the sequence of hidden_states, which
            are gathered, and their gradient is reduce-scattered; False: every rank holds all of them.
        skip_ignored: whether ignored tokens stay out of the matrix products. None: where it costs nothing (on a
            CPU; in JAX by chunks of 512 tokens); True: everywhere, for one host sync per call on an accelerator;
            False: never.
        label_smoothing: as in MaskedCrossEntropyConfig.
        z_loss: as in MaskedCrossEntropyConfig.
        metrics: as in MaskedCrossEntropyConfig.
    """

    ignore_index: int = -100
    logit_softcapping: float = 0.0
    reduction: str = "sum"
    tp_group: Any = field(default=None, repr=False, compare=False)
    sequence_parallel: bool = False
    skip_ignored: bool | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    metrics: tuple[str, ...] = ()

    def validate(self) -> None:
        check_fields(self, *_OPTIONS, "sequence_parallel")
        self.metrics = check_metrics(self.metrics)
        if self.skip_ignored is not None and not isinstance(self.skip_ignored, bool):
            raise ValueError(f"skip_ignored must be True, False or None, got {self.skip_ignored!r}.")


@typed_loss("TEParallelCrossEntropy", "cross_entropy")
@dataclass
class TEParallelCEConfig(LossConfig):
    """Cross entropy over logits whose vocabulary may be sharded over a tensor-parallel group.

    Attributes:
        ignore_index: label that marks a position to leave out; any integer of 64 bits.
        reduction: "sum", "mean" (over valid positions) or "none".
        tp_group: over which the vocabulary is sharded, or None. torch: a ProcessGroup or a 1-D DeviceMesh; jax: the
            name of a mesh axis, or a tuple of names. A runtime handle: left out of dicts, repr and comparison.
        inplace_grad: as in MaskedCrossEntropyConfig.
        label_smoothing: as in MaskedCrossEntropyConfig.
        z_loss: as in MaskedCrossEntropyConfig.
        logit_softcapping: as in MaskedCrossEntropyConfig.
        metrics: as in MaskedCrossEntropyConfig.
    """

    ignore_index: int = -100
    reduction: str = "sum"
    tp_group: Any = field(default=None, repr=False, compare=False)
    inplace_grad: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logit_softcapping: float = 0.0
    metrics: tuple[str, ...] = ()

    def validate(self) -> None:
        check_fields(self, *_OPTIONS, "inplace_grad")
        self.metrics = check_metrics(self.metrics)


@typed_loss("ChunkedCrossEntropy", "linear_cross_entropy")
@dataclass
class ChunkedCEConfig(LossConfig):
    """Cross entropy of `hidden_states @ lm_weight.T`, with a bound on the tokens whose logits exist at a time.

    The fields of `ChunkedCrossEntropy` of NeMo AutoModel and no more: FusedLinearCEConfig has softcap, label smoothing,
    z-loss and tensor parallel, and lets the kernels choose their blocks.

    Attributes:
        chunk_len: most tokens whose logits exist at a time, >= 1; kernels may take fewer. The logits' gradient takes no
            more entries than so many rows have.
        compile: whether kernels may run that torch.compile or XLA compiles. False: jax can't be used; on torch no
            kernel of this loss is such a one.
        ignore_index: label that marks a position to leave out; any integer of 64 bits.
        reduction: "sum", "mean" (over valid positions) or "none".
    """

    chunk_len: int = 512
    compile: bool = True
    ignore_index: int = -100
    reduction: str = "sum"

    # No field: what its definition asks for and this loss does not have.
    logit_softcapping: ClassVar[float] = 0.0

    def validate(self) -> None:
        check_fields(self, "chunk_len", "compile", "ignore_index", "reduction")
