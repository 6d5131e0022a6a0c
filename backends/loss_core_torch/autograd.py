"""The losses per token as autograd functions: row state forward, local backward.

Everything around them (reduction, weights, counts, dtype of the result) is plain autograd in
`module_*.py`, on [T] values.
"""

# T = tokens, V = vocabulary (of this rank), H = hidden

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from loss_core import row_stats
from loss_core_torch import distributed, inplace, kernels, values
from loss_core_torch.distributed import Shards
from loss_core_torch.values import compute_dtype


class _RefuseSecondDerivative(Function):
    """Identity whose backward is an error: put behind gradients that are not differentiable."""

    @staticmethod
    def forward(grad: Tensor, name: str, instead: str, *sources: Tensor | None) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.name, ctx.instead, *_ = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(
            f"{ctx.name} has no second derivative (its backward is once_differentiable). Use {ctx.instead} where "
            "gradients of gradients are needed."
        )


def _once(grad: Tensor | None, name: str, instead: str, *sources: Tensor | None) -> Tensor | None:
    """The gradient, made to refuse a second derivative where create_graph=True asks for one."""
    if grad is None or not torch.is_grad_enabled():
        return grad
    return _RefuseSecondDerivative.apply(grad, name, instead, *sources)


class CrossEntropy(Function):
    """Cross entropy per token over logits whose vocabulary may be sharded over a group.

    Inputs: logits [..., V] float; labels_T [T] int64 over the whole vocabulary; keep_T [T] bool;
    bad_T [T] bool or None, tokens whose label is no class; shards, or None for a whole vocabulary; name of the set
    of kernels; whether the backward writes over the logits.
    Output: loss_T [T] in the dtype of the arithmetic; 0 where keep is False, NaN where bad.
    """

    @staticmethod
    def forward(
        logits: Tensor,
        labels_T: Tensor,
        keep_T: Tensor,
        bad_T: Tensor | None,
        shards: Shards | None,
        kernel: str,
        overwrite: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with _no_autocast(logits):
            set_of_kernels = kernels.find(kernel)
            if shards is None and bad_T is None and getattr(set_of_kernels, "ROWS_LEAVE_OTHERS", False):
                loss_T, m_T, s_T = set_of_kernels.cross_entropy_rows(logits, labels_T, keep_T)
                return loss_T, m_T, s_T
            start = 0 if shards is None else shards.start
            state = row_stats.RowState(*set_of_kernels.cross_entropy_stats(logits, labels_T, start))
            if shards is not None:
                state = distributed.fold(state, row_stats.combine, shards.group, bad_T)
            loss_T = row_stats.finish(torch, state)
            if bad_T is not None:
                loss_T = loss_T.masked_fill(bad_T, torch.nan)
            return loss_T.masked_fill(~keep_T, 0.0), state.m, state.s

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, labels_T, keep_T, bad_T, shards, ctx.kernel, ctx.overwrite = inputs
        ctx.vocab_start = 0 if shards is None else shards.start
        _, m_T, s_T = output
        ctx.mark_non_differentiable(m_T, s_T)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels_T, keep_T, bad_T, m_T, s_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inplace.claim(ctx)
        logits, labels_T, keep_T, bad_T, m_T, s_T = ctx.saved_tensors
        upstream_T = grads[0]
        with torch.no_grad(), _no_autocast(logits):
            coef_T = upstream_T.to(m_T.dtype)
            if bad_T is not None:
                coef_T = coef_T.masked_fill(bad_T, torch.nan)
            args = (logits, labels_T, ctx.vocab_start, keep_T, m_T, s_T, coef_T)
            if ctx.overwrite:
                kernels.find(ctx.kernel).cross_entropy_overwrite(*args)
                grad = inplace.overwritten(ctx, logits)
            else:
                grad = kernels.find(ctx.kernel).cross_entropy_grad(*args)
        once = _once(grad, "loss_core's cross entropy", "torch.nn.functional.cross_entropy", logits, upstream_T)
        return once, None, None, None, None, None, None


class CrossEntropySum(Function):
    """sum over tokens of coef * cross entropy over logits, with the gradient made in the forward.

    For sets of kernels that have `cross_entropy_with_grad`. The first backward takes the gradient's buffer, and
    with an upstream gradient of exactly 1 it has nothing else to do; a second one (retain_graph) computes it again.
    With overwrite the gradient is made in the backward, over the logits: made in the forward, it would be there for
    whoever reads the logits in between.

    Inputs: logits [..., V] float; labels_T [T] int64; keep_T [T] bool; coef_T [T], not differentiated; name of the
    set of kernels; overwrite.
    Output: scalar in the dtype of the arithmetic.
    """

    @staticmethod
    def forward(
        logits: Tensor, labels_T: Tensor, keep_T: Tensor, coef_T: Tensor, kernel: str, overwrite: bool
    ) -> tuple[Tensor, ...]:
        with _no_autocast(logits):
            if overwrite:
                made = kernels.find(kernel).cross_entropy_rows(logits, labels_T, keep_T)
            else:
                made = kernels.find(kernel).cross_entropy_with_grad(logits, labels_T, keep_T, coef_T)
            return (_weighted_sum(coef_T, made[0]), *made)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, labels_T, keep_T, coef_T, ctx.kernel, ctx.overwrite = inputs
        _, _, m_T, s_T, *buffers = output
        ctx.buffer = buffers[0] if buffers else None
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels_T, keep_T, coef_T, m_T, s_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inplace.claim(ctx)
        upstream = grads[0]
        logits, labels_T, keep_T, coef_T, m_T, s_T = ctx.saved_tensors
        set_of_kernels = kernels.find(ctx.kernel)
        with torch.no_grad(), _no_autocast(logits):
            # Handed over, not copied: autograd may then keep the buffer as the .grad itself.
            grad, ctx.buffer = ctx.buffer, None
            if grad is None:
                scaled_T = coef_T * upstream.to(coef_T.dtype)
                args = (logits, labels_T, 0, keep_T, m_T, s_T, scaled_T)
                if ctx.overwrite:
                    set_of_kernels.cross_entropy_overwrite(*args)
                    grad = inplace.overwritten(ctx, logits)
                else:
                    grad = set_of_kernels.cross_entropy_grad(*args)
            else:
                set_of_kernels.cross_entropy_scale_grad(grad, logits, labels_T, keep_T, m_T, s_T, coef_T, upstream)
        once = _once(grad, "loss_core's cross entropy", "torch.nn.functional.cross_entropy", logits, upstream)
        return once, None, None, None, None, None


class Distillation(Function):
    """KL(teacher || student) per token at temperature T, not yet times T^2.

    Inputs: student, teacher [..., V] float; keep_T [T] bool; temperature; chunk_size rows (0 = chosen);
    group over which the vocabulary is sharded, or None; name of the set of kernels.
    Output: kl_T [T] in the dtype of the arithmetic, 0 where keep is False.
    """

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, keep_T: Tensor, temperature: float, chunk_size: int, group: Any, kernel: str
    ) -> tuple[Tensor, ...]:
        with _no_autocast(student):
            parts = kernels.find(kernel).distillation_stats(student, teacher, keep_T, 1.0 / temperature, chunk_size)
            state = row_stats.KDRowState(*parts)
            if group is not None:
                state = distributed.fold(state, row_stats.combine_kd, group)
            kl_T = row_stats.finish_kd(torch, state).masked_fill(~keep_T, 0.0)
            return (kl_T, *state)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        student, teacher, keep_T, ctx.temperature, ctx.chunk_size, _, ctx.kernel = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, teacher, keep_T, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        student, teacher, keep_T, kl_T, *state = ctx.saved_tensors
        upstream_T = grads[0]
        with torch.no_grad(), _no_autocast(student):
            coef_T = upstream_T.to(kl_T.dtype) / ctx.temperature
            args = (student, teacher, keep_T, 1.0 / ctx.temperature, ctx.chunk_size, state, kl_T, coef_T)
            distillation_grad = kernels.find(ctx.kernel).distillation_grad
            found = [distillation_grad(*args, of) if ctx.needs_input_grad[of] else None for of in (False, True)]
        instead = "torch.nn.functional.kl_div"
        found = [_once(grad, "KDLoss", instead, student, teacher, upstream_T) for grad in found]
        return (*found, None, None, None, None, None)


