"""The methods of a `KernelSet`, called as they are, or as custom operators where a call is traced.

torch.compile, make_fx and fake tensors then see one operator in place of loops over blocks, whose number may depend on
the data. Tuples are flattened here and nowhere else. Each call records which kernels ran.
"""

# T = tokens (rows), V = vocabulary (of this rank), H = hidden

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from loss_core.dispatch.observed import record
from loss_core.row_terms import Coefficients, Objective, PairTerms, RowTerms
from loss_core_torch import compat
from loss_core_torch.kernels import KernelSet, Linear, Pairs, Rows, find
from loss_core_torch.second_derivative import SECOND_DERIVATIVE
from loss_core_torch.tracing import compute_dtype, is_traced, no_autocast

_OPS: Any = torch.ops.loss_core


def row_terms(kernels: KernelSet, rows: Rows, objective: Objective) -> RowTerms:
    """See `KernelSet.row_terms`."""
    if is_traced(rows.logits, rows.labels_T):
        return RowTerms(*_OPS.row_terms(_name(kernels), *rows, *_flat(objective)))
    return _run(kernels, "row_terms", rows.logits, rows, objective)


def row_grad(
    kernels: KernelSet,
    rows: Rows,
    terms: RowTerms,
    coefficients: Coefficients,
    out: Tensor | None = None,
    unless_one: Tensor | None = None,
) -> Tensor:
    """See `KernelSet.row_grad`."""
    if is_traced(rows.logits, rows.labels_T):
        found: Tensor = _OPS.row_grad(_name(kernels), *rows, *terms[:3], *coefficients)
        return found
    return _run(kernels, "row_grad", rows.logits, rows, terms, coefficients, out, unless_one)


def row_terms_and_grad(kernels: KernelSet, rows: Rows, coef_T: Tensor, objective: Objective) -> tuple[RowTerms, Tensor]:
    """See `KernelSet.row_terms_and_grad`; not for traced calls, which can't hand a gradient on."""
    return _run(kernels, "row_terms_and_grad", rows.logits, rows, coef_T, objective)


def pair_terms(kernels: KernelSet, pairs: Pairs) -> PairTerms:
    """See `KernelSet.pair_terms`."""
    if is_traced(pairs.student, pairs.teacher):
        return PairTerms(*_OPS.pair_terms(_name(kernels), *pairs))
    return _run(kernels, "pair_terms", pairs.student, pairs)


def pair_grad(
    kernels: KernelSet,
    pairs: Pairs,
    terms: PairTerms,
    kl_T: Tensor,
    coef_T: Tensor,
    of_teacher: bool,
    out: Tensor | None = None,
    unless_one: Tensor | None = None,
) -> Tensor:
    """See `KernelSet.pair_grad`."""
    if is_traced(pairs.student, pairs.teacher):
        found: Tensor = _OPS.pair_grad(_name(kernels), *pairs, *terms, kl_T, coef_T, of_teacher)
        return found
    return _run(kernels, "pair_grad", pairs.student, pairs, terms, kl_T, coef_T, of_teacher, out, unless_one)


def pair_terms_and_grad(kernels: KernelSet, pairs: Pairs, coef_T: Tensor) -> tuple[PairTerms, Tensor]:
    """See `KernelSet.pair_terms_and_grad`; not for traced calls."""
    return _run(kernels, "pair_terms_and_grad", pairs.student, pairs, coef_T)


def linear_terms(
    kernels: KernelSet, linear: Linear, objective: Objective, keep_logits: bool
) -> tuple[RowTerms, Tensor]:
    """See `KernelSet.linear_terms`. Where a call is traced, no logits are kept."""
    if is_traced(linear.h_TH, linear.w_VH):
        terms = RowTerms(*_OPS.linear_terms(_name(kernels), *linear, *_flat(objective)))
        return terms, terms.m.new_empty(0)
    return _run(kernels, "linear_terms", linear.h_TH, linear, objective, keep_logits)


