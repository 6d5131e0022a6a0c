"""What the autograd functions share."""

# T = tokens, K = targets of a row

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loss_core.row_terms import Objective, RowTerms, Sums, TopK
from loss_core_torch import compat
from loss_core_torch.tracing import may_read


class Function(torch.autograd.Function):
    """PyTorch's, which asks for the signature of `forward` at each call: a tenth of the host's time, if not at hand."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        setattr(cls.forward, "__signature__", inspect.signature(cls.forward))  # noqa: B010


def keep(ctx: Any, saved: Sequence[Tensor | None], output: Sequence[Tensor], results: int = 1) -> None:
    """What a `setup_context` does.

    Args:
        saved: for the backward.
        output: of the function; results: how many of them, the first ones, are differentiable.
    """
    ctx.mark_non_differentiable(*output[results:])
    # Else autograd makes zeros of their size for the outputs that have no gradient.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved)
    ctx.spent = False


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


def of_values(grads: Sequence[Tensor | None], coef_T: Tensor | None, dtype: torch.dtype) -> list[Any]:
    """The upstream gradient of each value of each row, [T], from those of a function's results; None for 0.

    Args:
        coef_T: factor of each row in the one result, or None: the results are the values.
        dtype: of the arithmetic.
    """
    found = [None if upstream is None else upstream.to(dtype) for upstream in grads]
    return found if coef_T is None else [None if upstream is None else coef_T * upstream for upstream in found]


def taken(ctx: Any, made: Tensor, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(the gradient, where it is known; else its memory, where it is free), from the gradient for an upstream of 1.

    Whether the upstream gradient is 1, the host can see on a CPU; elsewhere a kernel looks. What was made is handed on
    in its own memory, once.
    """
    if ctx.spent:
        return None, None
    ctx.spent = True
    # `data`: the saved tensor's version must stay, for a second backward to get at the others.
    gradient = made.data
    return (gradient, None) if may_read(upstream) and float(upstream.detach()) == 1.0 else (None, gradient)


def kept_terms(terms: RowTerms) -> tuple[Tensor, ...]:
    """Of the terms, those that coefficients are made of."""
    return *terms[:3], *([] if terms.e is None else [terms.e])


def restored_terms(saved: Sequence[Tensor], sums: Sums) -> tuple[RowTerms, Sequence[Tensor]]:
    """The terms of `kept_terms`, with which what was saved begins; and the rest of it."""
    number = 3 + sums.e
    m_T, s_T, t_T = saved[:3]
    return RowTerms(m_T, s_T, t_T, e=saved[3] if sums.e else None), saved[number:]


def with_teacher(objective: Objective, log_p_TK: Tensor | None) -> Objective:
    """The objective with the teacher's log-probabilities, an input of their own for autograd to see them."""
    return objective._replace(log_p=log_p_TK) if isinstance(objective, TopK) else objective


def teacher_grad(objective: Objective, terms: RowTerms, upstream_T: Tensor, keep_T: Tensor | None) -> Tensor:
    """The gradient by the teacher's log-probabilities, [T, K]; 0 in ignored rows."""
    assert isinstance(objective, TopK)
    grad_TK: Tensor = objective.teacher_gradient(torch, terms) * upstream_T[:, None]
    return grad_TK if keep_T is None else grad_TK.masked_fill(~keep_T[:, None], 0.0)
