"""The flag `BACKEND[:KERNEL]`: parsing, lazy loading, and which builder makes which config.

A backend is a package that is imported only when its flag is used. A name that is spelled out
never falls back to another kernel; only `auto` chooses.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from loss_core.config import LossConfig
    from loss_core.ranks import Request

AUTO = "auto"

# Kernels in the order in which tables list them; the module is imported on first use.
_BACKENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "torch": ("loss_core_torch.backend", ("eager", "compile", "triton", "te")),
    "jax": ("loss_core_jax.backend", ("xla", "pallas")),
}

# Never `auto`'s choice: whether it can be used is known only by importing a large library, which takes seconds and
# can fail in ways of its own.
_ONLY_BY_NAME = frozenset({"torch:te"})


# Compiled at its first call for each kind of input: seconds, which over all cases and dtypes add up to a minute.
COMPILED_AT_FIRST_CALL = frozenset({"torch:compile"})


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
        kernel: flag of the kernel that really ran, "" for a callable that is none of ours.
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
    """How a backend runs a call over ranks: what `loss_core.ranks` starts.

    Attributes:
        processes: one for each rank, or one that holds them all.
        environment: variables that must be set before the framework is imported.
        splits: which of the ways in `loss_core.vocab_split.splits` it can share a vocabulary.
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

    def evaluate(
        self,
        loss: Any,
        arrays: Mapping[str, np.ndarray],
        *,
        dtype: str,
        upstream: np.ndarray | None,
        grad_of: tuple[str, ...],
        device: str | None = None,
    ) -> Evaluation:
        """Run a built loss and its gradient on NumPy inputs.

        Args:
            arrays: keyword arguments of the loss; float arrays are float64 with values that are
                exact in `dtype`, integer arrays are passed on as they are.
            dtype: "float32", "bfloat16", "float16" or "float64".
            upstream: gradient of the loss result (its shape), None for ones.
            grad_of: names of the arguments to differentiate.
            device: such as "cuda"; None for the backend's default.
        """
        ...

    def rank_setup(self, ranks: int) -> RankSetup:
        """What to start for calls whose vocabulary is sharded over ranks."""
        ...

    def join_ranks(self, rank: int, ranks: int, folder: Path) -> None:
        """In a process of `loss_core.ranks`: meet the others, who have the same empty folder."""
        ...

    def evaluate_shards(self, request: Request) -> list[Evaluation]:
        """In such a process: this rank's part of a call, or that of each rank where one process holds them all."""
        ...


# What users have registered: config class -> {full flag: builder}.
_USER_BUILDERS: dict[type[Any], dict[str, Callable[[Any], Any]]] = {}


def all_flags() -> tuple[str, ...]:
    """Every flag that names a kernel, usable here or not."""
    return tuple(f"{name}:{kernel}" for name, (_, kernels) in _BACKENDS.items() for kernel in kernels)


def parse_flag(flag: str) -> BackendFlag:
    """Parse `BACKEND[:KERNEL]`.

    >>> parse_flag("torch")
    BackendFlag(backend='torch', kernel='auto')
    >>> str(parse_flag("jax:xla"))
    'jax:xla'

    Raises:
        ValueError: not a known flag; lists the choices.
    """
    if not isinstance(flag, str):
        raise ValueError(f"backend must be a string BACKEND[:KERNEL], got {flag!r}. {_choices()}")
    backend, colon, kernel = flag.partition(":")
    if backend not in _BACKENDS or (colon and kernel not in (AUTO, *_BACKENDS[backend][1])):
        raise ValueError(f"Unknown backend flag {flag!r}. {_choices()}")
    return BackendFlag(backend, kernel if colon else AUTO)


def _choices() -> str:
    autos = [choice for name in _BACKENDS for choice in (name, f"{name}:{AUTO}")]
    return f"Choose one of: {', '.join([*autos, *all_flags()])}."


def load_backend(name: str) -> Backend:
    """Import a backend package.

    Raises:
        BackendUnavailable: the framework behind it is not installed.
    """
    module, _ = _BACKENDS[name]
    try:
        return cast(Backend, importlib.import_module(module))
    except ImportError as error:
        if (error.name or "").startswith("loss_core"):
            raise  # a part of this library is missing: no install line would help
        raise BackendUnavailable(
            f"backend {name!r} needs {error.name or name} ({error}): {install_line(name)}"
        ) from error


def install_line(extra: str) -> str:
    """The command that installs what a backend or kernel needs."""
    return f"pip install 'loss-core[{extra}]'"


