"""Pairs of rows of the Triton kernels against float64, in Triton's interpreter."""

import pytest
import torch

from loss_core.row_terms import kl_divergence
from loss_core_torch.kernels import PairCoefficients, Pairs
from on_torch.kernels.gpu.sets import SETS, V, counted, layouts

pytestmark = pytest.mark.parametrize("flag", ["torch:triton"])
each_set = pytest.mark.parametrize("name", SETS)


def _expected(pairs, coef_T):
    """KL, and the gradients of the sum of coef * KL by student and teacher times the temperature, in float64."""
    rows = [x.reshape(-1, x.shape[-1]).double() * pairs.inverse_temperature for x in (pairs.student, pairs.teacher)]
    keep_T = torch.ones(len(rows[0]), dtype=torch.bool) if pairs.keep_T is None else pairs.keep_T
    z_s, z_t = (torch.where(keep_T[:, None], x, 0.0).requires_grad_() for x in rows)
    log_t = z_t.log_softmax(-1)
    kl_T = torch.where(keep_T, (log_t.exp() * (log_t - z_s.log_softmax(-1))).sum(-1), 0.0)
    return kl_T.detach(), *(
        x.view(pairs.student.shape) for x in torch.autograd.grad(kl_T @ coef_T.double(), (z_s, z_t))
    )


def _holds(kernels, pairs, rtol=1e-5):
    coef_T = torch.randn(pairs.student.shape[:-1].numel(), dtype=torch.float32)
    if pairs.student.dtype == torch.float64:
        coef_T = coef_T.double()
    kl_T, by_student, by_teacher = _expected(pairs, coef_T)
    at_once, made = kernels.pair_terms_and_grad(pairs, coef_T)
    terms = kernels.pair_terms(pairs)
    keep_T = slice(None) if pairs.keep_T is None else pairs.keep_T
    for found in (terms, at_once):
        kl = kl_divergence(torch, found)
        torch.testing.assert_close(kl[keep_T].double(), kl_T[keep_T], rtol=rtol, atol=1e-5)
    gradients = [
        kernels.pair_grad(pairs, terms, PairCoefficients(kl, coef_T, of_teacher)) for of_teacher in (False, True)
    ]
    for got, expected in zip((made, *gradients), (by_student, by_student, by_teacher), strict=True):
        assert got.dtype == pairs.student.dtype
        step = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got.double(), expected, rtol=max(step, 1e-4 if step > 1e-10 else 1e-10), atol=2e-6)


def _mixture_holds(kernels, pairs, beta):
    """Sums against the mixture and both gradients are those of float64."""
    rows = [x.reshape(-1, x.shape[-1]).double() * pairs.inverse_temperature for x in (pairs.student, pairs.teacher)]
    keep_T = torch.ones(len(rows[0]), dtype=torch.bool) if pairs.keep_T is None else pairs.keep_T
    z_s, z_t = (torch.where(keep_T[:, None], x, 0.0).requires_grad_() for x in rows)
    p_s, p_t = z_s.softmax(-1), z_t.softmax(-1)
    log_m = (beta * p_t + (1 - beta) * p_s).log()
    kl_t, kl_s = ((torch.xlogy(p, p) - p * log_m).sum(-1) for p in (p_t, p_s))
    terms = kernels.pair_terms(pairs)
    found = kernels.pair_mixture(pairs, terms, beta)
    for got, wanted in zip(found, (kl_t, kl_s), strict=True):
        torch.testing.assert_close(got[keep_T].double(), wanted[keep_T], rtol=1e-5, atol=1e-6)
    coef_T = torch.randn(len(keep_T), dtype=terms.s_t.dtype)
    loss = (torch.where(keep_T, beta * kl_t + (1 - beta) * kl_s, 0.0) * coef_T.double()).sum()
    for of_teacher, share, z in ((False, 1 - beta, z_s), (True, beta, z_t)):
        wanted = PairCoefficients(found[not of_teacher], coef_T * share, of_teacher, beta)
        got = kernels.pair_grad(pairs, terms, wanted)
        (expected,) = torch.autograd.grad(loss, z, retain_graph=True)
        step = torch.finfo(got.dtype).eps
        rtol = max(step, 1e-4 if step > 1e-10 else 1e-10)
        torch.testing.assert_close(got.double(), expected.view(got.shape), rtol=rtol, atol=2e-6)


@each_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_sums_and_gradients_against_a_mixture(flag, name, dtype):
    student, teacher = ((torch.randn(5, V) * 2).to(dtype) for _ in range(2))
    for keep_T, beta in ((None, 0.5), (torch.arange(5) != 2, 0.1)):
        _mixture_holds(SETS[name], Pairs(student, teacher, keep_T, 0.7), beta)


@each_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_terms_and_gradients(flag, name, dtype):
    student, teacher = ((torch.randn(5, V) * 2).to(dtype) for _ in range(2))
    for keep_T in (None, torch.arange(5) != 2):
        _holds(SETS[name], Pairs(student, teacher, keep_T, 0.7))


