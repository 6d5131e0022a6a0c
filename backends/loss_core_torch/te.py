"""`torch:te`: the loss of each token by Transformer Engine's public `parallel_cross_entropy`.

The only file that knows transformer_engine. TE's kernels make the loss per token and its gradient; the
contract of the losses is kept here, around them. There are two kinds of TE, told apart by the signature:

- From 2.19 on it leaves the logits alone, keeps a copy of them in their own dtype, and makes the gradient in
  backward from each token's upstream gradient.
- From 2.5 to 2.18 it makes the gradient in forward, over the logits themselves (2.18: beside them), rounds it
  there to their dtype, and scales it in backward, up to 2.7 by the first token's upstream gradient alone. Slices
  such as logits[:, :-1] of a batch are read in wrong rows, and a second backward is wrong in silence.
  These get a float32 copy to overwrite and an upstream gradient of ones; each token's factor is applied here,
  before the only rounding. That copy takes 4 bytes per logit, with fp32_upcast=False as well.

Older ones are refused: 2.4 and before divide the gradient by the number of rows without being asked, 2.3 and
before have no ignore_idx, and before 2.2 there is no such function.

What TE's kernels do not do, here as there: a shard of the vocabulary (or the first 32768 classes of a larger
one) whose logits are all -inf makes the token's loss NaN; pad with a finite number instead. torch.compile
breaks its graph around the call.
"""

# T = tokens (B * S), B, S = the leading dimensions as TE wants them, V = vocabulary of this rank

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from loss_core.backend import BackendUnavailable, FlagStatus, install_line
from loss_core_torch.autograd import _once

FLAG = "torch:te"
OLDEST = (2, 5)

# Where TE's kernels run. The tests set "cpu", for TE's own sources under Triton's interpreter.
DEVICE_TYPE = "cuda"

# TE's own default of ignore_idx, for tokens that do not count, whatever the caller's ignore_index: no class has this
# number. Left to the default, since 2.5 and 2.6 fail in backward once ignore_idx is passed.
_IGNORED = -100

_DTYPES = (torch.float32, torch.bfloat16)


def status() -> FlagStatus:
    """Whether TE can be used here, and if not, why."""
    found = _version()
    version = f"transformer_engine {found}" if found else ""
    try:
        _entry()
    except BackendUnavailable as error:
        return FlagStatus(FLAG, False, str(error), version, install_line("te"))
    if DEVICE_TYPE == "cuda" and not torch.cuda.is_available():
        reason = f"'{FLAG}' needs a CUDA device, and torch.cuda.is_available() is False here."
        return FlagStatus(FLAG, False, reason, version, "")
    return FlagStatus(FLAG, True, "", version, "")


# Not traced: TE's graph inside of ours is none that the compiler can follow.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def cross_entropy_per_token(
    logits: Tensor, labels_T: Tensor, keep_T: Tensor, bad_T: Tensor | None, group: Any
) -> Tensor:
    """Cross entropy per token over logits whose vocabulary may be sharded over a group.

    Args:
        logits: [..., V] float32 or bfloat16 on a CUDA device, any strides; not changed.
        labels_T: [T] int64 over the whole vocabulary.
        keep_T: [T] bool; elsewhere loss and gradient are 0.
        bad_T: [T] bool or None, tokens whose label is no class: loss and gradient are NaN.
        group: process group with equal shards in rank order, or None.
    Returns:
        loss_T, [T] float32. A second backward runs TE's forward again, its collective included.
    Raises:
        BackendUnavailable: no usable TE, or logits of a device or dtype that it does not take.
    """
    if logits.device.type != DEVICE_TYPE:
        raise BackendUnavailable(f"'{FLAG}' takes logits on a CUDA device, got {logits.device}: use 'torch:eager'.")
    if logits.dtype not in _DTYPES:
        raise BackendUnavailable(f"'{FLAG}' takes float32 and bfloat16 logits, got {logits.dtype}: use 'torch:eager'.")
    _entry()
    if logits.numel() == 0:
        # TE refuses empty tensors. A sum over no classes is 0 and stays connected.
        loss_T = logits.float().sum(-1).reshape(-1)
        return loss_T if bad_T is None else loss_T.masked_fill(bad_T, torch.nan)
    return _CrossEntropy.apply(logits, labels_T, keep_T, bad_T, group)


