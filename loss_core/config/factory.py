"""The config of a loss that is built by any callable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loss_core.loss_config import LossConfig


@dataclass
class LossFromFactoryConfig(LossConfig):
    """A loss built by any class or callable: `factory(**kwargs)`.

    The factory determines the framework, so `build` accepts no backend flag.

    Attributes:
        factory: callable that returns the loss.
        kwargs: its keyword arguments.
    """

    # Any, not Callable: OmegaConf accepts no Callable annotation in a structured config.
    factory: Any = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def build(self, *, backend: str | None = None) -> Any:
        """Call the factory.

        Raises:
            AssertionError: factory is not callable (as in NeMo AutoModel).
            ValueError: a backend flag was given.
        """
        # Callers of NeMo AutoModel's class catch AssertionError; raised explicitly, because `python -O` removes assert.
        if not callable(self.factory):
            raise AssertionError(f"LossFromFactoryConfig.factory must be a callable, got {self.factory!r}.")
        if backend is not None:
            raise ValueError(
                f"backend={backend!r} can't be applied to the factory {factory_name(self.factory)}: a factory is of "
                "one framework. Leave the flag out, or register the loss with loss_core.register_loss."
            )
        if not isinstance(self.kwargs, Mapping):
            raise ValueError(f"LossFromFactoryConfig.kwargs must be a dict of arguments, got {self.kwargs!r}.")
        return self.factory(**self.kwargs)


def factory_name(factory: Any) -> str:
    """A readable name of a callable, for messages."""
    return getattr(factory, "__qualname__", None) or repr(factory)
