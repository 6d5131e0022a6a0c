"""Record the PyTorch operations of a call, and the largest tensor that they allocate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Context that records the operations of a call and its largest allocation.

    Attributes:
        calls: (name such as "aten::amax", shape of the first operand) of each operation.
        names: all of these names.
        largest: bytes of the largest result that is not a view of an input.
    """

    def __init__(self, inputs: Iterable[Any] = ()) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.largest = 0
        self._given = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, Tensor)}

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.calls}

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        """Shapes of the first operand of each operation of a name."""
        return [shape for called, shape in self.calls if called == name]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        first = tuple(args[0].shape) if args and isinstance(args[0], Tensor) else ()
        self.calls.append((func.name().partition(".")[0], first))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self._given:
            self.largest = max(self.largest, result.nbytes)
        return result
