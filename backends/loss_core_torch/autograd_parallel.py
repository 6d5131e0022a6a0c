"""Fused linear cross entropy whose weight is sharded over the vocabulary, as an autograd function.

Forward: one all-gather of the row state. Backward: one all-reduce of the gradient of the hidden states, or one
reduce-scatter where each rank holds a share of the sequence. The weight's gradient needs nobody else.
"""

# T = tokens, R = ranks, V = vocabulary of this rank, H = hidden

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from loss_core import row_stats
from loss_core_torch import distributed, kernels
from loss_core_torch.autograd import _no_autocast, _refused
from loss_core_torch.distributed import Shards


class ParallelLinearCrossEntropy(Function):
    """Cross entropy of softcap(h @ W.T) per token, the rows of W sharded over a group.

    Inputs: hidden [..., H] and w_VH float; labels_T [T] int64 over the whole vocabulary; keep_T [T] bool; bad_T [T]
    bool or None, tokens whose label is no class; softcap; product dtype; shards; dimension of hidden that is sharded
    over the group, or None; name of the set of kernels; skip_ignored and num_valid of
    `eager_linear.tokens_in_products`.
    Output: loss_T [T] in the dtype of the arithmetic; 0 where keep is False, NaN where bad.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        w_VH: Tensor,
        labels_T: Tensor,
        keep_T: Tensor,
        bad_T: Tensor | None,
        softcap: float,
        product_dtype: torch.dtype,
        shards: Shards,
        sequence_dim: int | None,
        kernel: str,
        skip_ignored: bool | None,
        num_valid: int | None,
    ) -> Tensor:
        with _no_autocast(hidden):
            whole = hidden if sequence_dim is None else _gathered(hidden, sequence_dim, shards.group)
            h_TH = whole.reshape(-1, hidden.shape[-1])
            keep_logits = any(ctx.needs_input_grad[:2])
            parts = kernels.find(kernel).linear_cross_entropy_stats(
                h_TH, w_VH, labels_T, keep_T, shards.start, softcap, product_dtype, skip_ignored, num_valid,
                keep_logits,
            )  # fmt: skip
            ctx.logits = parts[3]
            state = distributed.fold(row_stats.RowState(*parts[:3]), row_stats.combine, shards.group, bad_T)
            loss_T = row_stats.finish(torch, state)
        ctx.settings = (softcap, product_dtype, shards, sequence_dim, kernel, skip_ignored, num_valid)
        ctx.shape = hidden.shape
        # Hidden states that were gathered are kept: to gather them again would be a second collective in backward.
        ctx.save_for_backward(hidden if sequence_dim is None else h_TH, w_VH, labels_T, keep_T, state.m, state.s)
        return loss_T.masked_fill(~keep_T, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, w_VH, labels_T, keep_T, m_T, s_T = ctx.saved_tensors
        softcap, product_dtype, shards, sequence_dim, kernel, *skip = ctx.settings
        want_h, want_w = ctx.needs_input_grad[:2]
        with torch.no_grad(), _no_autocast(hidden):
            coef_T = grads[0].to(m_T.dtype)
            # The logits serve once: a second backward computes them again.
            logits, ctx.logits = ctx.logits, m_T.new_empty(0)
            grad_h, grad_w = kernels.find(kernel).linear_cross_entropy_grads(
                hidden.reshape(-1, hidden.shape[-1]), w_VH, labels_T, keep_T, shards.start, m_T, s_T, coef_T, softcap,
                product_dtype, [want_h, want_w], *skip, logits,
            )  # fmt: skip
            if not want_h:
                grad_h = None
            elif sequence_dim is None:
                dist.all_reduce(grad_h, group=shards.group)
                grad_h = grad_h.view(ctx.shape).to(hidden.dtype)
            else:
                grad_h = _reduce_scattered(grad_h, ctx.shape, sequence_dim, shards.group).to(hidden.dtype)
            found = (grad_h, grad_w.to(w_VH.dtype) if want_w else None)
        return (*_refused(found, hidden, w_VH, grads[0]), *[None] * 10)


def _gathered(hidden: Tensor, dim: int, group: Any) -> Tensor:
    """The whole sequence, from the equal shares of the ranks along `dim`."""
    shares_R = distributed.gather_equal(hidden, group)
    return shares_R.movedim(0, dim).flatten(dim, dim + 1)


def _reduce_scattered(grad_h: Tensor, shape: torch.Size, dim: int, group: Any) -> Tensor:
    """The sum over the ranks, of this rank's share: the reverse of `_gathered`."""
    ranks = dist.get_world_size(group)
    shares_R = grad_h.view(*shape[:dim], ranks, *shape[dim:]).movedim(dim, 0).contiguous()
    out = grad_h.new_empty(shape)
    # torch 2.13 renamed the collective and warns about the old name.
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    reduce_scatter(out.view(-1), shares_R.view(-1), group=group)
    return out
