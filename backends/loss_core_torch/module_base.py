"""What the losses share as torch modules: which kernels run, and how ranks come to one mind about a call."""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loss_core import KernelChoice, parse_flag
from loss_core_torch import auto, distributed, kernels
from loss_core_torch.checks import Tokens
from loss_core_torch.distributed import Shards
from loss_core_torch.placement import Layout


class LossModule(nn.Module):
    """What the four modules share.

    Attributes:
        kernel_choice: which kernel runs, and why.
    """

    _fields: tuple[str, ...] = ()
    # The dimension of the tensor that is sharded: logits [..., V].
    _vocab_dim = -1

    def __init__(self) -> None:
        super().__init__()
        self.with_kernel_choice(KernelChoice("torch:eager", "made directly"))

    def with_kernel_choice(self, choice: KernelChoice) -> LossModule:
        """Run the kernels that the choice names; returns the module."""
        self.kernel_choice = choice
        self._kernel = kernels.load(parse_flag(choice.flag).kernel)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Another process, to which the module was pickled, has not imported its kernels yet.
        kernels.load(self._kernel)

    def kernel_for(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> KernelChoice:
        """Which kernel would run for a call, and why.

        Args:
            device, dtype: of the logits or hidden states.
            shape: (T, V), or (T, V, H) for the fused loss.
        """
        candidates = self.kernel_choice.candidates
        if len(candidates) < 2:
            return self.kernel_choice
        return auto.choose(type(self).__name__, device, dtype, shape, candidates)

    def _take_kernel(self, like: Any, weight: Any = None) -> None:
        """With `auto`: change to the kernel of this call, before anything else looks at it.

        Args:
            like: logits, or hidden states beside the weight [V, H]; not checked yet.
        """
        # A graph keeps the kernel that the loss had when it was traced: what is tuned can't be read there.
        if len(self.kernel_choice.candidates) < 2 or torch.compiler.is_compiling():
            return
        if not isinstance(like, Tensor) or like.dim() == 0 or not (weight is None or isinstance(weight, Tensor)):
            return
        tokens = like.numel() // max(like.shape[-1], 1)
        shape = (tokens, like.shape[-1]) if weight is None else (tokens, *weight.shape)
        choice = self.kernel_for(like.device, like.dtype, shape)
        if choice != self.kernel_choice:
            self.with_kernel_choice(choice)

    def _agree(
        self, layout: Layout, like: Any, check: Callable[[], Tokens], **more: Any
    ) -> tuple[Tokens, Shards | None]:
        """The checked tokens of a call and the shards of its vocabulary, once the other ranks are of the same mind."""
        if layout.ranks.alone():
            return check(), None
        settings = {name: getattr(self, name) for name in self._fields} | more
        what = f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"
        return distributed.agree(layout.ranks, what, like, self._vocab_dim, settings["ignore_index"], check)

    def extra_repr(self) -> str:
        values = [f"{name}={getattr(self, name)!r}" for name in self._fields]
        return ", ".join([*values, f"kernel={self.kernel_choice.flag!r}"])
