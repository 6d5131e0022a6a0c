"""The laws of combine: identity, any split, any order, blocks of -inf; the same over NumPy, torch and JAX."""

import numpy as np
import pytest

from loss_core import row_stats
from loss_core.row_stats import KDRowState, RowState

# T = rows, V = vocabulary


def _namespace(name):
    if name == "numpy":
        return np, np.asarray
    if name == "torch":
        import torch

        return torch, lambda x: torch.from_numpy(np.asarray(x))
    import jax

    return jax.numpy, jax.numpy.asarray


def _state(z_TV, column_T, start, stop):
    """RowState of the columns start:stop, by definition."""
    piece = z_TV[:, start:stop]
    m = piece.max(-1, initial=-np.inf)
    with np.errstate(invalid="ignore"):
        s = np.where(np.isneginf(m), 0.0, np.exp(piece - np.where(np.isneginf(m), 0, m)[:, None]).sum(-1))
    inside = (column_T >= start) & (column_T < stop)
    t = np.where(inside, z_TV[np.arange(len(z_TV)), column_T], -np.inf)
    return RowState(m, s, t)


def _kd_state(zs_TV, zt_TV, start, stop):
    zs, zt = zs_TV[:, start:stop], zt_TV[:, start:stop]
    m_s, m_t = zs.max(-1, initial=-np.inf), zt.max(-1, initial=-np.inf)
    cs, ct = (zs - np.where(np.isneginf(m_s), 0, m_s)[:, None], zt - np.where(np.isneginf(m_t), 0, m_t)[:, None])
    e = np.exp(ct)
    with np.errstate(invalid="ignore"):
        a = np.where(e == 0, 0.0, e * (ct - np.where(np.isneginf(m_s)[:, None], 0.0, cs))).sum(-1)
    return KDRowState(m_t, np.where(np.isneginf(m_t), 0, e.sum(-1)), a, m_s, np.exp(cs).sum(-1) * ~np.isneginf(m_s))


def _fold(xp, asarray, combine, states):
    total = None
    for state in states:
        state = type(state)(*(asarray(part) for part in state))
        total = state if total is None else combine(xp, total, state)
    return type(total)(*(np.asarray(part) for part in total))


def _logits(scale=5.0, seed=0):
    rng = np.random.default_rng(seed)
    # Multiples of 1/64, which float32 holds exactly beside the offset.
    z_TV = np.round(rng.standard_normal((6, 13)) * scale * 64) / 64
    z_TV[1, :7] = -np.inf  # a whole block of -inf
    z_TV[2] += 1e4  # a large common offset
    return z_TV, np.asarray([0, 12, 3, 8, 5, 6])


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("cuts", [(13,), (1, 13), (5, 5, 13), (7, 13), tuple(range(1, 14))])
def test_any_split_gives_the_whole(name, cuts):
    xp, asarray = _namespace(name)
    z_TV, column_T = _logits()
    pieces = [_state(z_TV, column_T, a, b) for a, b in zip((0, *cuts), cuts, strict=False)]
    for order in (pieces, pieces[::-1]):
        folded = _fold(xp, asarray, row_stats.combine, order)
        whole = _state(z_TV, column_T, 0, 13)
        rtol = 1e-6 if name == "jax" else 1e-13
        for got, expected in zip(folded, whole, strict=True):
            np.testing.assert_allclose(got, expected, rtol=rtol)


def test_associative():
    z_TV, column_T = _logits()
    a, b, c = (_state(z_TV, column_T, *cut) for cut in ((0, 4), (4, 9), (9, 13)))
    left = row_stats.combine(np, row_stats.combine(np, a, b), c)
    right = row_stats.combine(np, a, row_stats.combine(np, b, c))
    for got, expected in zip(left, right, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-14)


