"""Configs of the cross entropies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from loss_core.field_checks import check_fields, check_metrics
from loss_core.loss_config import LossConfig
from loss_core.registry import typed_loss

# Fields of all cross entropies except the chunked one.
_OPTIONS = ("ignore_index", "reduction", "label_smoothing", "z_loss", "logit_softcapping")


@typed_loss("MaskedCrossEntropy", "cross_entropy")
@dataclass
class MaskedCrossEntropyConfig(LossConfig):
    """Cross entropy over logits `[..., V]`, with a mask.

    Attributes:
        fp32_upcast: True: the loss is returned in float32 (float64 for float64 logits);
            False: in the dtype of the logits, as by F.cross_entropy.
        ignore_index: label of the tokens to ignore; any 64-bit integer.
        reduction: "sum", "mean" (over valid tokens) or "none".
        tp_group: as in TEParallelCEConfig.
        inplace_grad: True: the backward writes the gradient in place of the caller's logits (torch only).
        label_smoothing: e in [0, 1): (1 - e) times the cross entropy, plus e times its mean over all V classes as
            labels, as in F.cross_entropy.
        z_loss: l in l * (log-sum-exp of the logits)^2, which is added to each token's loss; 0 is off.
        logit_softcapping: c in `c * tanh(logits / c)`, in logit units; 0 is off, else 2**-63 to 2**63.
        metrics: names among "accuracy", "entropy", "lse", "z_loss", "num_valid". If not empty, a call returns the loss
            and a dict of metrics without gradients. Per token: whether the label has the largest logit, the entropy of
            the distribution in nats, log-sum-exp, the z_loss term; each reduced as the loss is, count and weights
            included. num_valid is the number of valid tokens.
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
        ignore_index: label of the tokens to ignore; any 64-bit integer.
        logit_softcapping: c in `c * tanh(logits / c)`, in logit units; 0 is off, else 2**-63 to 2**63.
        reduction: "sum", "mean" (over valid tokens) or "none".
        tp_group: as in TEParallelCEConfig, for the rows of lm_weight.
        sequence_parallel: True: hidden_states are sharded evenly along the sequence over tp_group; they are gathered,
            and their gradient is reduce-scattered. False: they are replicated on every rank.
        skip_ignored: whether to exclude ignored tokens from the matrix products. None: where it costs nothing (on a
            CPU; in JAX by chunks of 512 tokens); True: everywhere, with one host sync per call on an accelerator;
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
        ignore_index: label of the tokens to ignore; any 64-bit integer.
        reduction: "sum", "mean" (over valid tokens) or "none".
        tp_group: group over which the vocabulary is sharded, or None. torch: a ProcessGroup or a 1-D DeviceMesh; jax:
            the name of a mesh axis, or a tuple of names. A runtime handle: omitted from dicts, repr and comparison.
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
    """Cross entropy of `hidden_states @ lm_weight.T`, with a limit on the tokens whose logits are stored at a time.

    The fields are those of `ChunkedCrossEntropy` in NeMo AutoModel. FusedLinearCEConfig also has softcap, label
    smoothing, z-loss and tensor parallel, and lets the kernels choose their block sizes.

    Attributes:
        chunk_len: maximum number of tokens whose logits are stored at a time, >= 1; kernels may use fewer. The same
            limit holds for the logits' gradient.
        compile: whether kernels compiled by torch.compile or XLA may be used. False: jax can't be used; torch has no
            compiled kernel of this loss.
        ignore_index: label of the tokens to ignore; any 64-bit integer.
        reduction: "sum", "mean" (over valid tokens) or "none".
    """

    chunk_len: int = 512
    compile: bool = True
    ignore_index: int = -100
    reduction: str = "sum"

    # Not a field: the definition reads it, but this loss has no softcap.
    logit_softcapping: ClassVar[float] = 0.0

    def validate(self) -> None:
        check_fields(self, "chunk_len", "compile", "ignore_index", "reduction")
