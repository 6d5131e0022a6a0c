"""The methods of a `KernelSet`, called directly, or as custom operators where a call is traced.

torch.compile, make_fx and fake tensors then record one operator instead of loops over blocks, whose count may depend
on the data. NamedTuples are flattened only here. Each call records which kernels ran.
"""

# T = tokens (rows), V = vocabulary (of this rank), H = hidden

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from loss_core.dispatch.observed import record
from loss_core.row_terms import EMPTY_ROW, Coefficients, CrossEntropy, Objective, RowTerms, Sums
from loss_core.row_terms.pairs import MixtureTerms, PairTerms
from loss_core_torch import compat, precision
from loss_core_torch.kernels import (
    BothGrads,
    BothWanted,
    HeadOperands,
    KernelSet,
    Linear,
    LinearGrads,
    LinearPairs,
    PairCoefficients,
    Pairs,
    Rows,
    Wanted,
    find,
    linear_pairs,
    linear_rows,
)
from loss_core_torch.kernels.terms import filled_terms
from loss_core_torch.second_derivative import SECOND_DERIVATIVE
from loss_core_torch.tracing import compute_dtype, is_traced, no_autocast

# Types in an operator's schema. Terms and coefficients are annotated as Any, arrays of any library; some may be None.
_SCHEMA = {
    Tensor: "Tensor", Tensor | None: "Tensor?", Any: "Tensor?", Any | None: "Tensor?", int: "SymInt", float: "float",
    bool: "bool", torch.dtype: "ScalarType",
}  # fmt: skip


_NONE = Wanted(False, False)


class _Method:
    """A method of kernel sets and its custom operator. Called with a kernel set and the method's arguments.

    `out`, memory for the result, is used by direct calls only.

    Args:
        name: of the method and of the operator.
        fake: returns the results of the operator, without values, from the method's arguments.
        result: returns the method's result from the list of the operator's results and the method's arguments.
        function: called with the kernel set and the method's arguments, for methods that kernel sets do not have.
        products: returns the number of matrix products with each head from the method's arguments after the first;
            None: there are none.
        arguments: types of the method's arguments, by name.
    """

    def __init__(
        self,
        name: str,
        fake: Callable[..., list[Tensor]],
        result: Callable[..., Any],
        function: Callable[..., Any] | None = None,
        products: Callable[..., tuple[int, ...]] | None = None,
        **arguments: Any,
    ) -> None:
        self._fake, self._result, self._types = fake, result, tuple(arguments.values())
        self._function = function or (lambda kernels, *args: getattr(kernels, name)(*args))
        schema = ", ".join(f"{kind} {argument}" for argument, kind in _schema(arguments))
        operator: Any = torch.library.custom_op(
            f"loss_core::{name}", self._operate, mutates_args=(), schema=f"(str kernel, {schema}) -> Tensor[]"
        )
        operator.register_fake(lambda kernel, *flat: self._fake(*_nested(self._types, iter(flat))))
        operator.register_autograd(_refuse)
        if products is not None:
            register_flop_formula(getattr(torch.ops.loss_core, name))(partial(self._flops, products))
        self._operator = operator

    def __call__(self, kernels: KernelSet, *args: Any, out: Tensor | None = None) -> Any:
        if is_traced(*islice(_flat(args), 2)):
            return self._result(self._operator(kernels.flag.partition(":")[2], *_flat(args)), *args)
        return self._run(kernels, *args, *([] if out is None else [out]))

    def _run(self, kernels: KernelSet, *args: Any) -> Any:
        return _run(kernels, partial(self._function, kernels), *args)

    def _operate(self, kernel: str, *flat: Any) -> list[Tensor]:
        found = self._run(find(kernel), *_nested(self._types, iter(flat)))  # type: ignore[arg-type]
        return [x for x in _flat([found]) if x is not None]

    def _flops(self, products: Callable[..., tuple[int, ...]], kernel: str, *flat: Any, **kwargs: Any) -> int:
        """For PyTorch's FLOP counter, which passes shapes instead of tensors."""
        source, *args = _nested(self._types, iter(flat))
        heads = zip(source.heads, products(*args), strict=True)
        return sum(2 * int(h_TH[0] * h_TH[1] * w_VH[0]) * count for (h_TH, w_VH, *_), count in heads)


