"""What the losses share as torch modules: which kernels run, and how the ranks of a group agree on a call."""

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
    """What the modules share. Calling a module does not change it.

    A module takes the fields of its config, by position or by name, and has an attribute for each.

    Attributes:
        config_class: says which fields these are, and what they mean.
        kernel_names: the kernels that the loss has, as flags name them, in the order in which tables list them.
        kernel_choice: which kernels run, and why; with `auto`, what is taken where nothing is known of the call yet.
    """

    config_class: ClassVar[type[LossConfig]]
    kernel_names: ClassVar[tuple[str, ...]] = ("plain", "eager", "compile", "triton")
    # The dimension of the tensor that is sharded: logits [..., V].
    _vocab_dim = -1
    # Else they only say which tokens are ignored.
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
        """The loss that a config means, which may derive from the config class and have more fields."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls.config_class)})

    def with_kernel_choice(self, choice: KernelChoice) -> LossModule:
        """Run the kernels that the choice names; returns the module."""
        self.kernel_choice = choice
        self._kernels: Kernels = kernel_sets.find(parse_flag(choice.flag).kernel)
        self._given = False
        return self

    def with_kernels(self, kernels: Kernels) -> LossModule:
        """Run kernels of one's own, or ours with other sizes; returns the module. Not for traced calls."""
        self.kernel_choice = KernelChoice(kernels.flag, "given to the module")
        self._kernels, self._given = kernels, True
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # What torch.compile can't put into a graph of its caller's (see `_refuse_transforms`) it runs frame by frame,
        # and makes wrong graphs of the frames below this one, since it does not know of the transform around them.
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
            whole: whether the call concerns this process alone; None: where there is no tp_group.
        """
        candidates = self.kernel_choice.candidates
        if len(candidates) < 2:
            return self.kernel_choice
        if not (self.tp_group is None if whole is None else whole):
            # Those that make each token's loss whole need the whole vocabulary.
            candidates = tuple(kernel for kernel in candidates if kernel != "plain")
        from loss_core_torch import auto

        return auto.choose(type(self).__name__, device, dtype, shape, candidates)

    def _kernels_for(self, like: Any, weight: Any = None, *others: Any) -> Kernels:
        """The kernels of a call.

        Args:
            like: logits, or hidden states beside the weight [V, H]; not checked yet.
            others: floating arguments beside them.
        Raises:
            RuntimeError: a torch.func transform that they have no rule for, or a traced call that can't name them.
        """
        found = self._kernels
        tensors = isinstance(like, Tensor) and like.dim() and (weight is None or isinstance(weight, Tensor))
        # A graph keeps the kernels that the loss had when it was traced: what is tuned can't be read there.
        if tensors and len(self.kernel_choice.candidates) > 1 and not is_traced(like):
            tokens = like.numel() // max(like.shape[-1], 1)
            shape = (tokens, like.shape[-1]) if weight is None else (tokens, *weight.shape)
            whole = is_whole(self.tp_group, like, weight, *others)
            choice = self.kernel_for(like.device, like.dtype, shape, whole)
            found = kernel_sets.find(choice.flag.partition(":")[2])
        if not isinstance(found, WholeLosses):
            _refuse_transforms(found.flag, like, weight, *others)
            if self._given and isinstance(like, Tensor) and is_traced(like):
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
        alike: dict[str, Any] | None = None,
        **settings: Any,
    ) -> tuple[Tokens, Any]:
        """The checked tokens of a call and the shards of its vocabulary, once the other ranks agree.

        Args:
            alike: what must be the same on the ranks over which the vocabulary is sharded; settings: on all ranks.
        """
        from loss_core_torch.parallel import agreement

        settings = self._settings() | settings
        what = f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"
        ignore_index = settings["ignore_index"] if self._labels_are_classes else None
        return agreement.agree(ranks, what, like, self._vocab_dim, ignore_index, check, alike)

    def extra_repr(self) -> str:
        values = [f"{name}={value!r}" for name, value in self._settings().items()]
        return ", ".join([*values, f"kernel={self.kernel_choice.flag!r}"])

    def _settings(self) -> dict[str, Any]:
        """The fields by name, without the handle that belongs to one process."""
        return {f.name: getattr(self, f.name) for f in fields(self.config_class) if f.name != "tp_group"}


@compat.outside_of_graphs
def _outside_of_graphs(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return call(*args, **kwargs)


def is_whole(tp_group: Any, *tensors: Any) -> bool:
    """Whether a call concerns this process alone: no group, no DTensors."""
    return tp_group is None and not any(hasattr(x, "full_tensor") for x in tensors)


def has_known_factors(
    tokens: Tokens, group: Any, token_groups: tuple[Any, ...], logits: Tensor, *others: Tensor
) -> bool:
    """Whether the factor of each token in a sum or mean is known before its loss: then gradients can be made with it.

    Args:
        group: over which the vocabulary is sharded, or None.
        token_groups: over which the tokens are.
        others: floating arguments beside the logits.
    """
    weights_T = tokens.weights_T
    return (
        group is None
        and not token_groups
        and torch.is_grad_enabled()
        and logits.requires_grad
        # Their gradient is the loss of each token, which may be differentiated again.
        and not (weights_T is not None and weights_T.requires_grad)
        # A traced graph can neither hand a buffer over nor be told to compute again.
        and not is_transformed(logits, *others)
    )


def check_shards(kernels: WholeLosses, shards: Any) -> None:
    """Refuse shards of a vocabulary, or None, that kernels which make losses whole do not take.

    Raises:
        BackendUnavailable: they take none. ValueError: these are not equal.
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
    """The result in its dtype: that of the arithmetic, or that of the logits."""
    return loss if fp32_upcast else loss.to(dtype)


def _refuse_transforms(flag: str, *inputs: Any) -> None:
    """Refuse vmap and forward-mode derivatives, for which the kernels have no rules.

    Raises:
        RuntimeError: names the flag that has.
    """
    if torch.compiler.is_dynamo_compiling():
        # Dynamo traces into the autograd functions there and would lose gradients. Without fullgraph it goes on in
        # eager mode, where they are right.
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
