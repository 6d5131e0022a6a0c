"""The flag `BACKEND[:KERNEL]`: known flags, parsing, lazy loading, and whether a flag is usable here.

A backend is a package that is imported only when one of its flags is used.
"""

from __future__ import annotations

import importlib
from typing import cast

from loss_core.dispatch.protocol import Backend, BackendFlag, BackendUnavailable, FlagStatus

AUTO = "auto"

# Backend -> (module, imported on first use; kernels in the order of tables).
BACKENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "torch": ("loss_core_torch.backend", ("plain", "eager", "compile", "triton", "te")),
    "jax": ("loss_core_jax.backend", ("xla",)),
}

# Compiles at the first call for each kind of input: seconds each, about a minute over all cases and dtypes.
COMPILED_AT_FIRST_CALL = frozenset({"torch:compile"})


def all_flags() -> tuple[str, ...]:
    """Every flag that names a kernel, usable here or not."""
    return tuple(f"{name}:{kernel}" for name, (_, kernels) in BACKENDS.items() for kernel in kernels)


def parse_flag(flag: str) -> BackendFlag:
    """Parse `BACKEND[:KERNEL]`.

    >>> parse_flag("torch")
    BackendFlag(backend='torch', kernel='auto')
    >>> str(parse_flag("jax:xla"))
    'jax:xla'

    Raises:
        ValueError: unknown flag; lists the choices.
    """
    if not isinstance(flag, str):
        raise ValueError(f"backend must be a string BACKEND[:KERNEL], got {flag!r}. {_choices()}")
    backend, colon, kernel = flag.partition(":")
    if backend not in BACKENDS or (colon and kernel not in (AUTO, *BACKENDS[backend][1])):
        raise ValueError(f"Unknown backend flag {flag!r}. {_choices()}")
    return BackendFlag(backend, kernel if colon else AUTO)


def _choices() -> str:
    autos = [choice for name in BACKENDS for choice in (name, f"{name}:{AUTO}")]
    return f"Choose one of: {', '.join([*autos, *all_flags()])}."


def load_backend(name: str) -> Backend:
    """Import a backend package.

    Raises:
        BackendUnavailable: the framework behind it is not installed.
    """
    module, _ = BACKENDS[name]
    try:
        return cast(Backend, importlib.import_module(module))
    except ImportError as error:
        if (error.name or "").startswith("loss_core"):
            raise  # a module of this library is missing: an install line would not help
        raise BackendUnavailable(
            f"backend {name!r} needs {error.name or name} ({error}): {install_line(name)}"
        ) from error


def install_line(extra: str) -> str:
    """The command that installs the requirements of a backend or kernel."""
    return f"pip install 'loss-core[{extra}]'"


def flag_status(flag: str) -> FlagStatus:
    """Whether a flag that names a kernel is usable here, and if not, why. Imports its framework."""
    parsed = parse_flag(flag)
    try:
        backend = load_backend(parsed.backend)
    except BackendUnavailable as error:
        return FlagStatus(str(parsed), False, str(error), "", install_line(parsed.backend))
    return backend.kernel_status(parsed.kernel)


def usable_flag(flag: str) -> str:
    """The full flag, such as "torch:auto" for "torch".

    Raises:
        BackendUnavailable: it names a kernel that is not usable here.
    """
    parsed = parse_flag(flag)
    if parsed.kernel != AUTO and not (status := flag_status(flag)).usable:
        raise BackendUnavailable(status.reason)
    return str(parsed)