class DistillationSum(Function):
    """sum over tokens of coef * KL(teacher || student), with the student's gradient made in the forward.

    As CrossEntropySum, for sets of kernels that have `distillation_with_grad`. The teacher's gradient, where it is
    wanted, is made in the backward.

    Inputs: student, teacher [..., V] float; keep_T [T] bool; coef_T [T], not differentiated; temperature;
    chunk_size rows (0 = chosen); name of the set of kernels.
    Output: scalar in the dtype of the arithmetic.
    """

    @staticmethod
    def forward(
        student: Tensor,
        teacher: Tensor,
        keep_T: Tensor,
        coef_T: Tensor,
        temperature: float,
        chunk_size: int,
        kernel: str,
    ) -> tuple[Tensor, ...]:
        with _no_autocast(student):
            parts, grad = kernels.find(kernel).distillation_with_grad(
                student, teacher, keep_T, 1.0 / temperature, chunk_size, coef_T / temperature
            )
            kl_T = row_stats.finish_kd(torch, row_stats.KDRowState(*parts)).masked_fill(~keep_T, 0.0)
            return (_weighted_sum(coef_T, kl_T), grad, kl_T, *parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        student, teacher, keep_T, coef_T, ctx.temperature, ctx.chunk_size, ctx.kernel = inputs
        _, ctx.buffer, kl_T, *state = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, teacher, keep_T, coef_T, kl_T, *state)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        upstream = grads[0]
        student, teacher, keep_T, coef_T, kl_T, *state = ctx.saved_tensors
        set_of_kernels = kernels.find(ctx.kernel)
        with torch.no_grad(), _no_autocast(student):
            coef_T = coef_T / ctx.temperature
            args = (student, teacher, keep_T, 1.0 / ctx.temperature, ctx.chunk_size, state, kl_T)
            # Handed over, not copied: autograd may then keep the buffer as the .grad itself.
            grad, ctx.buffer = ctx.buffer, None
            if grad is None:
                grad = set_of_kernels.distillation_grad(*args, coef_T * upstream, False)
            else:
                grad = set_of_kernels.distillation_scale_grad(grad, *args, coef_T, upstream)
            found = [grad, None]
            if ctx.needs_input_grad[1]:
                found[1] = set_of_kernels.distillation_grad(*args, coef_T * upstream, True)
        found = [_once(x, "KDLoss", "torch.nn.functional.kl_div", student, teacher, upstream) for x in found]
        return (*found, None, None, None, None, None)


