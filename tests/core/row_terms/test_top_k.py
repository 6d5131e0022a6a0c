"""Distillation to K targets of a row from row terms, against the definition; over NumPy, torch and JAX."""

import numpy as np
import pytest

from helpers.row_terms import CUTS, dense, draw_logits, log_softmax, namespace, namespaces, split, top_k_terms
from loss_core import row_terms
from loss_core.row_terms import RowTerms, TopK

# T = rows, V = vocabulary, K = targets of a row


def _top_k(num_targets=4, seed=3):
    """Logits, ascending columns [T, K] and log-probabilities of a teacher [T, K]."""
    rng = np.random.default_rng(seed)
    z_TV = draw_logits()[0]
    column_TK = np.sort(rng.permuted(np.tile(np.arange(13), (6, 1)), axis=1)[:, :num_targets], axis=1)
    column_TK[1] = np.arange(7, 13)[:num_targets]  # of the others in row 1, 7 are -inf
    log_p_TV = log_softmax(rng.standard_normal((6, 13)) * 2)
    return z_TV, column_TK, np.take_along_axis(log_p_TV, column_TK, 1)


def _top_k_by_definition(z_TV, column_TK, log_p_TK, tail):
    """Loss per row, and its gradients by z and by log p, by PyTorch's autograd."""
    import torch

    z, log_p = (torch.from_numpy(x).requires_grad_() for x in (z_TV, log_p_TK))
    columns = torch.from_numpy(column_TK)
    log_q, p = z.log_softmax(-1), log_p.exp()
    loss = (p * (log_p - log_q.gather(1, columns))).sum(-1)
    if tail:
        rest, left = log_q.scatter(1, columns, -torch.inf).logsumexp(-1), 1 - p.sum(-1)
        loss = loss + left * (left.log() - rest)
    return (loss.detach().numpy(), *(x.numpy() for x in torch.autograd.grad(loss.sum(), (z, log_p))))


def _fold_present(xp, asarray, pieces):
    total = None
    for terms in pieces:
        terms = RowTerms(*(None if part is None else asarray(part) for part in terms))
        total = terms if total is None else row_terms.combine(xp, total, terms)
    return total


def _or_none(asarray):
    return lambda x: None if x is None else asarray(x)


@namespaces
@CUTS
@pytest.mark.parametrize("tail", [True, False])
def test_top_k_of_any_split_is_that_of_the_definition(name, cuts, tail):
    xp, asarray = namespace(name)
    z_TV, column_TK, log_p_TK = _top_k()
    expected_T, by_z_TV, by_log_p_TK = _top_k_by_definition(z_TV, column_TK, log_p_TK, tail)
    pieces = split(top_k_terms, cuts, z_TV, column_TK)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if name == "jax" else {"rtol": 1e-12, "atol": 1e-12}
    for order in (pieces, pieces[::-1]):
        terms = RowTerms(*(None if x is None else asarray(x) for x in _fold_present(xp, asarray, order)))
        teacher = TopK(asarray(log_p_TK), tail)
        value = np.asarray(teacher.values(xp, terms)[0])
        np.testing.assert_allclose(value, expected_T, **tolerance)
        found = teacher.coefficients(xp, terms, [asarray(np.ones(6))])
        np.testing.assert_allclose(dense(found, z_TV, terms, column_TK), by_z_TV, **tolerance)
        gradient = np.asarray(teacher.teacher_gradient(xp, terms))
        np.testing.assert_allclose(gradient, by_log_p_TK, **tolerance)