def linear_grads(
    kernels: KernelSet,
    linear: Linear,
    terms: RowTerms,
    upstream_T: Tensor,
    objective: Objective,
    want: tuple[bool, bool],
    logits: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `KernelSet.linear_grads`."""
    if is_traced(linear.h_TH, linear.w_VH):
        found = _OPS.linear_grads(_name(kernels), *linear, list(_present(terms)), upstream_T, *_flat(objective), *want)
        return found[0], found[1]
    return _run(kernels, "linear_grads", linear.h_TH, linear, terms, upstream_T, objective, want, logits)


def linear_terms_and_grads(
    kernels: KernelSet, linear: Linear, coef_T: Tensor, objective: Objective, want: tuple[bool, bool]
) -> tuple[RowTerms, Tensor, Tensor]:
    """See `KernelSet.linear_terms_and_grads`."""
    if is_traced(linear.h_TH, linear.w_VH):
        *terms, grad_h, grad_w = _OPS.linear_terms_and_grads(_name(kernels), *linear, coef_T, *_flat(objective), *want)
        return RowTerms(*terms), grad_h, grad_w
    return _run(kernels, "linear_terms_and_grads", linear.h_TH, linear, coef_T, objective, want)


def _run(kernels: KernelSet, method: str, like: Tensor, *args: Any) -> Any:
    """A method of the set, which is recorded as the one that ran, whatever autocast and precision switches say."""
    record(kernels.flag)
    function = getattr(kernels, method)
    exact = compat.full_float32_products() if method.startswith("linear") else nullcontext()
    with exact, no_autocast(like):
        return compat.on_each_rank(function, *args)


def _name(kernels: KernelSet) -> str:
    return kernels.flag.partition(":")[2]


def _named(kernel: str) -> KernelSet:
    return cast(KernelSet, find(kernel))


def _flat(objective: Objective) -> tuple[int, list[float]]:
    return objective.num_classes, [float(option) for option in tuple(objective)[1:]]


def _objective(num_classes: int, options: Sequence[float]) -> Objective:
    return Objective(num_classes, *options)


def _present(terms: RowTerms) -> tuple[Tensor, ...]:
    """The terms that were made."""
    return tuple(term for term in terms if term is not None)


def _operator(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register a function as an operator of its name, whose results have the shapes that `fake` gives."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__.removeprefix("_run_")
        operator: Any = torch.library.custom_op(f"loss_core::{name}", function, mutates_args=())
        operator.register_fake(fake)
        operator.register_autograd(_refuse)
        return function

    return register


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(SECOND_DERIVATIVE)


def _new_terms(like: Tensor, number: Tensor, count: int) -> list[Tensor]:
    """`count` terms, one for each element of `number`."""
    dtype = compute_dtype(like.dtype)
    return [torch.empty_like(number, dtype=dtype) for _ in range(count)]


def _num_terms(num_classes: int, options: Sequence[float]) -> int:
    return 3 + _objective(num_classes, options).needs_z_sum


def _fake_row_terms(
    kernel: str,
    logits: Tensor,
    labels_T: Tensor,
    keep_T: Tensor | None,
    vocab_start: int,
    num_classes: int,
    options: Sequence[float],
) -> list[Tensor]:
    return _new_terms(logits, labels_T, _num_terms(num_classes, options))


@_operator(_fake_row_terms)
def _run_row_terms(
    kernel: str,
    logits: Tensor,
    labels_T: Tensor,
    keep_T: Tensor | None,
    vocab_start: int,
    num_classes: int,
    options: Sequence[float],
) -> list[Tensor]:
    rows = Rows(logits, labels_T, keep_T, vocab_start)
    return list(_present(_run(_named(kernel), "row_terms", logits, rows, _objective(num_classes, options))))


def _fake_row_grad(kernel: str, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@_operator(_fake_row_grad)
def _run_row_grad(
    kernel: str,
    logits: Tensor,
    labels_T: Tensor,
    keep_T: Tensor | None,
    vocab_start: int,
    m_T: Tensor,
    s_T: Tensor,
    t_T: Tensor,
    scale_T: Tensor,
    target_T: Tensor,
    uniform_T: Tensor | None,
) -> Tensor:
    rows = Rows(logits, labels_T, keep_T, vocab_start)
    return _run(
        _named(kernel), "row_grad", logits, rows, RowTerms(m_T, s_T, t_T), Coefficients(scale_T, target_T, uniform_T)
    )


def _fake_pair_terms(kernel: str, student: Tensor, *rest: Any) -> list[Tensor]:
    return _new_terms(student, student[..., 0].reshape(-1) if student.shape[-1] else student.sum(-1).reshape(-1), 5)


@_operator(_fake_pair_terms)
def _run_pair_terms(
    kernel: str,
    student: Tensor,
    teacher: Tensor,
    keep_T: Tensor | None,
    inverse_temperature: float,
    chunk_size: int,
) -> list[Tensor]:
    return list(
        _run(_named(kernel), "pair_terms", student, Pairs(student, teacher, keep_T, inverse_temperature, chunk_size))
    )


def _fake_pair_grad(kernel: str, student: Tensor, teacher: Tensor, *rest: Any) -> Tensor:
    like = teacher if rest[-1] else student
    return like.new_empty(like.shape)


@_operator(_fake_pair_grad)
def _run_pair_grad(
    kernel: str,
    student: Tensor,
    teacher: Tensor,
    keep_T: Tensor | None,
    inverse_temperature: float,
    chunk_size: int,
    m_t_T: Tensor,
    s_t_T: Tensor,
    a_T: Tensor,
    m_s_T: Tensor,
    s_s_T: Tensor,
    kl_T: Tensor,
    coef_T: Tensor,
    of_teacher: bool,
) -> Tensor:
    pairs = Pairs(student, teacher, keep_T, inverse_temperature, chunk_size)
    return _run(
        _named(kernel),
        "pair_grad",
        student,
        pairs,
        PairTerms(m_t_T, s_t_T, a_T, m_s_T, s_s_T),
        kl_T,
        coef_T,
        of_teacher,
    )


def _fake_linear_terms(
    kernel: str,
    h_TH: Tensor,
    w_VH: Tensor,
    labels_T: Tensor,
    vocab_start: int,
    softcap: float,
    product_dtype: torch.dtype,
    num_classes: int,
    options: Sequence[float],
) -> list[Tensor]:
    return _new_terms(h_TH, labels_T, _num_terms(num_classes, options))


@_operator(_fake_linear_terms)
def _run_linear_terms(
    kernel: str,
    h_TH: Tensor,
    w_VH: Tensor,
    labels_T: Tensor,
    vocab_start: int,
    softcap: float,
    product_dtype: torch.dtype,
    num_classes: int,
    options: Sequence[float],
) -> list[Tensor]:
    linear = Linear(h_TH, w_VH, labels_T, vocab_start, softcap, product_dtype)
    return list(
        _present(_run(_named(kernel), "linear_terms", h_TH, linear, _objective(num_classes, options), False)[0])
    )


def _new_grads(h_TH: Tensor, w_VH: Tensor, want_h: bool, want_w: bool) -> list[Tensor]:
    dtype = compute_dtype(h_TH.dtype)
    wanted = ((h_TH, want_h), (w_VH, want_w))
    return [x.new_empty(x.shape if want else (0,), dtype=dtype) for x, want in wanted]


def _fake_linear_grads(kernel: str, h_TH: Tensor, w_VH: Tensor, *rest: Any) -> list[Tensor]:
    return _new_grads(h_TH, w_VH, *rest[-2:])


@_operator(_fake_linear_grads)
def _run_linear_grads(
    kernel: str,
    h_TH: Tensor,
    w_VH: Tensor,
    labels_T: Tensor,
    vocab_start: int,
    softcap: float,
    product_dtype: torch.dtype,
    terms: list[Tensor],
    upstream_T: Tensor,
    num_classes: int,
    options: Sequence[float],
    want_h: bool,
    want_w: bool,
) -> list[Tensor]:
    linear = Linear(h_TH, w_VH, labels_T, vocab_start, softcap, product_dtype)
    objective, logits = _objective(num_classes, options), terms[0].new_empty(0)
    found = _run(
        _named(kernel), "linear_grads", h_TH, linear, RowTerms(*terms), upstream_T, objective, (want_h, want_w), logits
    )
    return list(found)


def _fake_linear_terms_and_grads(
    kernel: str,
    h_TH: Tensor,
    w_VH: Tensor,
    labels_T: Tensor,
    vocab_start: int,
    softcap: float,
    product_dtype: torch.dtype,
    coef_T: Tensor,
    num_classes: int,
    options: Sequence[float],
    want_h: bool,
    want_w: bool,
) -> list[Tensor]:
    terms = _new_terms(h_TH, labels_T, _num_terms(num_classes, options))
    return [*terms, *_new_grads(h_TH, w_VH, want_h, want_w)]


@_operator(_fake_linear_terms_and_grads)
def _run_linear_terms_and_grads(
    kernel: str,
    h_TH: Tensor,
    w_VH: Tensor,
    labels_T: Tensor,
    vocab_start: int,
    softcap: float,
    product_dtype: torch.dtype,
    coef_T: Tensor,
    num_classes: int,
    options: Sequence[float],
    want_h: bool,
    want_w: bool,
) -> list[Tensor]:
    linear = Linear(h_TH, w_VH, labels_T, vocab_start, softcap, product_dtype)
    terms, *grads = _run(
        _named(kernel),
        "linear_terms_and_grads",
        h_TH,
        linear,
        coef_T,
        _objective(num_classes, options),
        (want_h, want_w),
    )
    return [*_present(terms), *grads]


def _product_flops(h_shape: Sequence[int], w_shape: Sequence[int], products: int) -> int:
    return 2 * h_shape[0] * h_shape[1] * w_shape[0] * products


@register_flop_formula(_OPS.linear_terms)
def _linear_terms_flops(kernel: str, h_shape: Any, w_shape: Any, *rest: Any, **kwargs: Any) -> int:
    return _product_flops(h_shape, w_shape, 1)


@register_flop_formula(_OPS.linear_grads)
def _linear_grads_flops(kernel: str, h_shape: Any, w_shape: Any, *rest: Any, **kwargs: Any) -> int:
    return _product_flops(h_shape, w_shape, 1 + sum(rest[-2:]))


@register_flop_formula(_OPS.linear_terms_and_grads)
def _linear_terms_and_grads_flops(kernel: str, h_shape: Any, w_shape: Any, *rest: Any, **kwargs: Any) -> int:
    return _product_flops(h_shape, w_shape, 1 + sum(rest[-2:]))
