"""`torch:plain`: the reference implementation, F.cross_entropy, F.linear and log_softmax on full tensors.

It computes in float32, or in float64 for float64 inputs. It is also the flag for what autograd supports through
PyTorch's own operations alone: second derivatives, forward mode, vmap.
"""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loss_core.dispatch.observed import record
from loss_core.row_terms import CrossEntropy, LogProbability, Objective, RowTerms, Sums, TopK, log_shares
from loss_core_torch import precision
from loss_core_torch.kernels import IGNORED, HeadOperands, Linear, LinearPairs, Pairs, Rows, WholeLosses
from loss_core_torch.tracing import compute_dtype, is_readable, no_autocast


class PlainLosses(WholeLosses):
    """See `WholeLosses` for each method."""

    flag = "torch:plain"

    def values(
        self, rows: Rows | Linear, objective: Objective, group: Any = None, reduction: str = "none"
    ) -> tuple[Tensor, ...]:
        _observe()
        assert group is None
        z_TV, keep_T = _logits(rows)
        if isinstance(objective, CrossEntropy):
            return (_cross_entropy(z_TV, rows.labels_T, keep_T, objective, reduction),)
        z_TV = z_TV if rows.inverse_temperature_T is None else z_TV * rows.inverse_temperature_T[:, None]
        if isinstance(objective, TopK):
            values: tuple[Tensor, ...] = (_top_k(z_TV, rows.labels_T, objective),)
        elif isinstance(objective, LogProbability):
            values = _log_probs(z_TV, rows.labels_T, objective.entropy)
        else:
            values = objective.values(torch, _terms(z_TV, rows.labels_T, objective.sums))
        return values if reduction == "none" else tuple(getattr(x_T, reduction)() for x_T in values)

    def divergence(self, pairs: Pairs | LinearPairs, beta: float) -> Tensor:
        _observe()
        if isinstance(pairs, LinearPairs):
            student, teacher = map(_head_logits, pairs.heads)
            pairs = Pairs(student, teacher, pairs.keep_T, pairs.inverse_temperature)
        factor = pairs.inverse_temperature
        log_s_TV = (_matrix(pairs.student, pairs.keep_T) * factor).log_softmax(-1)
        log_t_TV = (_matrix(pairs.teacher, pairs.keep_T) * factor).log_softmax(-1)
        p_t_TV, ratio_TV = log_t_TV.exp(), log_t_TV - log_s_TV
        if beta == 0:
            return _kl(p_t_TV, ratio_TV)
        p_s_TV, (log_share_t, log_share_s) = log_s_TV.exp(), log_shares(beta)
        # See `row_terms.mixture_logs`. -inf minus -inf would make loss and gradient NaN.
        x_TV = ratio_TV.masked_fill((p_t_TV == 0) & (p_s_TV == 0), 0.0) + (log_share_t - log_share_s)
        kl_t_T = _kl(p_t_TV, F.logsigmoid(x_TV) - log_share_t)
        loss_T = beta * kl_t_T + (1.0 - beta) * _kl(p_s_TV, F.logsigmoid(-x_TV) - log_share_s)
        # The rounded divergence of two equal distributions need not be 0.
        return loss_T if pairs.keep_T is None else loss_T.masked_fill(~pairs.keep_T, 0.0)

    def terms(self, rows: Rows | Linear, sums: Sums) -> RowTerms:
        with torch.no_grad():
            return _terms(_logits(rows)[0], rows.labels_T, sums)


def _kl(p_TV: Tensor, log_ratio_TV: Tensor) -> Tensor:
    """Sum of p times the logarithm of its ratio to another distribution, [T]."""
    # A class of probability 0 adds 0, even if its ratio is inf or NaN; masked inside the product so that its gradient
    # is 0 as well.
    return (p_TV * log_ratio_TV.masked_fill(p_TV == 0, 0.0)).sum(-1)


def _observe() -> None:
    # Dynamo does not trace context variables; in a traced call the graph runs, not these kernels.
    if not torch.compiler.is_dynamo_compiling():
        record(PlainLosses.flag)


def _cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, keep_T: Tensor | None, objective: CrossEntropy, reduction: str = "none"
) -> Tensor:
    """Loss of each token, 0 where ignored; or the sum or mean, if no token is ignored."""
    vocab, smoothing = logits_TV.shape[1], objective.label_smoothing
    if objective.z_loss:
        loss = _cross_entropy(logits_TV, labels_T, keep_T, objective._replace(z_loss=0.0), reduction)
        return loss + _z_loss(logits_TV, keep_T, objective.z_loss, reduction)
    if keep_T is None and is_readable(labels_T):
        # All labels were checked to be classes, so that none is -1.
        return F.cross_entropy(logits_TV, labels_T, ignore_index=-1, reduction=reduction, label_smoothing=smoothing)
    # Invalid labels could not be checked without a sync: the caller multiplies their losses by NaN, and their gradients
    # must not be those of ignored rows.
    targets_T = labels_T.clamp(0, vocab - 1)
    targets_T = targets_T if keep_T is None else targets_T.masked_fill(~keep_T, vocab)
    return F.cross_entropy(logits_TV, targets_T, ignore_index=vocab, reduction=reduction, label_smoothing=smoothing)


def _z_loss(logits_TV: Tensor, keep_T: Tensor | None, factor: float, reduction: str) -> Tensor:
    z_loss_T = factor * logits_TV.logsumexp(-1).square()
    if keep_T is not None:
        z_loss_T = z_loss_T.masked_fill(~keep_T, 0.0)
    return z_loss_T if reduction == "none" else getattr(z_loss_T, reduction)()


