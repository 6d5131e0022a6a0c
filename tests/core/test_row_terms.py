"""Laws of row terms: identity, any split, any order, blocks of -inf; over NumPy, torch and JAX."""

from typing import NamedTuple

import numpy as np
import pytest

from loss_core import row_terms
from loss_core.row_terms import (
    EMPTY_PAIR,
    EMPTY_ROW,
    GAP_UNIT,
    CrossEntropy,
    LogProbability,
    PairTerms,
    RowTerms,
    TopK,
    guarded,
    is_objective,
)

# T = rows, V = vocabulary, K = targets of a row

OBJECTIVE = CrossEntropy(13)
CUTS = pytest.mark.parametrize("cuts", [(13,), (1, 13), (5, 5, 13), (7, 13), tuple(range(1, 14))], ids=str)
namespaces = pytest.mark.parametrize("name", ["numpy", "torch", "jax"])


def _namespace(name):
    if name == "numpy":
        return np, np.asarray
    if name == "torch":
        import torch

        return torch, lambda x: torch.from_numpy(np.asarray(x))
    import jax

    return jax.numpy, jax.numpy.asarray


def _row_terms(z_TV, column_T, start=0, stop=None):
    """Terms of the columns start:stop, by definition."""
    stop = z_TV.shape[1] if stop is None else stop
    piece = z_TV[:, start:stop]
    m = piece.max(-1, initial=-np.inf)
    x = piece - np.where(np.isneginf(m), 0, m)[:, None]
    s = np.where(np.isneginf(m), 0.0, np.exp(x).sum(-1))
    e = (np.exp(x) * np.where(np.isneginf(x), 0.0, x)).sum(-1)
    inside = (column_T >= start) & (column_T < stop)
    t = np.where(inside, z_TV[np.arange(len(z_TV)), np.where(inside, column_T, 0)], -np.inf)
    return RowTerms(m, s, t, piece.sum(-1), e)


def _pair_terms(zs_TV, zt_TV, start=0, stop=None):
    zs, zt = zs_TV[:, start:stop], zt_TV[:, start:stop]
    m_s, m_t = zs.max(-1, initial=-np.inf), zt.max(-1, initial=-np.inf)
    cs, ct = (zs - np.where(np.isneginf(m_s), 0, m_s)[:, None], zt - np.where(np.isneginf(m_t), 0, m_t)[:, None])
    e = np.exp(ct)
    with np.errstate(invalid="ignore"):
        gap = (ct - np.where(np.isneginf(m_s)[:, None], 0.0, cs)) / GAP_UNIT
    a = np.where(e == 0, 0.0, e * np.where(e == 0, 0.0, gap)).sum(-1)
    return PairTerms(m_t, np.where(np.isneginf(m_t), 0, e.sum(-1)), a, m_s, np.exp(cs).sum(-1) * ~np.isneginf(m_s))


def _fold(xp, asarray, combine, pieces):
    total = None
    for terms in pieces:
        terms = type(terms)(*(asarray(part) for part in terms))
        total = terms if total is None else combine(xp, total, terms)
    return type(total)(*(np.asarray(part) for part in total))


def _pieces(make, cuts, *args):
    return [make(*args, a, b) for a, b in zip((0, *cuts), cuts, strict=False)]


def _logits(scale=5.0, seed=0):
    rng = np.random.default_rng(seed)
    # Multiples of 1/64, which stay exact in float32 when the offset is added.
    z_TV = np.round(rng.standard_normal((6, 13)) * scale * 64) / 64
    z_TV[1, :7] = -np.inf  # a whole block of -inf
    z_TV[2] += 1e4  # a large common offset
    return z_TV, np.asarray([0, 12, 3, 8, 5, 6])


def _pair_logits():
    zs_TV, zt_TV = _logits(seed=1)[0], _logits(seed=2)[0]
    zs_TV[1, :7] = 0.5  # classes of row 1 that only the teacher excludes
    zt_TV[4, :3] = zs_TV[4, :3] = -np.inf
    return zs_TV, zt_TV


def _log_softmax(z_TV):
    shifted = z_TV - z_TV.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _kl(zs_TV, zt_TV):
    """By definition; terms with a teacher probability of 0 are 0."""
    log_s, log_t = _log_softmax(zs_TV), _log_softmax(zt_TV)
    with np.errstate(invalid="ignore"):
        return np.where(np.exp(log_t) == 0, 0.0, np.exp(log_t) * (log_t - log_s)).sum(-1)