class LinearCrossEntropySum(Function):
    """sum over tokens of coef * cross entropy of softcap(h @ W.T), with both gradients made in the forward.

    The gradients wait in float32 for the upstream factor, so that they are rounded once. The first
    backward takes these buffers; a second one (retain_graph) computes them again.

    Inputs: h_TH, w_VH float; labels_T [T] int64; keep_T [T] bool; coef_T [T]; softcap; product dtype; which
    gradients are wanted; name of the set of kernels; skip_ignored and num_valid of
    `eager_linear.tokens_in_products`.
    Output: scalar in the dtype of the arithmetic.
    """

    @staticmethod
    def forward(
        h_TH: Tensor,
        w_VH: Tensor,
        labels_T: Tensor,
        keep_T: Tensor,
        coef_T: Tensor,
        softcap: float,
        product_dtype: torch.dtype,
        want: tuple[bool, bool],
        kernel: str,
        skip_ignored: bool | None,
        num_valid: int | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with _no_autocast(h_TH):
            loss_T, grad_h, grad_w = kernels.find(kernel).linear_cross_entropy(
                h_TH, w_VH, labels_T, keep_T, coef_T, softcap, product_dtype, list(want), skip_ignored, num_valid
            )
            return _weighted_sum(coef_T, loss_T), loss_T, grad_h, grad_w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        h_TH, w_VH, labels_T, keep_T, coef_T, ctx.softcap, ctx.product_dtype, ctx.want, ctx.kernel, *ctx.skip = inputs
        _, loss_T, grad_h, grad_w = output
        ctx.mark_non_differentiable(loss_T, grad_h, grad_w)
        # Else autograd makes zeros of the weight's size for the outputs that have no gradient.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h_TH, w_VH, labels_T, keep_T, coef_T, loss_T)
        ctx.buffers = (grad_h, grad_w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        upstream = grads[0]
        h_TH, w_VH, labels_T, keep_T, coef_T, loss_T = ctx.saved_tensors
        with torch.no_grad(), _no_autocast(h_TH):
            if torch.compiler.is_compiling():
                grad_h, grad_w = (buffer * upstream for buffer in ctx.buffers)
            else:
                if ctx.buffers is None:
                    ctx.buffers = kernels.find(ctx.kernel).linear_cross_entropy(
                        h_TH, w_VH, labels_T, keep_T, coef_T, ctx.softcap, ctx.product_dtype, list(ctx.want), *ctx.skip
                    )[1:]
                # Handed over, not copied: autograd may then keep the buffer as the .grad itself.
                (grad_h, grad_w), ctx.buffers = ctx.buffers, None
                if not (values.may_read(upstream) and float(upstream) == 1.0):
                    grad_h, grad_w = grad_h.mul_(upstream), grad_w.mul_(upstream)
            want_h, want_w = ctx.want
            grad_h = grad_h.to(h_TH.dtype) if want_h else None
            grad_w = grad_w.to(w_VH.dtype) if want_w else None
            grad_coef = (loss_T * upstream).to(coef_T.dtype) if ctx.needs_input_grad[4] else None
        grad_h, grad_w, grad_coef = _refused((grad_h, grad_w, grad_coef), h_TH, w_VH, coef_T, upstream)
        return (
            grad_h,
            grad_w,
            None,
            None,
            grad_coef,
            None,
            None,
            None,
            None,
            None,
            None,
        )


class LinearCrossEntropy(Function):
    """Cross entropy of softcap(h @ W.T) per token; the backward computes the logits again.

    For reduction="none", where the upstream gradient of each token is not known before. Inputs as in
    LinearCrossEntropySum, without coef. Output: loss_T.
    """

    @staticmethod
    def forward(
        h_TH: Tensor,
        w_VH: Tensor,
        labels_T: Tensor,
        keep_T: Tensor,
        softcap: float,
        product_dtype: torch.dtype,
        kernel: str,
        skip_ignored: bool | None,
        num_valid: int | None,
    ) -> Tensor:
        with _no_autocast(h_TH):
            unused_T = torch.ones_like(keep_T, dtype=compute_dtype(h_TH.dtype))
            args = (h_TH, w_VH, labels_T, keep_T, unused_T, softcap, product_dtype, [False, False])
            return kernels.find(kernel).linear_cross_entropy(*args, skip_ignored, num_valid)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        h_TH, w_VH, labels_T, keep_T, ctx.softcap, ctx.product_dtype, ctx.kernel, *ctx.skip = inputs
        ctx.save_for_backward(h_TH, w_VH, labels_T, keep_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        upstream_T = grads[0]
        h_TH, w_VH, labels_T, keep_T = ctx.saved_tensors
        want_h, want_w = ctx.needs_input_grad[:2]
        with torch.no_grad(), _no_autocast(h_TH):
            coef_T = upstream_T.to(compute_dtype(h_TH.dtype))
            args = (h_TH, w_VH, labels_T, keep_T, coef_T, ctx.softcap, ctx.product_dtype, [want_h, want_w])
            _, grad_h, grad_w = kernels.find(ctx.kernel).linear_cross_entropy(*args, *ctx.skip)
            found = (grad_h.to(h_TH.dtype) if want_h else None, grad_w.to(w_VH.dtype) if want_w else None)
        return (*_refused(found, h_TH, w_VH, upstream_T), None, None, None, None, None, None, None)


def cross_entropy_values(logits: Tensor, labels_T: Tensor, kernel: str) -> Tensor:
    """What `CrossEntropy` gives where every token counts and no gradient is wanted, with fewer operations around it."""
    with _no_autocast(logits):
        state = row_stats.RowState(*kernels.find(kernel).cross_entropy_stats(logits, labels_T, 0))
        return row_stats.finish(torch, state)


def _refused(grads: tuple[Tensor | None, ...], *sources: Tensor) -> tuple[Tensor | None, ...]:
    instead = "F.cross_entropy(F.linear(hidden_states, lm_weight), labels)"
    return tuple(_once(grad, "FusedLinearCrossEntropy", instead, *sources) for grad in grads)


def _weighted_sum(coef_T: Tensor, loss_T: Tensor) -> Tensor:
    """Sum of coef * loss; a coefficient of 0 takes a token out, even one whose loss is infinite."""
    if values.may_read(loss_T) and math.isfinite(total := (coef_T * loss_T).sum()):
        return total
    return torch.where(coef_T == 0, 0.0, coef_T * loss_T).sum()


def _no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """The kernels choose their own dtypes; autocast must not change them from outside."""
    if like.device.type == "meta" or (values.may_read(like) and not torch.is_autocast_enabled("cpu")):
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)


def run(function: type[Function], *args: Any) -> Any:
    """function.apply(*args), for a call outside of traces and of torch.func.

    There Function.apply does nothing but bind the arguments to the signature of `forward`, which takes as long as a
    small loss.
    """
    return super(Function, function).apply(*args)  # type: ignore[misc]
