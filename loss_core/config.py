"""Typed configs of the losses: plain dataclasses that hold what a loss is, not how it is computed.

A config names no framework. `config.build(backend="torch" | "jax" | ...)` makes the callable.
Field names, order and defaults of the five configs are those of
`nemo_automodel.components.loss.loss` (NVIDIA NeMo AutoModel), so that recipes carry over.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from loss_core.dispatch.builders import build
from loss_core.field_checks import (
    DIVERGENCES,
    check_bool,
    check_choice,
    check_fraction,
    check_integer,
    check_known,
    check_number,
    check_reduction,
    fields_of,
    is_runtime_field,
    plain_value,
)
from loss_core.registry import config_class_for, registered_name, typed_loss


# No dataclass itself: parsers that fill dataclasses from mappings (dacite) would take it for a loss without fields.
class LossConfig:
    """Base of every loss config.

    Subclass it as a dataclass and either register builders for it with
    `loss_core.register_loss`, or override `build(self)`.

    A field made with `field(default=None, repr=False, compare=False)` holds a live handle, such as a process group: it
    belongs to one process, so it enters no dict either.
    """

    if TYPE_CHECKING:
        # Every class that derives from it is one, so that `fields` and `replace` take a LossConfig.
        __dataclass_fields__: ClassVar[dict[str, Any]]

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise ValueError for a field whose value is not accepted. Called on creation and on build."""

    def build(self, *, backend: str = "torch") -> Any:
        """Build the loss.

        Args:
            backend: flag `BACKEND[:KERNEL]`, such as "torch", "torch:eager", "jax:xla".
        Returns:
            A `torch.nn.Module` for torch, a hashable callable for JAX.
        Raises:
            ValueError: the flag is unknown, or a field has been set to a value that is not accepted.
            BackendUnavailable: the flag is known but can't be used here; says why and what to install.
            NotImplementedError: the config has no builder.
        """
        self.validate()
        return build(self, backend)

    def to_dict(self) -> dict[str, Any]:
        """Fields as plain values, with the registry name under "name". Runtime handles are left out."""
        name = registered_name(type(self))
        values = {
            f.name: plain_value(copy.deepcopy(getattr(self, f.name))) for f in fields(self) if not is_runtime_field(f)
        }
        return {"name": name, **values}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make a config from `to_dict`'s result, or from a YAML mapping of the same form.

        Called on `LossConfig`, "name" chooses the class; called on a subclass, "name" may be left
        out and must agree when it is there.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"from_dict expects a mapping of field names to values, got {type(data).__name__}.")
        values = dict(data)
        name = values.pop("name", None)
        if name is None:
            if cls is LossConfig:
                raise TypeError(
                    "from_dict needs the key 'name' to know which loss is meant, got the keys "
                    f"{sorted(map(str, values))}."
                )
            return cast(Self, make_config(cls, values))
        config_cls = config_class_for(name)
        if not issubclass(config_cls, cls):
            raise TypeError(f"name {name!r} is {config_cls.__name__}, which is not a {cls.__name__}.")
        return cast(Self, make_config(config_cls, values))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A process group can't be copied; copies of a config share it.
        twin = copy.copy(self)
        for f in fields_of(type(self)):
            if not is_runtime_field(f):
                setattr(twin, f.name, copy.deepcopy(getattr(self, f.name), memo))
        return twin

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> dict[str, Any]:
        """How pydantic fills a field of this type: a config stays as it is, a mapping is read by `from_dict`."""
        # A core schema is a plain dict: pydantic need not be imported for it.
        return {
            "type": "function-plain",
            "function": {"type": "no-info", "function": cls._parsed},
            "serialization": {"type": "function-plain", "function": lambda config: config.to_dict()},
        }

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        named = {"properties": {"name": {"type": "string"}}, "required": ["name"]} if cls is LossConfig else {}
        return {"title": cls.__name__, "type": "object", **named}

    @classmethod
    def _parsed(cls, value: Any) -> Self:
        if isinstance(value, cls):
            return value
        try:
            return cls.from_dict(value)
        except TypeError as error:  # of which pydantic makes no validation error
            raise ValueError(str(error)) from error


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
    """

    fp32_upcast: bool = True
    ignore_index: int = -100
    reduction: str = "sum"
    tp_group: Any = field(default=None, repr=False, compare=False)
    inplace_grad: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logit_softcapping: float = 0.0

    def validate(self) -> None:
        check_bool("fp32_upcast", self.fp32_upcast)
        check_integer("ignore_index", self.ignore_index)
        check_reduction(self.reduction)
        check_number("label_smoothing", self.label_smoothing, "a number in [0, 1)", zero=True, below=1.0)
        check_number("z_loss", self.z_loss, "a finite number >= 0 (0 is off)", zero=True)
        check_number("logit_softcapping", self.logit_softcapping, "a finite number >= 0 (0 is off)", zero=True)
        check_bool("inplace_grad", self.inplace_grad)


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
    """

    ignore_index: int = -100
    logit_softcapping: float = 0.0
    reduction: str = "sum"
    tp_group: Any = field(default=None, repr=False, compare=False)
    sequence_parallel: bool = False
    skip_ignored: bool | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def validate(self) -> None:
        check_integer("ignore_index", self.ignore_index)
        check_number("logit_softcapping", self.logit_softcapping, "a finite number >= 0 (0 is off)", zero=True)
        check_reduction(self.reduction)
        check_number("label_smoothing", self.label_smoothing, "a number in [0, 1)", zero=True, below=1.0)
        check_number("z_loss", self.z_loss, "a finite number >= 0 (0 is off)", zero=True)
        check_bool("sequence_parallel", self.sequence_parallel)
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
    """

    ignore_index: int = -100
    reduction: str = "sum"
    tp_group: Any = field(default=None, repr=False, compare=False)
    inplace_grad: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logit_softcapping: float = 0.0

    def validate(self) -> None:
        check_integer("ignore_index", self.ignore_index)
        check_reduction(self.reduction)
        check_number("label_smoothing", self.label_smoothing, "a number in [0, 1)", zero=True, below=1.0)
        check_number("z_loss", self.z_loss, "a finite number >= 0 (0 is off)", zero=True)
        check_number("logit_softcapping", self.logit_softcapping, "a finite number >= 0 (0 is off)", zero=True)
        check_bool("inplace_grad", self.inplace_grad)


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


def make_config(config_cls: type[LossConfig], values: Mapping[str, Any]) -> LossConfig:
    """Call the config class; an unknown field is a TypeError that names the closest one."""
    check_known(config_cls, values)
    return config_cls(**values)
