"""Typed configs of the losses: plain dataclasses that hold what a loss is, not how it is computed.

A config names no framework. `config.build(backend="torch" | "jax" | ...)` makes the callable.
Field names, order and defaults of the first four, and of the last two, are those of
`nemo_automodel.components.loss.loss` (NVIDIA NeMo AutoModel), so that recipes carry over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loss_core.field_checks import (
    DIVERGENCES,
    check_bool,
    check_choice,
    check_fraction,
    check_integer,
    check_metrics,
    check_number,
    check_reduction,
)
from loss_core.loss_config import LossConfig
from loss_core.registry import typed_loss


@typed_loss("MaskedCrossEntropy", "cross_entropy")
@dataclass
class MaskedCrossEntropyConfig(LossConfig):
    """Cross entropy over logits `[..., V]`, with a mask.

    Attributes:
        fp32_upcast: True: the loss comes in float32 (float64 for float64 logits);
            False: in the dtype of the logits, as F.cross_entropy gives it.
        ignore_index: label that marks a position to leave out; any integer of 64 bits.
        reduction: "sum", "mean" (over positions that count) or "none".
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
        check_bool("fp32_upcast", self.fp32_upcast)
        check_integer("ignore_index", self.ignore_index)
        check_reduction(self.reduction)
        check_number("label_smoothing", self.label_smoothing, "a number in [0, 1)", zero=True, below=1.0)
        check_number("z_loss", self.z_loss, "a finite number >= 0 (0 is off)", zero=True)
        check_number("logit_softcapping", self.logit_softcapping, "a finite number >= 0 (0 is off)", zero=True)
        check_bool("inplace_grad", self.inplace_grad)
        self.metrics = check_metrics(self.metrics)


@typed_loss("FusedLinearCrossEntropy", "linear_cross_entropy")
@dataclass
class FusedLinearCEConfig(LossConfig):
    """Cross entropy of `hidden_states @ lm_weight.T`, without ever holding all logits.

    Attributes:
        ignore_index: label that marks a position to leave out; any integer of 64 bits.
        logit_softcapping: c in `c * tanh(logits / c)`, in logit units; 0 is off, else 2**-63 to 2**63.
        reduction: "sum", "mean" (over positions that count) or "none".
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
        check_integer("ignore_index", self.ignore_index)
        check_number("logit_softcapping", self.logit_softcapping, "a finite number >= 0 (0 is off)", zero=True)
        check_reduction(self.reduction)
        check_number("label_smoothing", self.label_smoothing, "a number in [0, 1)", zero=True, below=1.0)
        check_number("z_loss", self.z_loss, "a finite number >= 0 (0 is off)", zero=True)
        check_bool("sequence_parallel", self.sequence_parallel)
        self.metrics = check_metrics(self.metrics)
        if self.skip_ignored is not None and not isinstance(self.skip_ignored, bool):
            raise ValueError(f"skip_ignored must be True, False or None, got {self.skip_ignored!r}.")


@typed_loss("TEParallelCrossEntropy", "cross_entropy")
@dataclass
class TEParallelCEConfig(LossConfig):
    """Cross entropy over logits whose vocabulary may be sharded over a tensor-parallel group.

    Attributes:
        ignore_index: label that marks a position to leave out; any integer of 64 bits.
        reduction: "sum", "mean" (over positions that count) or "none".
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
        check_integer("ignore_index", self.ignore_index)
        check_reduction(self.reduction)
        check_number("label_smoothing", self.label_smoothing, "a number in [0, 1)", zero=True, below=1.0)
        check_number("z_loss", self.z_loss, "a finite number >= 0 (0 is off)", zero=True)
        check_number("logit_softcapping", self.logit_softcapping, "a finite number >= 0 (0 is off)", zero=True)
        check_bool("inplace_grad", self.inplace_grad)
        self.metrics = check_metrics(self.metrics)


