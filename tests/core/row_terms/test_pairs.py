"""Laws of the terms of two distributions, their divergences and mixture; over NumPy, torch and JAX."""

import numpy as np
import pytest

from helpers.row_terms import CUTS, draw_logits, fold, log_softmax, namespace, namespaces, split
from loss_core import row_terms
from loss_core.row_terms import EMPTY_PAIR, GAP_UNIT, PairTerms

# T = rows, V = vocabulary


def _pair_logits():
    zs_TV, zt_TV = draw_logits(seed=1)[0], draw_logits(seed=2)[0]
    zs_TV[1, :7] = 0.5  # classes of row 1 that only the teacher excludes
    zt_TV[4, :3] = zs_TV[4, :3] = -np.inf
    return zs_TV, zt_TV


def _pair_terms(zs_TV, zt_TV, start=0, stop=None):
    zs, zt = zs_TV[:, start:stop], zt_TV[:, start:stop]
    m_s, m_t = zs.max(-1, initial=-np.inf), zt.max(-1, initial=-np.inf)
    cs, ct = (zs - np.where(np.isneginf(m_s), 0, m_s)[:, None], zt - np.where(np.isneginf(m_t), 0, m_t)[:, None])
    e = np.exp(ct)
    with np.errstate(invalid="ignore"):
        gap = (ct - np.where(np.isneginf(m_s)[:, None], 0.0, cs)) / GAP_UNIT
    a = np.where(e == 0, 0.0, e * np.where(e == 0, 0.0, gap)).sum(-1)
    return PairTerms(m_t, np.where(np.isneginf(m_t), 0, e.sum(-1)), a, m_s, np.exp(cs).sum(-1) * ~np.isneginf(m_s))


def _kl(zs_TV, zt_TV):
    """By definition; terms with a teacher probability of 0 are 0."""
    log_s, log_t = log_softmax(zs_TV), log_softmax(zt_TV)
    with np.errstate(invalid="ignore"):
        return np.where(np.exp(log_t) == 0, 0.0, np.exp(log_t) * (log_t - log_s)).sum(-1)


def _mixture_terms(zs_TV, zt_TV, beta, start=0, stop=None):
    """Sums of the columns start:stop, by definition; with probabilities over all columns."""
    p_s, p_t = np.exp(log_softmax(zs_TV)), np.exp(log_softmax(zt_TV))
    m = beta * p_t + (1 - beta) * p_s
    kls = (np.where(p == 0, 0.0, p * np.log(np.where(p == 0, 1.0, p) / np.where(m == 0, 1.0, m))) for p in (p_t, p_s))
    return row_terms.MixtureTerms(*(kl_TV[:, start:stop].sum(-1) for kl_TV in kls))


@namespaces
@CUTS
def test_any_split_of_pairs_merges_to_the_terms_of_the_full_row(name, cuts):
    xp, asarray = namespace(name)
    zs_TV, zt_TV = _pair_logits()
    pieces = split(_pair_terms, cuts, zs_TV, zt_TV)
    rtol, atol = (2e-5, 1e-4) if name == "jax" else (1e-12, 1e-12)
    for order in (pieces, pieces[::-1]):
        folded = fold(xp, asarray, row_terms.combine_pairs, order)
        np.testing.assert_allclose(row_terms.kl_divergence(np, folded), _kl(zs_TV, zt_TV), rtol=rtol, atol=atol)


def test_pairs_are_associative():
    a, b, c = split(_pair_terms, (4, 9, 13), *_pair_logits())
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
    xp, asarray = namespace(name)
    zs_TV, zt_TV = (np.where(np.isneginf(z), -3.0, z) for z in _pair_logits())
    terms = PairTerms(*map(asarray, _pair_terms(zs_TV, zt_TV)))
    centre_T = np.asarray(row_terms.kl_centre(xp, terms, asarray(_kl(zs_TV, zt_TV))))
    gap_TV = (zt_TV - zt_TV.max(-1, keepdims=True)) - (zs_TV - zs_TV.max(-1, keepdims=True))
    expected = log_softmax(zt_TV) - log_softmax(zs_TV) - _kl(zs_TV, zt_TV)[:, None]
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
    xp, asarray = namespace(name)
    lowest = np.finfo(np.float32).min
    zs_TV, zt_TV = np.zeros((1, 13), np.float32), np.zeros((1, 13), np.float32)
    zs_TV[:, :7] = lowest
    expected = 7 / 13 * -float(lowest)
    for cuts in ((13,), (6, 13), tuple(range(1, 14))):
        pieces = [
            PairTerms(*(x.astype(np.float32) for x in _pair_terms(zs_TV, zt_TV, a, b)))
            for a, b in zip((0, *cuts), cuts, strict=False)
        ]
        folded = PairTerms(*map(asarray, fold(xp, asarray, row_terms.combine_pairs, pieces)))
        kl = np.asarray(row_terms.kl_divergence(xp, folded))
        np.testing.assert_allclose(kl, expected, rtol=1e-6)


@namespaces
@pytest.mark.parametrize("beta", [0.5, 0.1, 1e-6, 1 - 1e-6])
def test_logarithms_to_the_mixture(name, beta):
    xp, asarray = namespace(name)
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

    xp, asarray = namespace(name)
    zs_TV, zt_TV = _pair_logits()
    terms = PairTerms(*map(asarray, _pair_terms(zs_TV, zt_TV)))
    parts = split(lambda *args: _mixture_terms(zs_TV, zt_TV, beta, *args), (4, 9, 13))
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
