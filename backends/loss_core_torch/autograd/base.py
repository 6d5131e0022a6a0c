"""Helpers shared by the autograd functions."""

# T = tokens, K = targets of a row

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loss_core.row_terms import Objective, RowTerms, Sums, TopK
from loss_core_torch import compat
from loss_core_torch.tracing import is_readable


class Function(torch.autograd.Function):
    """Caches the signature of `forward`. PyTorch inspects it in each call, uncached for a tenth of the host's time."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        setattr(cls.forward, "__signature__", inspect.signature(cls.forward))  # noqa: B010


def save_context(ctx: Any, saved: Sequence[Tensor | None], output: Sequence[Tensor], results: int = 1) -> None:
    """The body of `setup_context`.

    Args:
        saved: tensors for the backward.
        output: of the function; the first `results` of them are differentiable.
    """
    ctx.mark_non_differentiable(*output[results:])
    # Otherwise autograd allocates zeros for each output without a gradient.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved)
    ctx.consumed = False


def check_upstream(upstream: Tensor) -> None:
    """Refuse a batch of upstream gradients.

    Raises:
        RuntimeError: the backward runs under torch.func.vmap (is_grads_batched, jacrev).
    """
    if torch.compiler.is_dynamo_compiling():
        return
    if compat.is_batched(upstream) or "Vmap" in compat.functorch_transforms():
        raise RuntimeError(
            "This kernel of loss_core has no batching rule for its backward (torch.func.vmap, jacrev, "
            "is_grads_batched=True). Build the loss with backend='torch:plain' there."
        )


def row_upstreams(grads: Sequence[Tensor | None], coef_T: Tensor | None, dtype: torch.dtype) -> list[Any]:
    """Upstream gradients of each row's values, [T] each, from those of a function's results; None for zero.

    Args:
        grads: upstream gradients of the results.
        coef_T: coefficient of each row in the summed result; None where the results are the values themselves.
        dtype: of the arithmetic.
    """
    found = [None if upstream is None else upstream.to(dtype) for upstream in grads]
    return found if coef_T is None else [None if upstream is None else coef_T * upstream for upstream in found]


def take_gradient(ctx: Any, stored: Tensor, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradient stored by the forward for an upstream gradient of 1, as (gradient, out).

    Where the upstream gradient is readable and is 1, `gradient` is the result. Otherwise `out` is that memory, which a
    kernel overwrites. Both are None after the first backward, whose result aliases the memory.
    """
    if ctx.consumed:
        return None, None
    ctx.consumed = True
    # `data` keeps the saved tensor's version, so that a second backward can unpack the other saved tensors.
    gradient = stored.data
    return (gradient, None) if is_readable(upstream) and float(upstream.detach()) == 1.0 else (None, gradient)


def terms_to_save(terms: RowTerms) -> tuple[Tensor, ...]:
    """The terms from which the backward computes coefficients."""
    return *terms[:3], *([] if terms.e is None else [terms.e])


def load_terms(saved: Sequence[Tensor], sums: Sums) -> tuple[RowTerms, Sequence[Tensor]]:
    """The terms saved by `terms_to_save`, and the saved tensors after them."""
    m_T, s_T, t_T = saved[:3]
    return RowTerms(m_T, s_T, t_T, e=saved[3] if sums.e else None), saved[3 + sums.e :]


def with_teacher(objective: Objective, log_p_TK: Tensor | None) -> Objective:
    """The objective with the teacher's log-probabilities, which are a separate input so that autograd tracks them."""
    return objective._replace(log_p=log_p_TK) if isinstance(objective, TopK) else objective


def teacher_grad(objective: Objective, terms: RowTerms, upstream_T: Tensor, keep_T: Tensor | None) -> Tensor:
    """The gradient with respect to the teacher's log-probabilities, [T, K]; 0 in ignored rows."""
    assert isinstance(objective, TopK)
    grad_TK: Tensor = objective.teacher_gradient(torch, terms) * upstream_T[:, None]
    return grad_TK if keep_T is None else grad_TK.masked_fill(~keep_T[:, None], 0.0)
