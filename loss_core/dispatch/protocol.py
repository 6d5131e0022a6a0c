"""What a backend offers and what it answers: types alone."""

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
    """A flag that is known but can't be used on this machine; the message says why and what to install."""


@dataclass(frozen=True)
class BackendFlag:
    """A parsed flag. `str(flag)` gives it back in full, such as "torch:eager"."""

    backend: str
    kernel: str

    def __str__(self) -> str:
        return f"{self.backend}:{self.kernel}"


@dataclass(frozen=True)
class KernelChoice:
    """Which kernel runs, and why: what a built loss answers to `loss.kernel_choice`.

    Attributes:
        candidates: kernels among which `auto` may take another one for a call; empty where the flag named one.
    """

    flag: str
    reason: str
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True)
class FlagStatus:
    """Whether one flag can be used here."""

    flag: str
    usable: bool
    reason: str  # empty when usable
    version: str  # of the library behind it, empty when absent
    install: str  # command that would make it usable, empty when there is none


@dataclass(frozen=True)
class Evaluation:
    """Loss and gradients of one call, as float64 NumPy arrays, for comparisons.

    Attributes:
        loss: scalar, or the shape of labels for reduction="none".
        grads: gradient by argument name, each of the argument's shape.
        dtypes: dtype name by result ("loss", or argument name of the gradient).
        mutated: names of the arguments that the call changed; must be empty.
        kernel: flag of the kernel that ran, observed where it ran (`loss_core.dispatch.observed`); several are joined
            by " and "; "" where none of ours ran.
        product_dtype: dtype to which the logits' gradient was rounded for the products of a fused
            loss; None when it kept the dtype of the arithmetic.
        ranks_differ: names of the results that ranks hold whole and that were not bitwise the same on all.
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
    """How a backend runs a call over ranks: what `loss_core.workers.ranks` starts.

    Attributes:
        processes: one for each rank, or one that holds them all.
        environment: variables that must be set before the framework is imported.
        splits: which of the ways in `loss_core.workers.vocab_split.splits` it can share a vocabulary.
    """

    processes: int
    environment: Mapping[str, str]
    splits: tuple[str, ...]


class Backend(Protocol):
    """What a backend package's `backend` module offers."""

    def kernel_status(self, kernel: str) -> FlagStatus:
        """Whether a kernel can be used here, and why not."""
        ...

    def builders(self) -> Mapping[tuple[type[LossConfig], str], Callable[[Any], Any]]:
        """The table (config class, kernel) -> builder."""
        ...

    def choose_kernel(self, config: LossConfig, candidates: tuple[str, ...]) -> KernelChoice:
        """What `auto` takes among the kernels that are built and usable."""
        ...

    def batch_invariant(self, kernel: str, row_bytes: int) -> bool:
        """Whether a kernel promises that results of a row of logits do not depend on the other rows, bitwise.

        Args:
            kernel: as in the flag; `auto` chooses by the size of a call and promises nothing.
            row_bytes: of a row of logits.
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
            arrays: keyword arguments of the loss; float arrays are float64 with values that are
                exact in `dtype`, integer arrays are passed on as they are.
            dtype: "float32", "bfloat16", "float16" or "float64".
            upstream: gradient of the loss result (its shape), None for ones.
            grad_of: names of the arguments to differentiate.
            device: such as "cuda"; None for the backend's default.
            backwards: how often the gradient is made of the one forward; the last one is returned.
            leaves: False gives the loss what an operation made of the inputs, as a model does, in place of leaves of
                the graph, which torch protects from most changes in place.
        """
        ...

    def host_reads(self, loss: Any, arrays: Mapping[str, np.ndarray], *, dtype: str, grad_of: tuple[str, ...]) -> str:
        """What a loss reads on the host, seen on inputs without values: "" for nothing.

        Errors of a loss that can't run without values pass through.
        """
        ...

    def rank_setup(self, ranks: int) -> RankSetup:
        """What to start for calls whose vocabulary is sharded over ranks."""
        ...

    def join_ranks(self, rank: int, ranks: int, folder: Path) -> None:
        """In a process of `loss_core.workers.ranks`: meet the others, who have the same empty folder."""
        ...

    def evaluate_shards(self, request: Request) -> list[Evaluation]:
        """In such a process: this rank's part of a call, or that of each rank where one process holds them all."""
        ...