@typed_loss("KDLoss", "distillation")
@dataclass
class KDLossConfig(LossConfig):
    """Knowledge distillation: a divergence of the student from the teacher at temperature T, times T^2.

    Attributes:
        ignore_index: label that marks a position to leave out; any integer of 64 bits.
        temperature: softmax temperature T, no unit; 2**-63 to 2**63.
        fp32_upcast: True: the loss comes in float32 (float64 for float64 logits);
            False: in the dtype of the student's logits.
        tp_group: as in TEParallelCEConfig.
        chunk_size: tokens computed at a time, >= 0; 0 lets the kernel choose.
        divergence: "forward_kl": KL(teacher || student); "reverse_kl": KL(student || teacher); "jsd": the generalized
            Jensen-Shannon divergence, beta KL(teacher || M) + (1 - beta) KL(student || M) with the mixture
            M = beta teacher + (1 - beta) student (Agarwal et al. 2024, arXiv:2306.13649, equation 1).
        beta: share of the teacher in the mixture, in [0, 1]; for "jsd" alone. At 0 and 1 that divergence is 0, and the
            loss is its limit after division by beta and by 1 - beta: 0 is "forward_kl", 1 is "reverse_kl", as in TRL's
            GKDTrainer.
    """

    ignore_index: int = -100
    temperature: float = 1.0
    fp32_upcast: bool = True
    tp_group: Any = field(default=None, repr=False, compare=False)
    chunk_size: int = 0
    divergence: str = "forward_kl"
    beta: float = 0.5

    def validate(self) -> None:
        check_integer("ignore_index", self.ignore_index)
        check_number("temperature", self.temperature, "a finite number > 0")
        check_bool("fp32_upcast", self.fp32_upcast)
        check_integer("chunk_size", self.chunk_size, low=0)
        check_choice("divergence", self.divergence, DIVERGENCES)
        check_fraction("beta", self.beta)


@typed_loss("LogProbs", "log_probs")
@dataclass
class LogProbsConfig(LossConfig):
    """Log-probability of each label over logits `[..., V]`, and the entropy of its distribution, both differentiable.

    Attributes:
        ignore_index: label that marks a position to leave out: 0 in the results; any integer of 64 bits.
        temperature: divides the logits, no unit; 2**-63 to 2**63. A call may bring one of its own.
        logit_softcapping: as in MaskedCrossEntropyConfig; before the temperature.
        entropy: whether the entropy is returned as well.
        tp_group: as in TEParallelCEConfig.
    """

    ignore_index: int = -100
    temperature: float = 1.0
    logit_softcapping: float = 0.0
    entropy: bool = False
    tp_group: Any = field(default=None, repr=False, compare=False)

    def validate(self) -> None:
        check_integer("ignore_index", self.ignore_index)
        check_number("temperature", self.temperature, "a finite number > 0")
        check_number("logit_softcapping", self.logit_softcapping, "a finite number >= 0 (0 is off)", zero=True)
        check_bool("entropy", self.entropy)


@typed_loss("FusedLinearLogProbs", "linear_log_probs")
@dataclass
class FusedLinearLogProbsConfig(LossConfig):
    """Log-probability and entropy of logits `hidden_states @ lm_weight.T`, without ever holding all logits.

    Attributes:
        ignore_index: as in LogProbsConfig.
        temperature: as in LogProbsConfig.
        logit_softcapping: as in LogProbsConfig.
        entropy: as in LogProbsConfig.
        tp_group: as in TEParallelCEConfig, for the rows of lm_weight.
        sequence_parallel: as in FusedLinearCEConfig.
    """

    ignore_index: int = -100
    temperature: float = 1.0
    logit_softcapping: float = 0.0
    entropy: bool = False
    tp_group: Any = field(default=None, repr=False, compare=False)
    sequence_parallel: bool = False

    def validate(self) -> None:
        check_integer("ignore_index", self.ignore_index)
        check_number("temperature", self.temperature, "a finite number > 0")
        check_number("logit_softcapping", self.logit_softcapping, "a finite number >= 0 (0 is off)", zero=True)
        check_bool("entropy", self.entropy)
        check_bool("sequence_parallel", self.sequence_parallel)


@typed_loss("FusedLinearKDLoss", "linear_distillation")
@dataclass
class FusedLinearKDConfig(LossConfig):
    """KDLossConfig's loss between two heads, `hidden_states @ lm_weight.T` each, without ever holding all logits.

    Attributes:
        ignore_index: as in KDLossConfig.
        temperature: as in KDLossConfig.
        tp_group: as in TEParallelCEConfig, for the rows of both lm_weights.
        divergence: as in KDLossConfig.
        beta: as in KDLossConfig.
        sequence_parallel: as in FusedLinearCEConfig, for the hidden states of both.
    """

    ignore_index: int = -100
    temperature: float = 1.0
    tp_group: Any = field(default=None, repr=False, compare=False)
    divergence: str = "forward_kl"
    beta: float = 0.5
    sequence_parallel: bool = False

    def validate(self) -> None:
        check_integer("ignore_index", self.ignore_index)
        check_number("temperature", self.temperature, "a finite number > 0")
        check_choice("divergence", self.divergence, DIVERGENCES)
        check_fraction("beta", self.beta)
        check_bool("sequence_parallel", self.sequence_parallel)