def test_identity_is_exact_and_two_empty_blocks_stay_empty():
    z_TV, column_T = _logits()
    state, empty = _state(z_TV, column_T, 0, 13), _state(z_TV, column_T, 0, 0)
    for pair in ((state, empty), (empty, state)):
        for got, expected in zip(row_stats.combine(np, *pair), state, strict=True):
            np.testing.assert_array_equal(got, expected)
    for got, expected in zip(row_stats.combine(np, empty, empty), empty, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_target_that_nobody_owns_is_loud():
    z_TV, _ = _logits()
    nobody = np.full(6, 99)
    state = RowState(*_state(z_TV, np.zeros(6, int), 0, 13)[:2], np.where(nobody < 13, 0.0, -np.inf))
    assert np.all(np.isposinf(row_stats.finish(np, state)))


def test_finish_keeps_digits_under_a_large_offset():
    z_TV, column_T = _logits(scale=1.0)
    z_TV = np.where(np.isneginf(z_TV), -30.0, z_TV).astype(np.float32)
    z_TV[:] = z_TV[0]  # same row everywhere, each with another offset that float32 holds exactly
    z_TV = np.round(z_TV * 1024) / 1024
    shifted = z_TV + np.float32(4096)
    states = [_state(x.astype(np.float32), column_T, 0, 13) for x in (z_TV, shifted)]
    losses = [row_stats.finish(np, RowState(*(np.float32(p) for p in state))) for state in states]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-7)


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_a_number_near_the_largest_logit_gives_the_same_loss_and_the_sum_tells_where_it_is_not_near(name):
    xp, asarray = _namespace(name)
    rng = np.random.default_rng(2)
    z_TV = rng.standard_normal((6, 1000)).astype(np.float32)
    z_TV[:, 700] = [0.0, 15.0, 29.5, 31.0, 60.0, 1e4]  # behind the first columns
    z_TV[0, :300] = -np.inf
    column_T = np.asarray([5, 400, 400, 400, 400, 700])
    t_T = z_TV[np.arange(6), column_T]
    m_T = np.asarray(row_stats.near_largest(xp, asarray(z_TV[:, : row_stats.NEAR_COLUMNS]), asarray(t_T)))
    first = np.maximum(z_TV[:, : row_stats.NEAR_COLUMNS].max(-1), t_T)
    assert m_T[0] == 0
    np.testing.assert_array_equal(m_T[1:], first[1:])
    with np.errstate(over="ignore"):
        s_T = np.exp(z_TV - m_T[:, None]).sum(-1)
    enough = np.asarray(row_stats.near_enough(asarray(s_T)))
    # Never enough where a logit is 30 above m.
    assert not (enough & (z_TV.max(-1) - m_T >= 30)).any()
    assert enough.tolist() == [True, True, True, True, False, True]
    loss_T = np.asarray(row_stats.finish(xp, RowState(*map(asarray, (m_T, s_T, t_T)))))
    exact = _state(z_TV.astype(np.float64), column_T, 0, 1000)
    wanted_T = row_stats.finish(np, exact)
    # Of z - m 16 u, of exp 1 ulp, of NumPy's sum 6 sqrt(n / 8), of the logarithm, of m - t and of their sum.
    allowed_T = (16 + 2 + 6 * np.sqrt(1000 / 8) + 2 + 2 * np.abs(m_T - t_T) + 2 * np.abs(wanted_T)) * 2.0**-24
    finite = enough & np.isfinite(wanted_T)
    assert (np.abs(loss_T[finite] - wanted_T[finite]) <= allowed_T[finite]).all()
    for bad in (np.nan, np.inf, 0.0):
        assert not np.asarray(row_stats.near_enough(asarray(np.float32([bad])))).any()


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("cuts", [(13,), (1, 13), (5, 5, 13), (7, 13), tuple(range(1, 14))])
def test_kd_any_split_gives_the_whole(name, cuts):
    xp, asarray = _namespace(name)
    zs_TV, _ = _logits(seed=1)
    zt_TV, _ = _logits(seed=2)
    zs_TV[1, :7] = 0.5  # the student allows what the teacher rules out in row 1
    zt_TV[4, :3] = zs_TV[4, :3] = -np.inf
    pieces = [_kd_state(zs_TV, zt_TV, a, b) for a, b in zip((0, *cuts), cuts, strict=False)]
    rtol, atol = (2e-5, 1e-4) if name == "jax" else (1e-12, 1e-12)
    p = np.exp(zt_TV - zt_TV.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    log_s = zs_TV - zs_TV.max(-1, keepdims=True)
    log_s -= np.log(np.exp(log_s).sum(-1, keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.where(p == 0, 0, p * (np.log(p) - log_s)).sum(-1)
    for order in (pieces, pieces[::-1]):
        folded = _fold(xp, asarray, row_stats.combine_kd, order)
        np.testing.assert_allclose(row_stats.finish_kd(np, folded), expected, rtol=rtol, atol=atol)


def test_kd_student_without_any_finite_logit_is_nan():
    state = KDRowState(*(np.asarray([x]) for x in (0.0, 2.0, 0.1, -np.inf, 0.0)))
    with np.errstate(divide="ignore", invalid="ignore"):
        assert np.isnan(row_stats.finish_kd(np, state)).all()