@pytest.mark.parametrize("layout", [name for name in layouts() if name != "without rows"])
def test_any_layout_is_one_launch(flag, layout):
    student = layouts()[layout]
    teacher = torch.randn(student.shape)
    keep_T = torch.arange(student.shape[:-1].numel()) % 3 != 1
    for name in ("tiny-blocks", "shared-rows"):
        _holds(SETS[name], Pairs(student, teacher, keep_T, 0.5))
    kernels, launched = counted()
    kernels.pair_terms(Pairs(student, teacher, keep_T, 0.5))
    assert launched == ["pair_terms_kernel"]


# Layouts that differ for a kernel: leading dimensions that do not merge, strided columns, expanded columns.
@pytest.mark.parametrize("layout", ["two slices and every other column", "transposed", "expanded columns"])
def test_a_mixture_of_any_layout(flag, layout):
    student = layouts()[layout]
    keep_T = torch.arange(student.shape[:-1].numel()) % 3 != 1
    _mixture_holds(SETS["tiny-blocks"], Pairs(student, torch.randn(student.shape), keep_T, 0.5), 0.3)


@each_set
def test_ignored_pairs_of_nan_and_inf(flag, name):
    student, teacher = torch.randn(4, V), torch.randn(4, V)
    student[1], teacher[2] = torch.nan, torch.inf
    pairs = Pairs(student, teacher, torch.tensor([True, False, False, True]), 1.0)
    coef_T = torch.tensor([1.0, torch.inf, torch.nan, 2.0])
    terms, made = SETS[name].pair_terms_and_grad(pairs, coef_T)
    kl_T = kl_divergence(torch, terms)
    for grad in (
        made,
        *(
            SETS[name].pair_grad(pairs, terms, PairCoefficients(kl_T, coef_T, of_teacher))
            for of_teacher in (False, True)
        ),
    ):
        assert not grad[1:3].any()
        assert grad.isfinite().all()


def test_classes_of_teacher_probability_0(flag):
    student, teacher = torch.randn(3, V), torch.randn(3, V)
    teacher[:, ::2] = -torch.inf
    student[:, ::2] = torch.tensor([torch.finfo(torch.float32).min, -torch.inf, 5.0])[:, None]
    terms = SETS["tiny-blocks"].pair_terms(Pairs(student, teacher, None, 1.0))
    kl_T = kl_divergence(torch, terms)
    log_t, log_s = (x[:, 1::2].double().log_softmax(-1) for x in (teacher, student))
    torch.testing.assert_close(kl_T[:2].double(), (log_t.exp() * (log_t - log_s)).sum(-1)[:2], rtol=1e-5, atol=1e-5)
    assert kl_T.isfinite().all()


def test_the_lowest_finite_student_logit_gives_the_loss_of_plain_float32(flag):
    student, teacher = torch.randn(2, V), torch.randn(2, V)
    student[:, 3] = torch.finfo(torch.float32).min
    pairs = Pairs(student, teacher, None, 1.0)
    terms = SETS["own-sizes"].pair_terms(pairs)
    kl_T = kl_divergence(torch, terms)
    plain_T = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(kl_T, plain_T, rtol=1e-5, atol=0)
    assert SETS["own-sizes"].pair_grad(pairs, terms, PairCoefficients(kl_T, torch.ones(2), True)).isfinite().all()


@each_set
def test_a_factor_of_all_coefficients(flag, name):
    """With a factor of 1, `out` is not written."""
    pairs, coef_T = Pairs(torch.randn(3, V), torch.randn(3, V), None, 1.0), torch.randn(3)
    terms, made = SETS[name].pair_terms_and_grad(pairs, coef_T)
    wanted = PairCoefficients(kl_divergence(torch, terms), coef_T, False)
    for factor, written in ((1.0, False), (0.5, True)):
        out, scalar = torch.full((3, V), 7.0), torch.tensor(factor)
        assert SETS[name].pair_grad(pairs, terms, wanted._replace(factor=scalar), out) is out
        assert bool((out != 7.0).all()) == written
        for got in (SETS[name].pair_grad(pairs, terms, wanted._replace(factor=scalar)), *([out] if written else [])):
            torch.testing.assert_close(got, made * factor, rtol=1e-6, atol=1e-6)


def test_no_vocabulary_is_an_empty_piece(flag):
    kernels, launched = counted()
    pairs = Pairs(torch.randn(2, 3, 0), torch.randn(2, 3, 0), None, 1.0)
    low_T, none_T = torch.full((6,), -torch.inf), torch.zeros(6)
    torch.testing.assert_close(tuple(kernels.pair_terms(pairs)), (low_T, none_T, none_T, low_T, none_T))
    assert kernels.pair_terms_and_grad(pairs, none_T)[1].shape == pairs.student.shape
    torch.testing.assert_close(tuple(kernels.pair_mixture(pairs, kernels.pair_terms(pairs), 0.5)), (none_T, none_T))
    assert not launched