class _CrossEntropy(Function):
    """TE's own graph in a function of ours: what TE does not promise is added on both of its sides."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels_T: Tensor, keep_T: Tensor, bad_T: Tensor | None, group: Any) -> Tensor:
        # A label that is no class would be looked up out of bounds: class 0 stands in, and becomes NaN below.
        known_T = labels_T if bad_T is None else torch.where(bad_T, 0, labels_T)
        known_T = torch.where(keep_T, known_T, _IGNORED)
        ctx.group = group
        ctx.save_for_backward(logits, known_T, keep_T, bad_T)
        ctx.run = _run(logits, known_T, group, ctx.needs_input_grad[0])
        loss_T = ctx.run[0].detach().reshape(-1)
        if bad_T is not None:
            loss_T = loss_T.masked_fill(bad_T, torch.nan)
        # TE has 0 there, too. A tensor of our own in any case: not a view into TE's graph.
        return loss_T.masked_fill(~keep_T, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        logits, known_T, keep_T, bad_T = ctx.saved_tensors
        coef_T = grads[0].detach()
        if bad_T is not None:
            coef_T = coef_T.masked_fill(bad_T, torch.nan)
        coef_T = coef_T.masked_fill(~keep_T, 0.0)
        # TE's backward writes into its buffers, so they serve once; a second backward makes new ones.
        run, ctx.run = ctx.run or _run(logits, known_T, ctx.group, True), None
        with torch.no_grad():
            grad = _gradient(run[0], run[1], coef_T).to(logits.dtype).reshape(logits.shape)
        name, instead = "Transformer Engine's cross entropy", "torch.nn.functional.cross_entropy"
        return _once(grad, name, instead, logits, grads[0]), None, None, None, None


def _run(logits: Tensor, labels_T: Tensor, group: Any, want_grad: bool) -> tuple[Tensor, Tensor]:
    """TE's loss [B, S], with its graph behind it, and the tensor [B, S, V] that this graph starts from."""
    parallel_cross_entropy, preserves = _entry()
    start_BSV = _as_rows(logits.detach())
    if not preserves:
        start_BSV = start_BSV.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    elif start_BSV.stride(-1) != 1:
        # Its kernels multiply class and stride in 32 bits, which a transposed tensor can exceed.
        start_BSV = start_BSV.contiguous()
    start_BSV.requires_grad_(want_grad)
    # Triton launches on the current device, whichever device the tensors are on.
    with torch.set_grad_enabled(want_grad), torch.cuda.device_of(start_BSV):
        # By position: the first argument's name differs, the order does not.
        loss_BS = parallel_cross_entropy(start_BSV, labels_T.view(start_BSV.shape[:2]), 0.0, False, group)
    return loss_BS, start_BSV


def _gradient(loss_BS: Tensor, start_BSV: Tensor, coef_T: Tensor) -> Tensor:
    """The gradient [B, S, V] for the upstream gradient of each token, from the graph of `_run`."""
    coef_BS = coef_T.view(loss_BS.shape)
    _, preserves = _entry()
    if preserves:
        return torch.autograd.grad(loss_BS, start_BSV, coef_BS)[0]
    return torch.autograd.grad(loss_BS, start_BSV, torch.ones_like(loss_BS))[0].mul_(coef_BS.unsqueeze(-1))


def _as_rows(logits: Tensor) -> Tensor:
    """A new tensor [B, S, V] of the same values: a view where the strides allow it."""
    if logits.dim() == 3:
        return logits.view_as(logits)
    return logits.reshape(1, -1, logits.shape[-1])


@cache
def _entry() -> tuple[Callable[..., Tensor], bool]:
    """TE's function, and whether it leaves its input alone."""
    version = _version()
    parts = re.match(r"(\d+)\.(\d+)", version or "")
    if parts and (int(parts[1]), int(parts[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise BackendUnavailable(
            f"'{FLAG}' needs transformer_engine >= {oldest}, found {version}: {install_line('te')}"
        )
    try:
        module = importlib.import_module("transformer_engine.pytorch.cross_entropy")
    except Exception as error:
        # Not only ImportError: TE raises other kinds where a part of it is missing.
        raise BackendUnavailable(_why_not(error)) from error
    function = module.parallel_cross_entropy
    # Up to 2.11 it is the `apply` of an autograd function, which has no names.
    return function, "overwrite_input" in inspect.signature(function).parameters


def _why_not(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "transformer_engine":
        return f"'{FLAG}' needs transformer_engine ({error}): {install_line('te')}"
    return (
        f"'{FLAG}' needs transformer_engine, which is installed but can't be imported "
        f"({type(error).__name__}: {error}): {install_line('te')}"
    )


def _version() -> str | None:
    try:
        return importlib.metadata.version("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        return None