def _head_logits(head: HeadOperands) -> Tensor:
    """h @ W.T + b in the dtype of the arithmetic."""
    dtype = compute_dtype(head.h_TH.dtype)
    # `product_dtype` already follows autocast, which would round the logits as well.
    with no_autocast(head.h_TH):
        logits_TV = _product(*(_rounded(x, head.product_dtype, dtype) for x in (head.h_TH, head.w_VH)))
    return logits_TV if head.bias_V is None else logits_TV + head.bias_V.to(dtype)


def _logits(rows: Rows | Linear) -> tuple[Tensor, Tensor | None]:
    """Logits after the softcap, [T, V] in the dtype of the arithmetic, 0 in ignored rows; and keep_T."""
    if isinstance(rows, Rows):
        return _capped(_matrix(rows.logits, rows.keep_T), rows.softcap), rows.keep_T
    logits_TV = _head_logits(rows.head)
    keep_T = (rows.labels_T if rows.labels_T.dim() == 1 else rows.labels_T[:, 0]) != IGNORED
    # NaN in the weight must not enter its gradient through an ignored token.
    return _capped(logits_TV.masked_fill(~keep_T[:, None], 0.0), rows.softcap), keep_T


def _terms(z_TV: Tensor, labels_T: Tensor, sums: Sums) -> RowTerms:
    """Differentiable terms, but for m, which cancels in every value computed from them."""
    m_T = z_TV.detach().amax(-1)
    x_TV = z_TV - m_T[:, None]
    t_T = z_TV.gather(1, labels_T.clamp(0, z_TV.shape[1] - 1)[:, None])[:, 0]
    exp_TV = x_TV.exp()
    e_T = (exp_TV * x_TV.masked_fill(exp_TV == 0, 0.0)).sum(-1) if sums.e else None
    return RowTerms(m_T, exp_TV.sum(-1), t_T, z_TV.sum(-1) if sums.z_sum else None, e_T)


def _log_probs(z_TV: Tensor, labels_T: Tensor, with_entropy: bool) -> tuple[Tensor, ...]:
    log_p_TV = z_TV.log_softmax(-1)
    # Invalid labels could not be checked without a sync: the caller multiplies their results by NaN.
    logprobs_T = log_p_TV.gather(1, labels_T.clamp(0, z_TV.shape[1] - 1)[:, None])[:, 0]
    if not with_entropy:
        return (logprobs_T,)
    p_TV = log_p_TV.exp()
    # A class of probability 0 adds 0; masked inside the product so that its gradient is 0 as well.
    return logprobs_T, -(p_TV * log_p_TV.masked_fill(p_TV == 0, 0.0)).sum(-1)


def _top_k(z_TV: Tensor, labels_TK: Tensor, teacher: TopK) -> Tensor:
    log_q_TV = z_TV.log_softmax(-1)
    # Invalid indices could not be checked without a sync: the caller multiplies the losses of their tokens by NaN.
    labels_TK, p_TK = labels_TK.clamp(0, z_TV.shape[1] - 1), teacher.log_p.exp()
    loss_T = _kl(p_TK, teacher.log_p - log_q_TV.gather(1, labels_TK))
    if not teacher.tail:
        return loss_T
    p_T = torch.relu(1.0 - p_TK.sum(-1))
    others_TV = log_q_TV.scatter(1, labels_TK, -torch.inf)
    # If the student gives all other classes probability 0, the sum of their exps is 0, with a gradient of 0.
    none_T = others_TV.amax(-1) == -torch.inf
    log_q_T = others_TV.masked_fill(none_T[:, None], 0.0).logsumexp(-1).masked_fill(none_T, -torch.inf)
    return loss_T + _kl(p_T[:, None], (p_T.masked_fill(p_T == 0, 1.0).log() - log_q_T)[:, None])


def _capped(logits_TV: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits_TV / softcap) if softcap else logits_TV


def _matrix(logits: Tensor, keep_T: Tensor | None) -> Tensor:
    """[T, V] in the dtype of the arithmetic; ignored rows, which may hold inf or NaN, are 0."""
    logits_TV = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    logits_TV = logits_TV.to(compute_dtype(logits.dtype))
    return logits_TV if keep_T is None else logits_TV.masked_fill(~keep_T[:, None], 0.0)


def _rounded(x: Tensor, product_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    """x rounded to product_dtype, in the dtype of the arithmetic; its gradient is not rounded (straight-through)."""
    if x.dtype == product_dtype:
        return x.to(dtype)
    x = x.to(dtype)
    # Exactly the rounded value: the difference of two numbers this close to each other is exact.
    return x + (x.to(product_dtype).to(dtype) - x).detach()


def _product(h_TH: Tensor, w_VH: Tensor) -> Tensor:
    """h @ W.T in full precision, forward and backward."""
    # In a graph of torch.compile the compiler chooses the product, and its precision.
    if torch.compiler.is_dynamo_compiling() or precision.float32_products_are_full() or h_TH.dtype != torch.float32:
        return F.linear(h_TH, w_VH)
    product: Tensor = _FullProduct.apply(h_TH, w_VH.t())
    return product


class _FullProduct(torch.autograd.Function):
    """a @ b in full float32, whatever precision PyTorch is set to; differentiable any number of times."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a_MK: Tensor, b_KN: Tensor) -> Tensor:
        with precision.full_float32_products():
            return a_MK @ b_KN

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        a_MK, b_KN = ctx.saved_tensors
        return _FullProduct.apply(grads[0], b_KN.t()), _FullProduct.apply(a_MK.t(), grads[0])


KERNELS = PlainLosses()