# --- one distribution


@namespaces
@CUTS
def test_any_split_merges_to_the_terms_of_the_full_row(name, cuts):
    xp, asarray = _namespace(name)
    z_TV, column_T = _logits()
    pieces, whole = _pieces(_row_terms, cuts, z_TV, column_T), _row_terms(z_TV, column_T)
    rtol = 1e-6 if name == "jax" else 1e-13
    for order in (pieces, pieces[::-1]):
        folded = _fold(xp, asarray, row_terms.combine, order)
        for got, expected in zip(folded, whole, strict=True):
            np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol)


def test_a_guarded_logarithm_is_minus_infinity_at_0_and_nan_below():
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(guarded.log(np, np.array([0.0, 1.0, -1.0])), [-np.inf, 0, np.nan])


def test_only_a_weight_of_0_removes_an_infinite_value():
    found = guarded.weighted(np, np.array([0.0, 0.0, -2.0, 0.5]), np.array([np.inf, np.nan, 3.0, -np.inf]))
    np.testing.assert_array_equal(found, [0, 0, -6, -np.inf])


def test_associative():
    z_TV, column_T = _logits()
    a, b, c = _pieces(_row_terms, (4, 9, 13), z_TV, column_T)
    left = row_terms.combine(np, row_terms.combine(np, a, b), c)
    right = row_terms.combine(np, a, row_terms.combine(np, b, c))
    for got, expected in zip(left, right, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-14, atol=1e-14)


