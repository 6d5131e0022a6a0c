"""The `Backend` protocol and the types of its arguments and results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from loss_core.loss_config import LossConfig
    from loss_core.workers.ranks import Request


class BackendUnavailable(ImportError):
    """A known flag that can't be used on this machine; the message says why and what to install."""


@dataclass(frozen=True)
class BackendFlag:
    """A parsed flag. `str(flag)` is the full flag, such as "torch:eager"."""

    backend: str
    kernel: str

    def __str__(self) -> str:
        return f"{self.backend}:{self.kernel}"


@dataclass(frozen=True)
class KernelChoice:
    """Which kernel runs, and why: the value of `loss.kernel_choice`.

    Attributes:
        candidates: kernels among which `auto` chooses for each call; empty if the flag names a kernel.
    """

    flag: str
    reason: str
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True)
class FlagStatus:
    """Whether a flag is usable here."""

    flag: str
    usable: bool
    reason: str  # why not; empty if usable
    version: str  # of the library that it needs; empty if not installed
    install: str  # command that would make it usable; empty if there is none


@dataclass(frozen=True)
class Evaluation:
    """Loss and gradients of one call, as float64 NumPy arrays, for comparisons.

    Attributes:
        loss: scalar, or the shape of labels for reduction="none".
        grads: gradient by argument name, each of the argument's shape.
        dtypes: dtype name by result ("loss", or argument name of the gradient).
        mutated: names of the arguments that the call modified; must be empty.
        kernel: flag of the kernel that ran, recorded by the kernel itself (`loss_core.dispatch.observed`); several are
            joined by " and "; "" if none of this library ran.
        product_dtype: dtype to which the logits' gradient was rounded for the products of a fused
            loss; None if it stayed in the compute dtype.
        ranks_differ: names of the replicated results that were not bitwise equal on all ranks.
    """

    loss: np.ndarray
    grads: dict[str, np.ndarray]
    dtypes: dict[str, str]
    mutated: tuple[str, ...]
    kernel: str
    product_dtype: str | None = None
    ranks_differ: tuple[str, ...] = ()


@dataclass(frozen=True)
class RankSetup:
    """How a backend runs a call over ranks: which processes `loss_core.workers.ranks` starts.

    Attributes:
        processes: number of processes: one per rank, or one for all ranks.
        environment: variables that must be set before the framework is imported.
        splits: names of the splits in `loss_core.workers.vocab_split.splits` that it supports.
    """

    processes: int
    environment: Mapping[str, str]
    splits: tuple[str, ...]


class Backend(Protocol):
    """The functions of a backend package's `backend` module."""

    def kernel_status(self, kernel: str) -> FlagStatus:
        """Whether a kernel is usable here, and if not, why."""
        ...

    def builders(self) -> Mapping[tuple[type[LossConfig], str], Callable[[Any], Any]]:
        """The table (config class, kernel) -> builder."""
        ...

    def choose_kernel(self, config: LossConfig, candidates: tuple[str, ...]) -> KernelChoice:
        """The choice of `auto` among usable kernels that implement the loss."""
        ...

    def batch_invariant(self, kernel: str, row_bytes: int) -> bool:
        """Whether a kernel guarantees that the results of a row do not depend on the other rows, bitwise.

        Args:
            kernel: as in the flag; always False for `auto`, which chooses by the size of a call.
            row_bytes: size of a row of logits.
        """
        ...

    def evaluate(
        self,
        loss: Any,
        arrays: Mapping[str, np.ndarray],
        *,
        dtype: str,
        upstream: np.ndarray | None,
        grad_of: tuple[str, ...],
        device: str | None = None,
        backwards: int = 1,
        leaves: bool = True,
    ) -> Evaluation:
        """Run a built loss and its gradient on NumPy inputs.

        Args:
            arrays: keyword arguments of the loss; floating arrays are float64 with values that are
                exact in `dtype`, integer arrays are passed unchanged.
            dtype: "float32", "bfloat16", "float16" or "float64".
            upstream: upstream gradient of the result (its shape); None for ones.
            grad_of: names of the arguments to differentiate.
            device: such as "cuda"; None for the backend's default.
            backwards: how often the backward runs after the one forward; the last gradients are returned.
            leaves: False: the loss is called with outputs of an operation, as in a model, instead of leaves of the
                autograd graph, which torch protects from most in-place changes.
        """
        ...

    def host_reads(self, loss: Any, arrays: Mapping[str, np.ndarray], *, dtype: str, grad_of: tuple[str, ...]) -> str:
        """What a loss reads on the host, found by running it on inputs without values; "" for nothing.

        A loss that can't run without values raises its own error.
        """
        ...

    def rank_setup(self, ranks: int) -> RankSetup:
        """The processes to start for calls whose vocabulary is sharded over ranks."""
        ...

    def join_ranks(self, rank: int, ranks: int, folder: Path) -> None:
        """In a process of `loss_core.workers.ranks`: connect to the other ranks through a shared empty folder."""
        ...

    def evaluate_shards(self, request: Request) -> list[Evaluation]:
        """In such a process: the results of this rank, or of each rank if one process runs them all."""
        ...
