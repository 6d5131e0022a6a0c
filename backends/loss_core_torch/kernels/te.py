"""`torch:te`: the loss of each token from Transformer Engine's public `parallel_cross_entropy`.

The only file that imports transformer_engine. TE's kernels compute per-token losses and their gradient; this file adds
what the contract of the losses requires besides. TE comes in two kinds, distinguished by the signature:

- From 2.19 on, TE does not change the logits, saves a copy in their dtype, and computes the gradient in backward from
  the upstream gradient of each token.
- From 2.5 to 2.18, TE computes the gradient in forward, in place of the logits (2.18: in a separate tensor), rounded to
  their dtype, and scales it in backward; up to 2.7 by the upstream gradient of the first token alone. It reads wrong
  rows of slices such as logits[:, :-1] of a batch, and a second backward is silently wrong. These versions are called
  with a float32 copy to overwrite and an upstream gradient of ones; the factor of each token is applied here, before
  the only rounding. The copy takes 4 bytes per logit, with fp32_upcast=False as well.

Older versions are refused: up to 2.4 the gradient is divided by the number of rows, up to 2.3 there is no ignore_idx,
and before 2.2 the function does not exist.

Limits of TE's kernels that remain: if all logits of a vocabulary shard (or of the first 32768 classes of a larger one)
are -inf, the token's loss is NaN; pad with a finite number instead. torch.compile breaks its graph around the call.
"""

# T = tokens (B * S), B, S = leading dimensions of the logits passed to TE, V = vocabulary of this rank

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from loss_core.dispatch.flags import install_line
from loss_core.dispatch.observed import record
from loss_core.dispatch.protocol import BackendUnavailable, FlagStatus
from loss_core.row_terms import CrossEntropy, Objective
from loss_core_torch import compat
from loss_core_torch.kernels import Linear, Rows, WholeLosses
from loss_core_torch.second_derivative import once_differentiable

OLDEST = (2, 5)

# TE's default of ignore_idx, the label of ignored tokens whatever the caller's ignore_index. It is not passed to TE,
# since that makes backward fail in 2.5 and 2.6.
_IGNORED = -100

_DTYPES = (torch.float32, torch.bfloat16)


class Entry(NamedTuple):
    """TE's function, and whether it preserves its input."""

    parallel_cross_entropy: Callable[..., Tensor]
    preserves: bool


class TELosses(WholeLosses):
    """Cross entropy over logits whose vocabulary may be sharded; see `WholeLosses`.

    Args:
        device_type: device of TE's kernels: "cuda", or "cpu" under TRITON_INTERPRET=1, as for torch:triton.
    """

    flag = "torch:te"
    takes_shards = True

    def __init__(self, device_type: str = "cuda") -> None:
        self._device_type = device_type

    def status(self) -> FlagStatus:
        """Whether TE is usable here, and if not, why."""
        installed = _version()
        version = f"transformer_engine {installed}" if installed else ""
        try:
            find_entry()
        except BackendUnavailable as error:
            return FlagStatus(self.flag, False, str(error), version, install_line("te"))
        if self._device_type == "cuda" and not torch.cuda.is_available():
            reason = f"'{self.flag}' needs a CUDA device, and torch.cuda.is_available() is False here."
            return FlagStatus(self.flag, False, reason, version, "")
        return FlagStatus(self.flag, True, "", version, "")

    # Not traced: the compiler cannot follow TE's autograd graph inside of ours.
    @compat.outside_of_graphs
    def values(
        self, rows: Rows | Linear, objective: Objective, group: Any = None, reduction: str = "none"
    ) -> tuple[Tensor, ...]:
        """See `WholeLosses.values`. A second backward runs TE's forward again, including its collective.

        Args:
            rows: logits in float32 or bfloat16, not changed.
            objective: a cross entropy.
        Raises:
            BackendUnavailable: if TE is not usable, or does not support an option, the device or the dtype; and for
                label smoothing over a group, which TE spreads over the classes of this rank alone.
        """
        # The backend offers TE for no other loss.
        assert isinstance(rows, Rows)
        assert isinstance(objective, CrossEntropy)
        record(self.flag)
        for name, value in {**objective.options, "logit_softcapping": rows.softcap}.items():
            if value and name != "label_smoothing":
                raise BackendUnavailable(
                    f"'{self.flag}' has no {name}, got {value}: use 'torch:eager' or 'torch:triton'."
                )
        if objective.label_smoothing and group is not None:
            raise BackendUnavailable(
                f"'{self.flag}' is wrong with label_smoothing over a group, got {objective.label_smoothing}: use "
                "'torch:eager' or 'torch:triton'."
            )
        logits, keep_T = rows.logits, rows.keep_T
        self._check(logits)
        if logits.numel() == 0:
            # TE refuses empty tensors. A sum over no classes is 0 and stays connected to the graph.
            return (_reduced(logits.float().sum(-1).reshape(-1), reduction),)
        # Invalid labels would be read out of bounds: replaced by class 0.
        labels_T = torch.where((rows.labels_T >= 0) & (rows.labels_T < objective.num_classes), rows.labels_T, 0)
        if keep_T is not None:
            labels_T = torch.where(keep_T, labels_T, _IGNORED)
        loss_T: Tensor = _CrossEntropy.apply(logits, labels_T, keep_T, objective.label_smoothing, group, self._entry)
        return (_reduced(loss_T, reduction),)

    @cached_property
    def _entry(self) -> Entry:
        return find_entry()

    def _check(self, logits: Tensor) -> None:
        if logits.device.type != self._device_type:
            raise BackendUnavailable(
                f"'{self.flag}' takes logits on a CUDA device, got {logits.device}: use 'torch:eager'."
            )
        if logits.dtype not in _DTYPES:
            raise BackendUnavailable(
                f"'{self.flag}' takes float32 and bfloat16 logits, got {logits.dtype}: use 'torch:eager'."
            )


