"""Turns off PyTorch's settings for reduced-precision matrix products while a loss is computed.

PyTorch has no such setting for a single product, so those of the process are changed, and restored by the last call to
leave.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def float32_products_are_full() -> bool:
    """Whether no setting reduces the precision of float32 products. Seen in torch 2.10, 2.13."""
    return not any(map(_is_reduced, _BACKENDS))


@contextmanager
def full_float32_products() -> Iterator[None]:
    """Context in which float32 matrix products are computed in float32, and 16-bit ones on CUDA accumulate in float32.

    The latter includes the partial sums of split products. Seen in torch 2.10, 2.13.
    """
    _SETTINGS.enter()
    try:
        yield
    finally:
        _SETTINGS.leave()


_BACKENDS: tuple[Any, ...] = (torch.backends.cuda, torch.backends.mkldnn)
_CUDA: Any = torch.backends.cuda.matmul
_REDUCED_SUMS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


def _is_reduced(backend: Any) -> bool:
    """Whether a backend computes float32 products in another precision; "none" defers to the next setting."""
    chain = (backend.matmul, backend, torch.backends)
    found = (getattr(setting, "fp32_precision", "none") for setting in chain)
    return next((precision for precision in found if precision != "none"), "none") not in ("none", "ieee")


class _Settings:
    """Settings of the process that the first call to enter changes, and the last call to leave restores.

    Args:
        changes: returns owner, name and wanted value of each setting that has another value.
    """

    def __init__(self, changes: Callable[[], list[tuple[Any, str, Any]]]) -> None:
        self._changes, self._lock, self._calls = changes, threading.Lock(), 0
        self._before: list[tuple[Any, str, Any]] = []

    def enter(self) -> None:
        with self._lock:
            if self._calls == 0:
                changes = self._changes()
                self._before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
                for owner, name, value in changes:
                    setattr(owner, name, value)
            self._calls += 1

    def leave(self) -> None:
        with self._lock:
            self._calls -= 1
            if self._calls == 0:
                for owner, name, value in self._before:
                    setattr(owner, name, value)


def _changes() -> list[tuple[Any, str, Any]]:
    reduced = [(backend.matmul, "fp32_precision", "ieee") for backend in _BACKENDS if _is_reduced(backend)]
    return reduced + [(_CUDA, name, False) for name in _REDUCED_SUMS if getattr(_CUDA, name)]


_SETTINGS = _Settings(_changes)