def flag_status(flag: str) -> FlagStatus:
    """Whether a flag that names a kernel can be used here, and why not. Imports its framework."""
    parsed = parse_flag(flag)
    try:
        backend = load_backend(parsed.backend)
    except BackendUnavailable as error:
        return FlagStatus(str(parsed), False, str(error), "", install_line(parsed.backend))
    return backend.kernel_status(parsed.kernel)


def register_builders(config_cls: type[LossConfig], builders: Mapping[str, Callable[[Any], Any]]) -> None:
    """Add builders of a user's config by flag; see `loss_core.register_loss`."""
    table: dict[str, Callable[[Any], Any]] = {}
    for flag, builder in builders.items():
        parsed = parse_flag(flag)
        if not callable(builder):
            raise TypeError(f"The builder for {flag!r} must be a callable that takes the config, got {builder!r}.")
        kernel = _BACKENDS[parsed.backend][1][0] if parsed.kernel == AUTO else parsed.kernel
        table[f"{parsed.backend}:{kernel}"] = builder
    _USER_BUILDERS[config_cls] = table


def forget_builders(config_cls: type[LossConfig]) -> None:
    """Take back `register_builders`."""
    _USER_BUILDERS.pop(config_cls, None)


def _user_table(config_cls: type[Any]) -> dict[str, Callable[[Any], Any]] | None:
    """Builders by flag of the nearest class that a user registered; None when a class of ours is nearer."""
    for cls in config_cls.__mro__:
        if cls in _USER_BUILDERS:
            return _USER_BUILDERS[cls]
        if _is_ours(cls):
            return None
    return None


def takes_backend(config: LossConfig) -> bool:
    """Whether the config's own `build` has a `backend` argument (a user's override may have none)."""
    parameters = inspect.signature(config.build).parameters
    return "backend" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def build(config: LossConfig, flag: str) -> Any:
    """Build a validated config for a flag. `LossConfig.build` is the public way here."""
    parsed = parse_flag(flag)
    table = _user_table(type(config))
    if table is not None:
        return _build_registered(config, parsed, table)
    if not any(_is_ours(cls) for cls in type(config).__mro__):
        raise NotImplementedError(
            f"{type(config).__name__} must implement build(), or be registered with loss_core.register_loss "
            f"with a builder for {parsed.backend!r}."
        )
    return _build_ours(config, parsed, load_backend(parsed.backend))


def _build_registered(config: LossConfig, flag: BackendFlag, table: Mapping[str, Callable[[Any], Any]]) -> Any:
    fitting = [name for name in table if name.startswith(f"{flag.backend}:")]
    name = str(flag) if flag.kernel != AUTO else next(iter(fitting), str(flag))
    if name not in table:
        raise BackendUnavailable(
            f"{type(config).__name__} has no builder for '{flag}'; registered: {', '.join(table) or 'none'}."
        )
    return table[name](config)


def _is_ours(cls: type[Any]) -> bool:
    """Whether this very class is one of the typed configs of this library."""
    return cls.__module__ == "loss_core.config" and cls.__name__ != "LossConfig"


def _build_ours(config: LossConfig, flag: BackendFlag, backend: Backend) -> Any:
    builders = backend.builders()
    by_kernel = {
        kernel: builder for (config_cls, kernel), builder in builders.items() if config_cls in type(config).__mro__
    }
    if flag.kernel != AUTO:
        # Before the status: no install line helps where the kernel has no such loss.
        if flag.kernel not in by_kernel and any(kernel == flag.kernel for _, kernel in builders):
            raise BackendUnavailable(
                f"'{flag}' has no kernel for {type(config).__name__}; it is served by "
                f"{', '.join(f'{flag.backend}:{k}' for k in by_kernel)}."
            )
        status = backend.kernel_status(flag.kernel)
        if not status.usable:
            raise BackendUnavailable(status.reason)
        choice = KernelChoice(str(flag), "named by the flag")
    else:
        candidates = [kernel for kernel in by_kernel if f"{flag.backend}:{kernel}" not in _ONLY_BY_NAME]
        usable = tuple(kernel for kernel in candidates if backend.kernel_status(kernel).usable)
        if not usable:
            raise BackendUnavailable(f"No kernel of {flag.backend!r} for {type(config).__name__} can be used here.")
        choice = backend.choose_kernel(config, usable)
    loss = by_kernel[parse_flag(choice.flag).kernel](config)
    return loss.with_kernel_choice(choice) if hasattr(loss, "with_kernel_choice") else loss