def _run(kernels: KernelSet, method: Callable[..., Any], *args: Any) -> Any:
    """Run a method of a kernel set and record its flag, without autocast and reduced-precision settings."""
    record(kernels.flag)
    exact = precision.full_float32_products() if isinstance(args[0], Linear | LinearPairs) else nullcontext()
    with exact, no_autocast(next(_flat(args))):
        return compat.on_each_rank(method, *args)


def _schema(arguments: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and type of each flattened argument."""
    for name, kind in arguments.items():
        if hasattr(kind, "_fields"):
            yield from _schema({f"{name}_{field}": hint for field, hint in get_type_hints(kind).items()})
        else:
            yield name, _SCHEMA[kind]


def _flat(args: Sequence[Any]) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, tuple):
            yield from _flat(arg)
        else:
            yield arg


def _nested(types: Sequence[Any], flat: Iterator[Any]) -> list[Any]:
    """Values of the types, NamedTuples among them, from their flattened parts."""
    return [
        kind(*_nested(tuple(get_type_hints(kind).values()), flat)) if hasattr(kind, "_fields") else next(flat)
        for kind in types
    ]


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(SECOND_DERIVATIVE)


def _new_terms(like: Tensor, x_T: Tensor, count: int) -> list[Tensor]:
    """`count` uninitialised terms of the shape of x_T, in the dtype of the arithmetic for `like`."""
    return [torch.empty_like(x_T, dtype=compute_dtype(like.dtype)) for _ in range(count)]


def _new_row_terms(rows: Rows | Linear, sums: Sums) -> list[Tensor]:
    dtype = compute_dtype(next(_flat(rows)).dtype)
    return [x for x in filled_terms(EMPTY_ROW, sums, rows.labels_T, dtype) if x is not None]


def _row_terms(found: Sequence[Tensor], sums: Sums) -> RowTerms:
    """Row terms from the results of an operator, which returns only the needed ones."""
    rest = iter(found[3:])
    return RowTerms(*found[:3], *(next(rest) if is_wanted else None for is_wanted in sums))


def _new_pair_terms(pairs: Pairs) -> list[Tensor]:
    student = pairs.student
    return _new_terms(student, (student[..., 0] if student.shape[-1] else student.sum(-1)).reshape(-1), 5)


def _new_grads(head: HeadOperands, want: Wanted) -> LinearGrads:
    h_TH, w_VH, dtype = head.h_TH, head.w_VH, compute_dtype(head.h_TH.dtype)
    wanted = zip((h_TH.shape, w_VH.shape, w_VH.shape[:1]), want, strict=True)
    return LinearGrads(*(h_TH.new_empty(shape if is_wanted else (0,), dtype=dtype) for shape, is_wanted in wanted))


def _new_both_grads(linear: LinearPairs, want: BothWanted) -> list[Tensor]:
    return [*_new_grads(linear.student, want.student), *_new_grads(linear.teacher, want.teacher)]


def _both_grads(found: Sequence[Tensor]) -> BothGrads:
    return BothGrads(LinearGrads(*found[:3]), LinearGrads(*found[3:]))


row_terms = _Method(
    "row_terms", _new_row_terms, lambda found, rows, sums: _row_terms(found, sums), rows=Rows, sums=Sums
)
row_grad = _Method(
    "row_grad",
    lambda rows, *args: [rows.logits.new_empty(rows.logits.shape)],
    lambda found, *args: found[0],
    rows=Rows,
    terms=RowTerms,
    coefficients=Coefficients,
)
pair_terms = _Method("pair_terms", _new_pair_terms, lambda found, *args: PairTerms(*found), pairs=Pairs)
pair_mixture = _Method(
    "pair_mixture",
    lambda pairs, terms, beta: _new_terms(pairs.student, terms.s_t, 2),
    lambda found, *args: MixtureTerms(*found),
    pairs=Pairs,
    terms=PairTerms,
    beta=float,
)
pair_grad = _Method(
    "pair_grad",
    lambda pairs, terms, wanted: [x.new_empty(x.shape) for x in pairs[wanted.of_teacher : wanted.of_teacher + 1]],
    lambda found, *args: found[0],
    pairs=Pairs,
    terms=PairTerms,
    coefficients=PairCoefficients,
)
linear_terms = _Method(
    "linear_terms",
    lambda linear, sums, keep_logits: [*_new_row_terms(linear, sums), _new_grads(linear.head, _NONE).hidden_TH],
    lambda found, linear, sums, keep_logits: (_row_terms(found[:-1], sums), found[-1]),
    linear_rows.terms,
    products=lambda *args: (1,),
    linear=Linear,
    sums=Sums,
    keep_logits=bool,
)
linear_grads = _Method(
    "linear_grads",
    lambda linear, terms, coefficients, want, logits: list(_new_grads(linear.head, want).rounded(linear.head)),
    lambda found, *args: LinearGrads(*found),
    linear_rows.grads,
    products=lambda terms, coefficients, want, logits: (want.products,),
    linear=Linear,
    terms=RowTerms,
    coefficients=Coefficients,
    want=Wanted,
    logits=Tensor,
)
linear_terms_and_grads = _Method(
    "linear_terms_and_grads",
    lambda linear, coef_T, objective, want: [*_new_row_terms(linear, objective.sums), *_new_grads(linear.head, want)],
    lambda found, linear, coef_T, objective, want: (_row_terms(found[:-3], objective.sums), LinearGrads(*found[-3:])),
    linear_rows.terms_and_grads,
    products=lambda coef_T, objective, want: (want.products,),
    linear=Linear,
    coef_T=Tensor,
    objective=CrossEntropy,
    want=Wanted,
)
linear_pair_terms = _Method(
    "linear_pair_terms",
    lambda linear: _new_terms(linear.student.h_TH, linear.student.h_TH[:, 0], 5),
    lambda found, *args: PairTerms(*found),
    linear_pairs.terms,
    products=lambda: (1, 1),
    linear=LinearPairs,
)
linear_pair_mixture = _Method(
    "linear_pair_mixture",
    lambda linear, terms, beta: _new_terms(linear.student.h_TH, terms.s_t, 2),
    lambda found, *args: MixtureTerms(*found),
    linear_pairs.mixture,
    products=lambda *args: (1, 1),
    linear=LinearPairs,
    terms=PairTerms,
    beta=float,
)
linear_pair_grads = _Method(
    "linear_pair_grads",
    lambda linear, terms, of_student, of_teacher, want: _new_both_grads(linear, want),
    lambda found, *args: _both_grads(found),
    linear_pairs.grads,
    products=lambda *args: (args[-1].student.products, args[-1].teacher.products),
    linear=LinearPairs,
    terms=PairTerms,
    of_student=PairCoefficients,
    of_teacher=PairCoefficients,
    want=BothWanted,
)
linear_pair_loss_and_grads = _Method(
    "linear_pair_loss_and_grads",
    lambda linear, coef_T, beta, want: [*_new_terms(linear.student.h_TH, coef_T, 1), *_new_both_grads(linear, want)],
    lambda found, *args: (found[0], _both_grads(found[1:])),
    linear_pairs.loss_and_grads,
    products=lambda *args: (args[-1].student.products, args[-1].teacher.products),
    linear=LinearPairs,
    coef_T=Tensor,
    beta=float,
    want=BothWanted,
)


def row_terms_and_grad(
    kernels: KernelSet, rows: Rows, coef_T: Tensor, objective: Objective
) -> tuple[RowTerms, Tensor, Coefficients]:
    """See `KernelSet`. Not for traced calls: a graph can't pass the gradient on without a copy."""
    found: tuple[RowTerms, Tensor, Coefficients] = _run(kernels, kernels.row_terms_and_grad, rows, coef_T, objective)
    return found


def pair_terms_and_grad(kernels: KernelSet, pairs: Pairs, coef_T: Tensor) -> tuple[PairTerms, Tensor]:
    """See `KernelSet`. Not for traced calls."""
    found: tuple[PairTerms, Tensor] = _run(kernels, kernels.pair_terms_and_grad, pairs, coef_T)
    return found
