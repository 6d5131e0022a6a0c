"""Implementations of a loss that are judged: how they are specified, which arguments they accept, what they refuse.

An implementation is a loss (a callable or module that takes the forward's arguments by keyword), a builder (a callable
whose only parameter is called `config`, which returns such a loss), or a flag of this library.
"""

from __future__ import annotations

import importlib
import inspect
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loss_core.baselines import JUDGED
from loss_core.check.calls import Call, config_option
from loss_core.dispatch.flags import BACKENDS, all_flags, parse_flag
from loss_core.dispatch.protocol import BackendUnavailable
from loss_core.loss_config import LossConfig
from loss_core.losses.definition import LossDef, need_definition
from loss_core.registry import our_losses

Loss = Callable[..., Any]


class Refused(Exception):
    """A call that an implementation does not support: it raised, with this message, before it returned a result."""


@dataclass(frozen=True)
class Implementation:
    """A named implementation.

    Attributes:
        framework: "torch" or "jax", whose tensors it accepts.
        build: returns the loss for a config.
        options: options of `loss-core check` that select it; "" where it can be passed only in Python.
        config_is_fixed: whether `build` returns the same loss for every config, so that no case may set fields.
        loss: name of the loss as which it is judged by default; "" for every loss.
        version: of its package.
    """

    name: str
    framework: str
    build: Callable[[LossConfig], Loss]
    options: str = ""
    config_is_fixed: bool = False
    loss: str = ""
    version: str = ""

    def reproduce(self, call: Call) -> str:
        """The command that judges this call alone, or a line of Python where no command can."""
        config, case = config_option(call.loss), call.case.name
        if self.options and config is not None:
            only = "" if call.captured else f" --case {case}"
            return f"loss-core check{self.options} --config {config} --dtype {call.dtype}{only}{call.suffix}"
        framework = "" if self.framework == "torch" else f", framework={self.framework!r}"
        given = f"implementations={{{self.name!r}: ...}}{framework}"
        return f"check({call.loss!r}, {given}, dtypes=[{call.dtype!r}], only=[{case!r}])"


def implementation_of(name: str, given: Any, framework: str = "torch", options: str = "") -> Implementation:
    """An implementation from a user's loss or builder.

    Raises:
        TypeError: `given` is neither; ValueError: no such framework.
    """
    if framework not in BACKENDS:
        raise ValueError(f"framework must be one of {', '.join(BACKENDS)}, got {framework!r}.")
    if not callable(given):
        raise TypeError(f"Implementation {name!r} must be a loss or a builder, got {given!r}.")
    if list(_parameters(given)) == ["config"]:
        return Implementation(name, framework, given, options)
    if isinstance(given, type):
        raise TypeError(
            f"Implementation {name!r} is the class {given.__name__}: give an object of it, or a builder, a function "
            "whose one parameter is called config."
        )
    return Implementation(name, framework, lambda config: given, options, True, _first_matching_loss(given))


def implementations_of(given: Mapping[str, Any] | Sequence[Implementation], framework: str) -> list[Implementation]:
    """Implementations from an argument of `check`: losses and builders by name, or implementations."""
    if not isinstance(given, Mapping):
        return list(given)
    return [implementation_of(name, loss, framework) for name, loss in given.items()]


def flag_implementation(flag: str) -> Implementation:
    """The losses of this library behind a flag."""
    full = str(parse_flag(flag))
    build = lambda config: config.build(backend=full)  # noqa: E731
    return Implementation(full, parse_flag(flag).backend, build, f" --implementation {flag}")


def baseline_implementation(name: str) -> Implementation:
    """Another project's losses, by the name of its adapter."""

    def build(config: LossConfig) -> Loss:
        # Imported here since some adapters import torch, which the others do not need.
        loss: Loss = importlib.import_module("loss_core_baselines").build(name, config)
        return loss

    baseline = JUDGED[name]
    return Implementation(name, baseline.framework, build, f" --implementation {name}", version=baseline.version())


def implementation_named(spec: str, framework: str | None = None) -> Implementation:
    """An implementation from its name on the command line: a flag, a baseline's name, or MODULE:OBJECT.

    Raises:
        ImportError, AttributeError, ValueError: no such object; TypeError: it is neither loss nor builder.
    """
    if spec in (*BACKENDS, *all_flags()):
        return flag_implementation(spec)
    if spec in JUDGED:
        return baseline_implementation(spec)
    if ":" not in spec:
        raise ValueError(f"{spec!r} is neither a flag, nor MODULE:OBJECT, nor one of {', '.join(JUDGED)}.")
    found = import_object(spec)
    options = f" --implementation {shlex.quote(spec)}" + (f" --framework {framework}" if framework else "")
    return implementation_of(spec, found, framework or "torch", options)


def import_object(spec: str) -> Any:
    """Import the object that MODULE:OBJECT names; OBJECT may have dots.

    Raises:
        ImportError, AttributeError, ValueError: there is none.
    """
    module, colon, path = spec.partition(":")
    if not (module and colon and path):
        raise ValueError(f"expected MODULE:OBJECT, got {spec!r}.")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


@dataclass(frozen=True)
class Guarded:
    """A loss whose forward raises `Refused` for any error; errors in backward are not converted.

    Wrappers of the same loss are equal, so that JAX compiles once.
    """

    loss: Loss

    def __call__(self, **arguments: Any) -> Any:
        try:
            return self.loss(**arguments)
        except Exception as error:
            raise Refused(error_text(error)) from error


def error_text(error: BaseException) -> str:
    """An error's type and the first line of its message; of a BackendUnavailable, only the message."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, BackendUnavailable):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def accepted(loss: Loss, definition: LossDef, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that the loss accepts; hints, which change no result, are dropped where it has none.

    Raises:
        Refused: it does not accept another one.
    """
    parameters = _parameters(loss)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(arguments)
    hints = {a.name for a in definition.arguments if a.kind == "hint"}
    missing = [name for name in arguments if name not in parameters and name not in hints]
    if missing:
        raise Refused(f"takes no {' and no '.join(missing)}; its arguments are {', '.join(parameters)}")
    return {name: value for name, value in arguments.items() if name in parameters}


def _parameters(given: Any) -> Mapping[str, inspect.Parameter]:
    # The forward of a module: its __call__ has no signature of its own.
    target = given.forward if not isinstance(given, type) and hasattr(given, "forward") else given
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):
        # Some built-in functions have no signature: every argument is passed, and the call decides.
        return {"arguments": inspect.Parameter("arguments", inspect.Parameter.VAR_KEYWORD)}


def _first_matching_loss(loss: Loss) -> str:
    """Name of the first loss of this library whose arguments the callable accepts; "" for none."""
    parameters = _parameters(loss)
    needed = {
        n for n, p in parameters.items() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    for name in our_losses():
        arguments = need_definition(name).arguments
        if {a.name for a in arguments if not a.optional} <= set(parameters) and needed <= {a.name for a in arguments}:
            return name
    return ""