def test_identity_is_exact_and_two_empty_pieces_stay_empty():
    z_TV, column_T = _logits()
    terms, empty = _row_terms(z_TV, column_T), RowTerms(*(np.full(6, value) for value in EMPTY_ROW))
    for got, expected in zip(_row_terms(z_TV, column_T, 5, 5), empty, strict=True):
        np.testing.assert_array_equal(got, expected)
    for pair, whole in (((terms, empty), terms), ((empty, terms), terms), ((empty, empty), empty)):
        for got, expected in zip(row_terms.combine(np, *pair), whole, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_a_sum_that_is_not_needed_stays_none():
    z_TV, column_T = _logits()
    a, b = (piece._replace(z_sum=None, e=None) for piece in _pieces(_row_terms, (4, 13), z_TV, column_T))
    assert row_terms.combine(np, a, b)[3:] == (None, None)
    assert not any(OBJECTIVE.sums)


@namespaces
def test_value_and_gradient_are_those_of_the_definition(name):
    xp, asarray = _namespace(name)
    z_TV, column_T = _logits()
    upstream_T = np.linspace(0.5, 2.0, 6)
    terms = RowTerms(*map(asarray, _row_terms(z_TV, column_T)))
    rtol, atol = (1e-5, 1e-5) if name == "jax" else (1e-13, 1e-13)
    log_p = _log_softmax(z_TV)
    value_T = OBJECTIVE.values(xp, terms)[0]
    np.testing.assert_allclose(np.asarray(value_T), -log_p[np.arange(6), column_T], rtol=rtol, atol=atol)
    coefficients = OBJECTIVE.coefficients(xp, terms, [asarray(upstream_T)])
    scale_T, target_T = (np.asarray(x) for x in coefficients[:2])
    assert coefficients.uniform is None
    one_hot = column_T[:, None] == np.arange(13)
    grad_TV = np.exp(z_TV - z_TV.max(-1, keepdims=True)) * scale_T[:, None]
    grad_TV = np.where(one_hot, target_T[:, None], grad_TV)
    np.testing.assert_allclose(grad_TV, upstream_T[:, None] * (np.exp(log_p) - one_hot), rtol=rtol, atol=atol)


@namespaces
def test_log_probability_and_entropy_are_those_of_the_definition(name):
    xp, asarray = _namespace(name)
    z_TV, column_T = _logits()
    upstream_T, of_entropy_T = np.linspace(0.5, 2.0, 6), np.linspace(1.0, -1.0, 6)
    terms = RowTerms(*map(asarray, _row_terms(z_TV, column_T)))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if name == "jax" else {"rtol": 1e-13, "atol": 1e-13}
    log_p = _log_softmax(z_TV)
    weighted = np.exp(log_p) * np.where(np.isneginf(log_p), 0.0, log_p)
    entropy_T = -weighted.sum(-1)
    np.testing.assert_allclose(
        np.asarray(LogProbability().values(xp, terms)[0]), log_p[np.arange(6), column_T], **tolerance
    )
    np.testing.assert_allclose(np.asarray(row_terms.entropy(xp, terms)), entropy_T, **tolerance)
    found = LogProbability(entropy=True).coefficients(xp, terms, [asarray(upstream_T), asarray(of_entropy_T)])
    scale_T1, target_T1, _, slope_T1 = (None if x is None else np.asarray(x)[:, None] for x in found[:4])
    x_TV, one_hot = z_TV - z_TV.max(-1, keepdims=True), column_T[:, None] == np.arange(13)
    grad_TV = np.exp(x_TV) * (scale_T1 + slope_T1 * np.where(np.isneginf(x_TV), 0.0, x_TV))
    grad_TV = np.where(one_hot, target_T1, grad_TV)
    expected_TV = upstream_T[:, None] * (one_hot - np.exp(log_p))
    expected_TV -= of_entropy_T[:, None] * (weighted + np.exp(log_p) * entropy_T[:, None])
    np.testing.assert_allclose(grad_TV, expected_TV, **tolerance)
    assert LogProbability(entropy=True).coefficients(xp, terms, [asarray(upstream_T), None]).slope is None


@pytest.mark.parametrize(("roundings", "accuracy"), [(0, 1), (4, 1), (5, 0)])
@pytest.mark.parametrize("m", [8.0, -8.0])
def test_a_target_within_two_roundings_of_the_maximum_is_the_maximum(m, roundings, accuracy):
    # In float64, in which numbers around 8 are 8 eps apart.
    t = m - roundings * 8 * np.finfo(np.float64).eps
    terms = RowTerms(*(np.asarray([x]) for x in (m, 1.0, t)))
    assert row_terms.token_metrics(np, terms, OBJECTIVE, ["accuracy"])[0] == accuracy


def test_metrics_of_a_token_are_those_of_the_definition():
    z_TV, column_T = _logits()
    terms, objective, log_p = RowTerms(*_row_terms(z_TV, column_T)), CrossEntropy(13, z_loss=0.25), _log_softmax(z_TV)
    lse_T = z_TV.max(-1) - log_p.max(-1)
    expected = {
        "accuracy": z_TV.argmax(-1) == column_T,
        "entropy": -(np.exp(log_p) * np.where(np.isneginf(log_p), 0.0, log_p)).sum(-1),
        "lse": lse_T,
        "z_loss": 0.25 * lse_T**2,
    }
    found = row_terms.token_metrics(np, terms, objective, list(expected))
    for name, metric_T in zip(expected, found, strict=True):
        np.testing.assert_allclose(metric_T, expected[name], rtol=1e-12, atol=1e-12, err_msg=name)


def test_an_objective_requests_only_the_sums_that_it_needs():
    assert TopK(np.zeros((1, 2)), tail=True).sums == (False, False)
    assert CrossEntropy(13).sums == CrossEntropy(13, z_loss=0.5).sums == (False, False)
    assert CrossEntropy(13, label_smoothing=0.1).sums == (True, False)
    assert CrossEntropy(13, metrics=True).sums == (False, True)


def test_num_values_is_the_number_of_values():
    z_TV, column_T = _logits()
    terms, of_targets = RowTerms(*_row_terms(z_TV, column_T)), _top_k_terms(z_TV, column_T[:, None])
    teacher = TopK(np.full((6, 1), -1.0), tail=True)
    for objective, of, number in (
        (OBJECTIVE, terms, 1), (LogProbability(), terms, 1), (LogProbability(True), terms, 2), (teacher, of_targets, 1)
    ):  # fmt: skip
        assert objective.num_values == len(objective.values(np, of)) == number


def test_a_z_loss_alone_makes_entries_of_a_gradient_larger_than_their_upstream():
    assert [x.headroom for x in (OBJECTIVE, LogProbability(True), TopK(None, False))] == [0, 0, 0]
    # 1 + 2 * 0.5 * 2^14, and 1 + 2 * 2 * 2^14.
    assert [CrossEntropy(13, z_loss=z_loss).headroom for z_loss in (0.5, 2.0)] == [15, 17]


def test_objectives_of_different_classes_are_not_equal():
    @is_objective
    class Other(NamedTuple):
        gamma: float

    assert tuple(Other(0.0)) == tuple(LogProbability(False))
    assert Other(0.0) != LogProbability(False)
    assert Other(0.0) == Other(0.0)
    assert not Other(0.0) != Other(0.0)  # noqa: SIM202
    assert (Other(1.0) != Other(2.0)) == (Other(2.0) != Other(1.0)) == (Other(1.0) != Other(1.5)) is True
    assert len({Other(0.0), Other(0.0), LogProbability(False), CrossEntropy(3), CrossEntropy(3)}) == 3


def test_a_target_that_no_piece_owns_gives_an_infinite_loss():
    terms = _row_terms(_logits()[0], np.full(6, 99))
    assert np.all(np.isposinf(OBJECTIVE.values(np, terms)[0]))
    assert np.all(np.isneginf(LogProbability().values(np, terms)[0]))


def test_a_large_common_offset_costs_no_precision():
    z_TV, column_T = _logits(scale=1.0)
    z_TV = np.where(np.isneginf(z_TV), -30.0, z_TV).astype(np.float32)
    z_TV[:] = z_TV[0]  # the same row everywhere
    z_TV = np.round(z_TV * 1024) / 1024
    both = (z_TV, z_TV + np.float32(4096))
    losses = [
        OBJECTIVE.values(np, RowTerms(*map(np.float32, _row_terms(z.astype(np.float32), column_T))))[0] for z in both
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-7)


@namespaces
def test_smoothing_and_z_loss_are_those_of_the_definition(name):
    import torch

    xp, asarray = _namespace(name)
    z_TV, column_T = _logits()
    z_TV, options = np.where(np.isneginf(z_TV), -5.0, z_TV), (0.1, 0.5)
    upstream_T, objective = np.linspace(0.5, 2.0, 6), CrossEntropy(13, *options)
    z, columns = torch.from_numpy(z_TV).requires_grad_(), torch.from_numpy(column_T)
    expected_T = torch.nn.functional.cross_entropy(z, columns, reduction="none", label_smoothing=options[0])
    expected_T = expected_T + options[1] * z.logsumexp(-1).square()
    (expected_TV,) = torch.autograd.grad(expected_T, z, torch.from_numpy(upstream_T))
    terms = RowTerms(*map(asarray, _row_terms(z_TV, column_T)))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if name == "jax" else {"rtol": 1e-12, "atol": 1e-12}
    value = np.asarray(objective.values(xp, terms)[0])
    np.testing.assert_allclose(value, expected_T.detach().numpy(), **tolerance)
    found = objective.coefficients(xp, terms, [asarray(upstream_T)])
    np.testing.assert_allclose(_dense(found, z_TV, terms, column_T[:, None]), expected_TV.numpy(), **tolerance)


def _dense(coefficients, z_TV, terms, column_TK):
    """The dense gradient of coefficients."""
    scale, target, uniform, _ = (None if x is None else np.asarray(x) for x in coefficients[:4])
    m_T = np.asarray(terms.m)
    with np.errstate(over="ignore"):
        grad_TV = np.exp(z_TV - np.where(np.isneginf(m_T), 0, m_T)[:, None]) * scale[:, None]
    grad_TV = grad_TV if uniform is None else grad_TV - uniform[:, None]
    np.put_along_axis(grad_TV, column_TK, target.reshape(column_TK.shape), 1)
    return grad_TV


# --- one distribution, K targets of a row


def _top_k(num_targets=4, seed=3):
    """Logits, ascending columns [T, K] and log-probabilities of a teacher [T, K]."""
    rng = np.random.default_rng(seed)
    z_TV = _logits()[0]
    column_TK = np.sort(rng.permuted(np.tile(np.arange(13), (6, 1)), axis=1)[:, :num_targets], axis=1)
    column_TK[1] = np.arange(7, 13)[:num_targets]  # of the others in row 1, 7 are -inf
    log_p_TV = _log_softmax(rng.standard_normal((6, 13)) * 2)
    return z_TV, column_TK, np.take_along_axis(log_p_TV, column_TK, 1)


def _top_k_terms(z_TV, column_TK, start=0, stop=None):
    """Terms of the columns start:stop that are no targets, by definition, and z of the targets among them."""
    stop = z_TV.shape[1] if stop is None else stop
    others = z_TV.copy()
    np.put_along_axis(others, column_TK, -np.inf, 1)
    terms = _row_terms(others, np.full(len(z_TV), -1), start, stop)
    inside = (column_TK >= start) & (column_TK < stop)
    return RowTerms(terms.m, terms.s, np.where(inside, np.take_along_axis(z_TV, column_TK, 1), -np.inf))


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


@namespaces
@CUTS
@pytest.mark.parametrize("tail", [True, False])
def test_top_k_of_any_split_is_that_of_the_definition(name, cuts, tail):
    xp, asarray = _namespace(name)
    z_TV, column_TK, log_p_TK = _top_k()
    expected_T, by_z_TV, by_log_p_TK = _top_k_by_definition(z_TV, column_TK, log_p_TK, tail)
    pieces = _pieces(_top_k_terms, cuts, z_TV, column_TK)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if name == "jax" else {"rtol": 1e-12, "atol": 1e-12}
    for order in (pieces, pieces[::-1]):
        terms = RowTerms(*(None if x is None else asarray(x) for x in _fold_present(xp, asarray, order)))
        teacher = TopK(asarray(log_p_TK), tail)
        value = np.asarray(teacher.values(xp, terms)[0])
        np.testing.assert_allclose(value, expected_T, **tolerance)
        found = teacher.coefficients(xp, terms, [asarray(np.ones(6))])
        np.testing.assert_allclose(_dense(found, z_TV, terms, column_TK), by_z_TV, **tolerance)
        gradient = np.asarray(teacher.teacher_gradient(xp, terms))
        np.testing.assert_allclose(gradient, by_log_p_TK, **tolerance)


def _fold_present(xp, asarray, pieces):
    total = None
    for terms in pieces:
        terms = RowTerms(*(None if part is None else asarray(part) for part in terms))
        total = terms if total is None else row_terms.combine(xp, total, terms)
    return total


@pytest.mark.parametrize("lead", [(2, 3), (6, 1)], ids=str)
@pytest.mark.parametrize("tail", [True, False])
def test_top_k_of_rows_with_any_leading_dimensions(tail, lead):
    z_TV, column_TK, log_p_TK = _top_k()

    def found(shape):
        terms = _top_k_terms(z_TV, column_TK)
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
    terms = RowTerms(*(None if x is None else np.float32(x) for x in _top_k_terms(z, columns)))
    teacher = TopK(np.float32(log_p), True)
    np.testing.assert_allclose(teacher.values(np, terms)[0], expected_T, rtol=1e-6)
    found = teacher.coefficients(np, terms, [np.ones(1, np.float32)])
    np.testing.assert_allclose(_dense(found, z, terms, columns), by_z_TV, rtol=1e-6, atol=1e-7)


@namespaces
def test_a_teacher_with_probability_0_outside_the_targets_has_no_tail(name):
    xp, asarray = _namespace(name)
    z, columns, log_p = np.asarray([[1.0, 2.0, 3.0]]), np.asarray([[0]]), np.zeros((1, 1))
    terms = RowTerms(*(None if x is None else asarray(x) for x in _top_k_terms(z, columns)))
    both = [TopK(asarray(log_p), tail) for tail in (True, False)]
    for function in (lambda teacher: teacher.values(xp, terms)[0], lambda teacher: teacher.teacher_gradient(xp, terms)):
        got = [np.asarray(function(teacher)) for teacher in both]
        np.testing.assert_allclose(got[0], got[1])
    by_z_TV = _top_k_by_definition(z, columns, log_p, False)[1]
    found = both[0].coefficients(xp, terms, [asarray(np.ones(1))])
    np.testing.assert_allclose(_dense(found, z, terms, columns), by_z_TV, rtol=1e-5)


@namespaces
def test_targets_with_probability_0_on_one_side(name):
    """A teacher probability of 0 contributes 0; a student probability of 0 alone gives +inf, with a finite gradient."""
    xp, asarray = _namespace(name)
    z = np.asarray([[1.0, -np.inf, 3.0, 0.0], [1.0, -np.inf, 3.0, 0.0], [1.0, 2.0, -np.inf, -np.inf]])
    columns = np.asarray([[0, 1], [0, 1], [0, 1]])
    log_p = np.asarray([[np.log(0.5), -np.inf], np.log([0.5, 0.2]), np.log([0.5, 0.2])])
    terms, teacher = (RowTerms(*map(_or_none(asarray), _top_k_terms(z, columns))), TopK(asarray(log_p), True))
    with np.errstate(invalid="ignore"):  # -inf minus -inf, with weight 0
        loss = np.asarray(teacher.values(xp, terms)[0])
        by_teacher = np.asarray(teacher.teacher_gradient(xp, terms))
    assert np.isfinite(loss[0])
    assert np.isposinf(loss[1:]).all()
    found = teacher.coefficients(xp, terms, [asarray(np.ones(3))])
    gradient = _dense(found, z, terms, columns)
    assert np.isfinite(gradient).all()
    assert (gradient[2, 2:] == 0).all()
    assert by_teacher[0, 1] == 0


def _or_none(asarray):
    return lambda x: None if x is None else asarray(x)


# --- two distributions


@namespaces
@CUTS
def test_any_split_of_pairs_merges_to_the_terms_of_the_full_row(name, cuts):
    xp, asarray = _namespace(name)
    zs_TV, zt_TV = _pair_logits()
    pieces = _pieces(_pair_terms, cuts, zs_TV, zt_TV)
    rtol, atol = (2e-5, 1e-4) if name == "jax" else (1e-12, 1e-12)
    for order in (pieces, pieces[::-1]):
        folded = _fold(xp, asarray, row_terms.combine_pairs, order)
        np.testing.assert_allclose(row_terms.kl_divergence(np, folded), _kl(zs_TV, zt_TV), rtol=rtol, atol=atol)


def test_pairs_are_associative():
    a, b, c = _pieces(_pair_terms, (4, 9, 13), *_pair_logits())
    left = row_terms.combine_pairs(np, row_terms.combine_pairs(np, a, b), c)
    right = row_terms.combine_pairs(np, a, row_terms.combine_pairs(np, b, c))
    for got, expected in zip(left, right, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-13)


def test_identity_of_pairs_is_exact_and_two_empty_pieces_stay_empty():
    terms, empty = _pair_terms(*_pair_logits()), PairTerms(*(np.full(6, value) for value in EMPTY_PAIR))
    for pair, whole in (((terms, empty), terms), ((empty, terms), terms), ((empty, empty), empty)):
        for got, expected in zip(row_terms.combine_pairs(np, *pair), whole, strict=True):
            np.testing.assert_array_equal(got, expected)


@namespaces
def test_the_centre_gives_the_teachers_gradient(name):
    xp, asarray = _namespace(name)
    zs_TV, zt_TV = (np.where(np.isneginf(z), -3.0, z) for z in _pair_logits())
    terms = PairTerms(*map(asarray, _pair_terms(zs_TV, zt_TV)))
    centre_T = np.asarray(row_terms.kl_centre(xp, terms, asarray(_kl(zs_TV, zt_TV))))
    gap_TV = (zt_TV - zt_TV.max(-1, keepdims=True)) - (zs_TV - zs_TV.max(-1, keepdims=True))
    expected = _log_softmax(zt_TV) - _log_softmax(zs_TV) - _kl(zs_TV, zt_TV)[:, None]
    np.testing.assert_allclose(gap_TV - centre_T[:, None], expected, rtol=1e-5, atol=1e-4 if name == "jax" else 1e-12)


def test_student_without_any_finite_logit_is_nan():
    terms = PairTerms(*(np.asarray([x]) for x in (0.0, 2.0, 0.1, -np.inf, 0.0)))
    with np.errstate(divide="ignore", invalid="ignore"):
        assert np.isnan(row_terms.kl_divergence(np, terms)).all()


def test_the_unit_of_gaps_is_a_power_of_two():
    assert float(np.frexp(GAP_UNIT)[0]) == 0.5  # a power of two


@namespaces
def test_masks_of_the_lowest_finite_number_stay_finite(name):
    # 7 of 13 gaps are near the largest float32: their sum would be infinite without GAP_UNIT, the divergence is not.
    xp, asarray = _namespace(name)
    lowest = np.finfo(np.float32).min
    zs_TV, zt_TV = np.zeros((1, 13), np.float32), np.zeros((1, 13), np.float32)
    zs_TV[:, :7] = lowest
    expected = 7 / 13 * -float(lowest)
    for cuts in ((13,), (6, 13), tuple(range(1, 14))):
        pieces = [
            PairTerms(*(x.astype(np.float32) for x in _pair_terms(zs_TV, zt_TV, a, b)))
            for a, b in zip((0, *cuts), cuts, strict=False)
        ]
        folded = PairTerms(*map(asarray, _fold(xp, asarray, row_terms.combine_pairs, pieces)))
        kl = np.asarray(row_terms.kl_divergence(xp, folded))
        np.testing.assert_allclose(kl, expected, rtol=1e-6)


# --- two distributions and their mixture


def _mixture_terms(zs_TV, zt_TV, beta, start=0, stop=None):
    """Sums of the columns start:stop, by definition; with probabilities over all columns."""
    p_s, p_t = np.exp(_log_softmax(zs_TV)), np.exp(_log_softmax(zt_TV))
    m = beta * p_t + (1 - beta) * p_s
    kls = (np.where(p == 0, 0.0, p * np.log(np.where(p == 0, 1.0, p) / np.where(m == 0, 1.0, m))) for p in (p_t, p_s))
    return row_terms.MixtureTerms(*(kl_TV[:, start:stop].sum(-1) for kl_TV in kls))


@namespaces
@pytest.mark.parametrize("beta", [0.5, 0.1, 1e-6, 1 - 1e-6])
def test_logarithms_to_the_mixture(name, beta):
    xp, asarray = _namespace(name)
    p_t, p_s = np.asarray([0.3, 0.3, 0.2, 1e-30, 0.5, 0.0, 0.0]), np.asarray([0.3, 0.1, 0.6, 0.4, 1e-30, 0.5, 0.0])
    p_t, p_s = np.append(p_t, 0.5), np.append(p_s, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio, m = np.log(p_t) - np.log(p_s), beta * p_t + (1 - beta) * p_s
        expected = np.log(p_t / m), np.log(p_s / m)
    logs = row_terms.mixture_logs(xp, asarray(ratio), *row_terms.log_shares(beta))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if name == "jax" else {"rtol": 1e-12, "atol": 1e-14}
    for p, got, wanted in zip((p_t, p_s), logs, expected, strict=True):
        np.testing.assert_allclose(np.asarray(got)[p > 0], wanted[p > 0], **tolerance)


@namespaces
@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_divergence_from_the_mixture_and_its_gradients(name, beta):
    """The formulas in the docstring of `jensen_shannon`, against PyTorch's derivative of the definition."""
    import torch

    xp, asarray = _namespace(name)
    zs_TV, zt_TV = _pair_logits()
    terms = PairTerms(*map(asarray, _pair_terms(zs_TV, zt_TV)))
    parts = _pieces(lambda *args: _mixture_terms(zs_TV, zt_TV, beta, *args), (4, 9, 13))
    mixture = row_terms.MixtureTerms(*(asarray(sum(x)) for x in zip(*parts, strict=True)))
    got = np.asarray(row_terms.jensen_shannon(xp, terms, mixture, beta))

    zs, zt = (torch.from_numpy(z).requires_grad_() for z in (zs_TV, zt_TV))
    p_s, p_t = zs.softmax(-1), zt.softmax(-1)
    m = beta * p_t + (1 - beta) * p_s
    both = [torch.xlogy(p, p.clamp(min=1e-300) / m.clamp(min=1e-300)).sum(-1) for p in (p_t, p_s)]
    expected = beta * both[0] + (1 - beta) * both[1]
    rtol = 1e-5 if name == "jax" else 1e-12
    np.testing.assert_allclose(got, expected.detach().numpy(), rtol=rtol, atol=rtol)
    if name == "torch":
        by_s, by_t = torch.autograd.grad(expected.sum(), (zs, zt))
        offset = row_terms.log_ratio_offset(xp, terms)[:, None]
        gap = (zt - terms.m_t[:, None]) - (zs - terms.m_s[:, None])
        logs = row_terms.mixture_logs(xp, (gap - offset).detach(), *row_terms.log_shares(beta))
        of_both = zip((p_t, p_s), logs, mixture, (beta, 1 - beta), (by_t, by_s), strict=True)
        for p, log, kl, share, grad in of_both:
            formula = share * p * torch.where(p == 0, 0.0, log - kl[:, None])
            torch.testing.assert_close(grad, formula.detach(), rtol=1e-10, atol=1e-13)


def test_a_distribution_without_any_finite_logit_has_no_divergence_from_a_mixture():
    zero = np.zeros(1)
    for m_t, m_s in ((0.0, -np.inf), (-np.inf, 0.0)):
        terms = PairTerms(*(np.asarray([x]) for x in (m_t, 2.0, 0.1, m_s, 2.0)))
        with np.errstate(invalid="ignore"):
            assert np.isnan(row_terms.jensen_shannon(np, terms, row_terms.MixtureTerms(zero, zero), 0.5)).all()