class _CrossEntropy(Function):
    """Runs TE's autograd graph inside a Function, so that inputs, second backwards and gradients follow the contract.

    Inputs: logits [..., V]; labels_T [T] int64, -100 for ignored tokens; keep_T [T] bool or None; label smoothing; the
    group; the entry.
    Output: loss_T, [T] float32.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels_T: Tensor, keep_T: Tensor | None, smoothing: float, group: Any, entry: Entry
    ) -> Tensor:
        ctx.smoothing, ctx.group, ctx.entry = smoothing, group, entry
        ctx.save_for_backward(logits, labels_T, keep_T)
        ctx.run = _run(entry, logits, labels_T, smoothing, group, ctx.needs_input_grad[0])
        # A new tensor, not a view into TE's graph. TE returns 0 for ignored tokens.
        return ctx.run[0].detach().reshape(-1).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        logits, labels_T, keep_T = ctx.saved_tensors
        coef_T = grads[0].detach()
        if keep_T is not None:
            coef_T = coef_T.masked_fill(~keep_T, 0.0)
        # TE's backward overwrites its buffers; a second backward runs TE again for new ones.
        run, ctx.run = ctx.run or _run(ctx.entry, logits, labels_T, ctx.smoothing, ctx.group, True), None
        with torch.no_grad():
            grad = _gradient(ctx.entry, run[0], run[1], coef_T).to(logits.dtype).reshape(logits.shape)
        return once_differentiable(grad, logits, grads[0]), None, None, None, None, None


def _run(
    entry: Entry, logits: Tensor, labels_T: Tensor, smoothing: float, group: Any, want_grad: bool
) -> tuple[Tensor, Tensor]:
    """TE's loss [B, S] with its autograd graph, and the leaf [B, S, V] of this graph."""
    leaf_BSV = _as_rows(logits.detach())
    if not entry.preserves:
        leaf_BSV = leaf_BSV.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    elif leaf_BSV.stride(-1) != 1:
        # TE's kernels multiply class and stride in 32 bits, which overflows for large transposed tensors.
        leaf_BSV = leaf_BSV.contiguous()
    leaf_BSV.requires_grad_(want_grad)
    # Triton launches on the current device, not on that of the tensors.
    with torch.set_grad_enabled(want_grad), torch.cuda.device_of(leaf_BSV):
        # By position: the name of the first argument differs between versions, the order does not.
        loss_BS = entry.parallel_cross_entropy(leaf_BSV, labels_T.view(leaf_BSV.shape[:2]), smoothing, False, group)
    return loss_BS, leaf_BSV


def _gradient(entry: Entry, loss_BS: Tensor, leaf_BSV: Tensor, coef_T: Tensor) -> Tensor:
    """The gradient [B, S, V] for the upstream gradient of each token, from the graph of `_run`."""
    coef_BS = coef_T.view(loss_BS.shape)
    if entry.preserves:
        return torch.autograd.grad(loss_BS, leaf_BSV, coef_BS)[0]
    return torch.autograd.grad(loss_BS, leaf_BSV, torch.ones_like(loss_BS))[0].mul_(coef_BS.unsqueeze(-1))


def _reduced(loss_T: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss_T
    return loss_T.mean() if reduction == "mean" else loss_T.sum()


def _as_rows(logits: Tensor) -> Tensor:
    """A new tensor [B, S, V] with the same values: a view where the strides allow it."""
    if logits.dim() == 3:
        return logits.view_as(logits)
    return logits.reshape(1, -1, logits.shape[-1])


def find_entry() -> Entry:
    """The entry point of the installed TE.

    Raises:
        BackendUnavailable: if TE is not installed, is too old, or can't be imported.
    """
    version = _version()
    parts = re.match(r"(\d+)\.(\d+)", version or "")
    if parts and (int(parts[1]), int(parts[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise BackendUnavailable(
            f"'{TELosses.flag}' needs transformer_engine >= {oldest}, found {version}: {install_line('te')}"
        )
    try:
        module = importlib.import_module("transformer_engine.pytorch.cross_entropy")
    except Exception as error:
        # Not only ImportError: TE raises other exceptions if a part of it is missing.
        raise BackendUnavailable(_why_not(error)) from error
    function = module.parallel_cross_entropy
    # Up to 2.11 it is the `apply` of an autograd function, whose signature has no argument names.
    return Entry(function, "overwrite_input" in inspect.signature(function).parameters)


def _why_not(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "transformer_engine":
        return f"'{TELosses.flag}' needs transformer_engine ({error}): {install_line('te')}"
    return (
        f"'{TELosses.flag}' needs transformer_engine, which is installed but can't be imported "
        f"({type(error).__name__}: {error}): {install_line('te')}"
    )


def _version() -> str | None:
    try:
        return importlib.metadata.version("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        return None


KERNELS = TELosses("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