@typed_loss("TopKDistillation", "top_k_distillation")
@dataclass
class TopKDistillationConfig(LossConfig):
    """Distillation from a teacher of which K log-probabilities per token are known: KL(teacher || student), times T^2.

    The teacher's log-probabilities are taken as they are given, as those at temperature T; temperature and softcap are
    the student's. With all classes known the loss is that of KDLossConfig, T^2 included.

    Attributes:
        ignore_index: as in KDLossConfig.
        temperature: softmax temperature T, no unit; 2**-63 to 2**63.
        fp32_upcast: as in KDLossConfig.
        tp_group: as in TEParallelCEConfig.
        logit_softcapping: as in MaskedCrossEntropyConfig; before the temperature.
        tail: True: all other classes together are one more class, which has the rest of either's probability; False:
            the sum of p (log p - log q) over the K classes, with p and q as they are: neither is renormalised, and
            the sum may be negative.
    """

    ignore_index: int = -100
    temperature: float = 1.0
    fp32_upcast: bool = True
    tp_group: Any = field(default=None, repr=False, compare=False)
    logit_softcapping: float = 0.0
    tail: bool = True

    def validate(self) -> None:
        check_integer("ignore_index", self.ignore_index)
        check_number("temperature", self.temperature, "a finite number > 0")
        check_bool("fp32_upcast", self.fp32_upcast)
        check_number("logit_softcapping", self.logit_softcapping, "a finite number >= 0 (0 is off)", zero=True)
        check_bool("tail", self.tail)


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
        reduction: "sum", "mean" (over positions that count) or "none".
    """

    chunk_len: int = 512
    compile: bool = True
    ignore_index: int = -100
    reduction: str = "sum"

    # No field: what its definition asks for and this loss does not have.
    logit_softcapping = 0.0

    def validate(self) -> None:
        check_integer("chunk_len", self.chunk_len, low=1)
        check_bool("compile", self.compile)
        check_integer("ignore_index", self.ignore_index)
        check_reduction(self.reduction)


@typed_loss("FusedLinearTopKDistillation", "linear_top_k_distillation")
@dataclass
class FusedLinearTopKDistillationConfig(LossConfig):
    """TopKDistillation of logits `hidden_states @ lm_weight.T`, without ever holding all logits.

    Attributes:
        ignore_index: as in KDLossConfig.
        temperature: as in TopKDistillationConfig.
        logit_softcapping: as in TopKDistillationConfig.
        tail: as in TopKDistillationConfig.
        tp_group: as in TEParallelCEConfig, for the rows of lm_weight.
        sequence_parallel: as in FusedLinearCEConfig.
    """

    ignore_index: int = -100
    temperature: float = 1.0
    logit_softcapping: float = 0.0
    tail: bool = True
    tp_group: Any = field(default=None, repr=False, compare=False)
    sequence_parallel: bool = False

    def validate(self) -> None:
        check_integer("ignore_index", self.ignore_index)
        check_number("temperature", self.temperature, "a finite number > 0")
        check_number("logit_softcapping", self.logit_softcapping, "a finite number >= 0 (0 is off)", zero=True)
        check_bool("tail", self.tail)
        check_bool("sequence_parallel", self.sequence_parallel)


@dataclass
class LossFromFactoryConfig(LossConfig):
    """A loss made by any class or callable: `factory(**kwargs)`.

    The factory decides the framework, so `build` takes no backend flag.

    Attributes:
        factory: callable that returns the loss.
        kwargs: its keyword arguments.
    """

    # Any, not Callable: OmegaConf accepts no Callable annotation in a structured config.
    factory: Any = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def build(self, *, backend: str | None = None) -> Any:
        """Call the factory.

        Raises:
            AssertionError: factory is not callable (the type is the peer's).
            ValueError: a backend flag was given.
        """
        # An AssertionError is what callers of the peer's class catch; raised by hand so that
        # `python -O` keeps it.
        if not callable(self.factory):
            raise AssertionError(f"LossFromFactoryConfig.factory must be a callable, got {self.factory!r}.")
        if backend is not None:
            raise ValueError(
                f"backend={backend!r} can't be applied to the factory {factory_name(self.factory)}: a factory is of "
                "one framework. Leave the flag out, or register the loss with loss_core.register_loss."
            )
        if not isinstance(self.kwargs, Mapping):
            raise ValueError(f"LossFromFactoryConfig.kwargs must be a dict of arguments, got {self.kwargs!r}.")
        return self.factory(**self.kwargs)


def factory_name(factory: Any) -> str:
    """A readable name of a callable, for messages."""
    return getattr(factory, "__qualname__", None) or repr(factory)
