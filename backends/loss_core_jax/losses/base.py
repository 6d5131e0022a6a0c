"""Base class of the losses: frozen, hashable callables that are pytrees without leaves.

Argument names are those of the torch modules' forward. Every floating argument (logits, hidden states, weight, loss
weights) is differentiable. Second derivatives are computed in reverse mode (`jax.grad` of `jax.grad`) or forward over
reverse (`jax.hessian`); `jax.jvp` of a loss is an error of JAX (`jax.custom_vjp`).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import jax

from loss_core.dispatch.protocol import BackendUnavailable, KernelChoice
from loss_core.loss_config import LossConfig
from loss_core_jax import inputs
from loss_core_jax.inputs import ArrayLike
from loss_core_jax.kernels import KernelSet
from loss_core_jax.kernels.xla import XLA
from loss_core_jax.parallel.layout import axis_names

Count = int | float | ArrayLike
TPGroup = str | tuple[str, ...] | None


class _Fields:
    """Fields of a config that code for all losses reads; those with a value may be missing in a config."""

    ignore_index: int
    tp_group: TPGroup = None
    fp32_upcast: bool = True
    logit_softcapping: float = 0.0
    metrics: tuple[str, ...] = ()
    sequence_parallel: bool = False
    inplace_grad: bool = False
    skip_ignored: bool | None = None
    chunk_len: int = 0

    if TYPE_CHECKING:
        # `has_fields_of` adds the fields of the config.
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class Loss(_Fields):
    """Base of the losses; each has the fields of its config. Losses that compute the same are equal.

    Attributes:
        config_class: the config, which documents the fields.
        kernels: the kernel set that computes the loss.
        kernel_choice: its flag, and why it was chosen.
    """

    kernels: KernelSet = dataclasses.field(default=XLA, kw_only=True, repr=False)
    kernel_choice: KernelChoice | None = dataclasses.field(default=None, kw_only=True, compare=False)

    config_class: ClassVar[type[LossConfig]]
    # The argument and axis whose size is that of the vocabulary; None if labels only mark ignored positions.
    _vocab_axis: ClassVar[tuple[str, int] | None] = ("logits", -1)

    def __post_init__(self) -> None:
        if self.tp_group is not None:
            names = axis_names(self.tp_group)
            # "tp" and ("tp",) compute the same.
            object.__setattr__(self, "tp_group", names[0] if len(names) == 1 else names)
        self.config_class(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self.config_class)})
        if self.sequence_parallel and self.tp_group is None:
            raise ValueError(
                "sequence_parallel=True needs tp_group, the mesh axis over which hidden_states are gathered; without "
                "it, XLA moves sharded hidden_states by itself: use sequence_parallel=False."
            )
        if self.inplace_grad:
            raise BackendUnavailable(
                f"{type(self).__name__} on jax got inplace_grad=True: a jax.Array can't be written to. Use "
                "inplace_grad=False; a training step under jax.jit reuses the logits' memory by itself, and that of "
                "its arguments with donate_argnums."
            )

    @classmethod
    def from_config(cls, config: LossConfig) -> Self:
        """The loss of a config, whose class may derive from `config_class` and have more fields."""
        return cls(**{f.name: getattr(config, f.name) for f in dataclasses.fields(cls.config_class)})

    def with_kernel_choice(self, choice: KernelChoice) -> Self:
        """A copy with this `kernel_choice`."""
        return dataclasses.replace(self, kernel_choice=choice)

    def check_values(self, arguments: Mapping[str, Any]) -> None:
        """Check labels, for callers that run the loss under jit, where their values are not readable.

        Args:
            arguments: of a call, by name. labels and mask are NumPy arrays; of the others only the shape is used.
        Raises:
            ValueError: a label outside [0, V) that is not ignored; names position and value.
        """
        name, axis = self._vocab_axis or ("", 0)
        labels, mask, scores = arguments.get("labels"), arguments.get("mask"), arguments.get(name)
        if labels is None or scores is None:
            return  # the call will raise for the missing argument
        inputs.check_mask(labels, mask)
        inputs.read_labels(labels, mask, self.ignore_index, scores.shape[axis])


L = TypeVar("L", bound=Loss)


def has_fields_of(config_class: type[LossConfig]) -> Callable[[type[L]], type[L]]:
    """Decorator of a loss: a frozen dataclass with the fields of a config, and a pytree without leaves."""

    def wrap(cls: type[L]) -> type[L]:
        cls.config_class = config_class
        fields = dataclasses.fields(config_class)
        # In the config's order, which is that of the constructor's arguments.
        cls.__annotations__ = {f.name: f.type for f in fields} | inspect.get_annotations(cls)
        for f in fields:
            setattr(cls, f.name, f.default)
        frozen: type[L] = dataclasses.dataclass(frozen=True)(cls)
        return jax.tree_util.register_static(frozen)

    return wrap