@pytest.mark.parametrize("lead", [(2, 3), (6, 1)], ids=str)
@pytest.mark.parametrize("tail", [True, False])
def test_top_k_of_rows_with_any_leading_dimensions(tail, lead):
    z_TV, column_TK, log_p_TK = _top_k()

    def found(shape):
        terms = top_k_terms(z_TV, column_TK)
        terms = RowTerms(terms.m.reshape(shape), terms.s.reshape(shape), terms.t.reshape(*shape, -1))
        teacher, upstream = TopK(log_p_TK.reshape(*shape, -1), tail), np.linspace(0.5, 2.0, 6).reshape(shape)
        coefficients = teacher.coefficients(np, terms, [upstream])
        loss = teacher.values(np, terms)[0]
        by_teacher = teacher.teacher_gradient(np, terms)
        return loss, coefficients.scale, coefficients.target, by_teacher

    for one, other in zip(found(lead), found((6,)), strict=True):
        assert one.shape[: len(lead)] == lead
        np.testing.assert_array_equal(one.reshape(other.shape), other)


def test_the_probability_outside_the_targets_may_be_far_below_rounding():
    """1 - sum q is 1e-26 there, and 0 in float32: the tail's logarithm must not be that of 0."""
    z = np.asarray([[60.0, 0.5, 1.0, 59.0]])
    columns, log_p = np.asarray([[0, 3]]), np.log([[0.7, 0.2]])
    expected_T, by_z_TV, _ = _top_k_by_definition(z, columns, log_p, True)
    terms = RowTerms(*(None if x is None else np.float32(x) for x in top_k_terms(z, columns)))
    teacher = TopK(np.float32(log_p), True)
    np.testing.assert_allclose(teacher.values(np, terms)[0], expected_T, rtol=1e-6)
    found = teacher.coefficients(np, terms, [np.ones(1, np.float32)])
    np.testing.assert_allclose(dense(found, z, terms, columns), by_z_TV, rtol=1e-6, atol=1e-7)


@namespaces
def test_a_teacher_with_probability_0_outside_the_targets_has_no_tail(name):
    xp, asarray = namespace(name)
    z, columns, log_p = np.asarray([[1.0, 2.0, 3.0]]), np.asarray([[0]]), np.zeros((1, 1))
    terms = RowTerms(*(None if x is None else asarray(x) for x in top_k_terms(z, columns)))
    both = [TopK(asarray(log_p), tail) for tail in (True, False)]
    for function in (lambda teacher: teacher.values(xp, terms)[0], lambda teacher: teacher.teacher_gradient(xp, terms)):
        got = [np.asarray(function(teacher)) for teacher in both]
        np.testing.assert_allclose(got[0], got[1])
    by_z_TV = _top_k_by_definition(z, columns, log_p, False)[1]
    found = both[0].coefficients(xp, terms, [asarray(np.ones(1))])
    np.testing.assert_allclose(dense(found, z, terms, columns), by_z_TV, rtol=1e-5)


@namespaces
def test_targets_with_probability_0_on_one_side(name):
    """A teacher probability of 0 contributes 0; a student probability of 0 alone gives +inf, with a finite gradient."""
    xp, asarray = namespace(name)
    z = np.asarray([[1.0, -np.inf, 3.0, 0.0], [1.0, -np.inf, 3.0, 0.0], [1.0, 2.0, -np.inf, -np.inf]])
    columns = np.asarray([[0, 1], [0, 1], [0, 1]])
    log_p = np.asarray([[np.log(0.5), -np.inf], np.log([0.5, 0.2]), np.log([0.5, 0.2])])
    terms, teacher = (RowTerms(*map(_or_none(asarray), top_k_terms(z, columns))), TopK(asarray(log_p), True))
    with np.errstate(invalid="ignore"):  # -inf minus -inf, with weight 0
        loss = np.asarray(teacher.values(xp, terms)[0])
        by_teacher = np.asarray(teacher.teacher_gradient(xp, terms))
    assert np.isfinite(loss[0])
    assert np.isposinf(loss[1:]).all()
    found = teacher.coefficients(xp, terms, [asarray(np.ones(3))])
    gradient = dense(found, z, terms, columns)
    assert np.isfinite(gradient).all()
    assert (gradient[2, 2:] == 0).all()
    assert by_teacher[0, 1] == 0
