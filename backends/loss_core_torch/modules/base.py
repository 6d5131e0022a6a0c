"""Base class of the loss modules: which kernels run, and how the ranks of a group agree on a call."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from loss_core import BackendUnavailable, KernelChoice, LossConfig, parse_flag
from loss_core_torch import compat
from loss_core_torch import kernels as kernel_sets
from loss_core_torch.inputs import Tokens
from loss_core_torch.kernels import KernelSet, WholeLosses
from loss_core_torch.tracing import is_traced, is_transformed

Kernels = KernelSet | WholeLosses


class LossModule(nn.Module):
    """Base class of the losses. Calling a module does not change it.

    A module takes the fields of its config, by position or by name, and has an attribute for each.

    Attributes:
        config_class: defines these fields.
        kernel_names: the kernels that the loss has, by their names in flags, in the order of tables.
        kernel_choice: which kernels run, and why; with `auto`, the default that a call may replace.
    """

    config_class: ClassVar[type[LossConfig]]
    kernel_names: ClassVar[tuple[str, ...]] = ("plain", "eager", "compile", "triton")
    # The dimension of the tensor that is sharded: logits [..., V].
    _vocab_dim = -1
    # False: labels only mark ignored tokens.
    _labels_are_classes = True
    tp_group: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "config_class"):
            cls.__signature__ = inspect.signature(cls.config_class)  # type: ignore[attr-defined]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Fields of the config class, which validates them."""
        super().__init__()
        config = self.config_class(*args, **kwargs)
        for f in fields(config):
            setattr(self, f.name, getattr(config, f.name))
        self.with_kernel_choice(KernelChoice("torch:eager", "made directly"))

    @classmethod
    def from_config(cls, config: LossConfig) -> Self:
        """The loss of a config, which may be of a subclass of the config class with more fields."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls.config_class)})

    def with_kernel_choice(self, choice: KernelChoice) -> LossModule:
        """Run the kernels of a choice; returns the module."""
        self.kernel_choice = choice
        self._kernels: Kernels = kernel_sets.find(parse_flag(choice.flag).kernel)
        self._has_custom_kernels = False
        return self

    def with_kernels(self, kernels: Kernels) -> LossModule:
        """Run custom kernels, or ours with other sizes; returns the module. Not for traced calls."""
        self.kernel_choice = KernelChoice(kernels.flag, "given to the module")
        self._kernels, self._has_custom_kernels = kernels, True
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Where torch.compile breaks its graph at `_refuse_transforms`, it compiles the frames below this one without
        # the torch.func transform around them, and their results are wrong.
        if compat.in_functorch_transform() and not torch.compiler.is_dynamo_compiling():
            return _outside_of_graphs(super().__call__, *args, **kwargs)
        return super().__call__(*args, **kwargs)

    def kernel_for(
        self, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], whole: bool | None = None
    ) -> KernelChoice:
        """Which kernels would run for a call, and why.

        Args:
            device: of the logits or hidden states.
            dtype: of the logits or hidden states.
            shape: (T, V), or (T, V, H) for the fused loss.
            whole: whether vocabulary and tokens are unsharded; None: whether there is no tp_group.
        """
        candidates = self.kernel_choice.candidates
        if len(candidates) < 2:
            return self.kernel_choice
        if not (self.tp_group is None if whole is None else whole):
            # torch:plain computes each loss from the full vocabulary.
            candidates = tuple(kernel for kernel in candidates if kernel != "plain")
        from loss_core_torch import auto

        return auto.choose(type(self).__name__, device, dtype, shape, candidates)

    def _kernels_for(self, like: Any, weight: Any = None, *others: Any) -> Kernels:
        """The kernels of a call.

        Args:
            like: logits, or hidden states with the weight [V, H]; not checked yet.
            others: the other floating arguments.
        Raises:
            RuntimeError: a torch.func transform for which the kernels have no rule, or custom kernels in a traced call.
        """
        found = self._kernels
        tensors = isinstance(like, Tensor) and like.dim() and (weight is None or isinstance(weight, Tensor))
        # A traced call runs the default: `auto` reads the tuned table, which no graph can.
        if tensors and len(self.kernel_choice.candidates) > 1 and not is_traced(like):
            tokens = like.numel() // max(like.shape[-1], 1)
            shape = (tokens, like.shape[-1]) if weight is None else (tokens, *weight.shape)
            whole = is_unsharded(self.tp_group, like, weight, *others)
            choice = self.kernel_for(like.device, like.dtype, shape, whole)
            found = kernel_sets.find(choice.flag.partition(":")[2])
        if not isinstance(found, WholeLosses):
            _refuse_transforms(found.flag, like, weight, *others)
            if self._has_custom_kernels and isinstance(like, Tensor) and is_traced(like):
                raise RuntimeError(
                    f"The kernels {found.flag!r} were given to the module by with_kernels, and a traced call "
                    "(torch.compile with fullgraph=True, make_fx, fake tensors) knows kernels by their flag alone. "
                    "Build the loss with a flag there."
                )
        return found

    def _agree(
        self,
        ranks: Any,
        like: Any,
        check: Callable[[], Tokens],
        must_match: dict[str, Any] | None = None,
        **settings: Any,
    ) -> tuple[Tokens, Any]:
        """The checked tokens of a call and the shards of its vocabulary, after agreement of all ranks.

        Args:
            must_match: values that must be equal on the ranks over which the vocabulary is sharded.
            settings: values that must be equal on all ranks.
        """
        from loss_core_torch.parallel import agreement

        settings = self._settings() | settings
        what = f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"
        ignore_index = settings["ignore_index"] if self._labels_are_classes else None
        return agreement.agree(ranks, what, like, self._vocab_dim, ignore_index, check, must_match)

    def extra_repr(self) -> str:
        values = [f"{name}={value!r}" for name, value in self._settings().items()]
        return ", ".join([*values, f"kernel={self.kernel_choice.flag!r}"])

    def _settings(self) -> dict[str, Any]:
        """The fields by name, without tp_group, a handle of this process."""
        return {f.name: getattr(self, f.name) for f in fields(self.config_class) if f.name != "tp_group"}


@compat.outside_of_graphs
def _outside_of_graphs(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return call(*args, **kwargs)


def is_unsharded(tp_group: Any, *tensors: Any) -> bool:
    """Whether vocabulary and tokens of a call are on this rank: no group, no DTensors."""
    return tp_group is None and not any(hasattr(x, "full_tensor") for x in tensors)


def has_known_coefficients(
    tokens: Tokens, group: Any, token_groups: tuple[Any, ...], logits: Tensor, *others: Tensor
) -> bool:
    """Whether the coefficient of each token in the result is known before its loss, so that the forward may use it.

    Args:
        group: over which the vocabulary is sharded, or None.
        token_groups: over which the tokens are sharded.
        others: the floating arguments other than the logits.
    """
    weights_T = tokens.weights_T
    return (
        group is None
        and not token_groups
        and torch.is_grad_enabled()
        and logits.requires_grad
        # The gradient of weights is the loss of each token, which may be differentiated again.
        and not (weights_T is not None and weights_T.requires_grad)
        # A traced graph can neither pass on a buffer nor recompute in a second backward.
        and not is_transformed(logits, *others)
    )


def check_shards(kernels: WholeLosses, shards: Any) -> None:
    """Refuse shards of a vocabulary that a `WholeLosses` does not support; None is an unsharded one.

    Raises:
        BackendUnavailable: it supports none.
        ValueError: the shards are not equal.
    """
    if shards is None:
        return
    if not kernels.takes_shards:
        raise BackendUnavailable(f"{kernels.flag!r} needs the whole vocabulary: use 'torch:eager' with a tp_group.")
    if not shards.even:
        raise ValueError(
            f"{kernels.flag!r} needs the vocabulary in equal shards, ordered by the group's ranks: use "
            "'torch:eager' or 'torch:triton', or pad the head to a multiple of the group's size."
        )


def cast(loss: Tensor, fp32_upcast: bool, dtype: torch.dtype) -> Tensor:
    """The loss in the dtype of the arithmetic, or with fp32_upcast=False in that of the logits."""
    return loss if fp32_upcast else loss.to(dtype)


def _refuse_transforms(flag: str, *inputs: Any) -> None:
    """Refuse vmap and forward-mode derivatives, for which the kernels have no rules.

    Raises:
        RuntimeError: names torch:plain, which has them.
    """
    if torch.compiler.is_dynamo_compiling():
        # Dynamo traces into the autograd functions there and would lose gradients. Without fullgraph the error breaks
        # the graph, and eager mode computes them correctly.
        if compat.in_functorch_transform():
            raise RuntimeError(
                f"{flag!r} can't be differentiated by torch.func inside of torch.compile. Build the loss with "
                "backend='torch:plain' there."
            )
        return
    found = [name for name in compat.functorch_transforms() if name in ("Vmap", "Jvp")]
    if not found and any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        found = ["Jvp"]
    if found:
        what = {"Vmap": "batching rule (torch.func.vmap)", "Jvp": "forward-mode derivative (torch.func.jvp)"}
        raise RuntimeError(f"{flag!r} has no {what[found[0]]}. Build the loss with backend='torch:plain' there.")
