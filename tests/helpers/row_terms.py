"""Logits of a few rows, and their row terms by definition, whole or in pieces; over NumPy, torch and JAX."""

import numpy as np
import pytest

from loss_core.row_terms import CrossEntropy, RowTerms

# T = rows, V = vocabulary, K = targets of a row

OBJECTIVE = CrossEntropy(13)
CUTS = pytest.mark.parametrize("cuts", [(13,), (1, 13), (5, 5, 13), (7, 13), tuple(range(1, 14))], ids=str)
namespaces = pytest.mark.parametrize("name", ["numpy", "torch", "jax"])


def namespace(name):
    """The array namespace, and its function that makes an array of one of NumPy."""
    if name == "numpy":
        return np, np.asarray
    if name == "torch":
        import torch

        return torch, lambda x: torch.from_numpy(np.asarray(x))
    import jax

    return jax.numpy, jax.numpy.asarray


def draw_logits(scale=5.0, seed=0):
    """Logits [6, 13] and the target's column of each row."""
    rng = np.random.default_rng(seed)
    # Multiples of 1/64, which stay exact in float32 when the offset is added.
    z_TV = np.round(rng.standard_normal((6, 13)) * scale * 64) / 64
    z_TV[1, :7] = -np.inf  # a whole block of -inf
    z_TV[2] += 1e4  # a large common offset
    return z_TV, np.asarray([0, 12, 3, 8, 5, 6])


def log_softmax(z_TV):
    shifted = z_TV - z_TV.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def terms_of(z_TV, column_T, start=0, stop=None):
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


def top_k_terms(z_TV, column_TK, start=0, stop=None):
    """Terms of the columns start:stop that are no targets, by definition, and z of the targets among them."""
    stop = z_TV.shape[1] if stop is None else stop
    others = z_TV.copy()
    np.put_along_axis(others, column_TK, -np.inf, 1)
    terms = terms_of(others, np.full(len(z_TV), -1), start, stop)
    inside = (column_TK >= start) & (column_TK < stop)
    return RowTerms(terms.m, terms.s, np.where(inside, np.take_along_axis(z_TV, column_TK, 1), -np.inf))


def split(make, cuts, *args):
    """What `make` computes of each piece of the columns, pieces that end at the cuts."""
    return [make(*args, a, b) for a, b in zip((0, *cuts), cuts, strict=False)]


def fold(xp, asarray, combine, pieces):
    """The terms of all pieces merged in their order, as arrays of NumPy."""
    total = None
    for terms in pieces:
        terms = type(terms)(*(asarray(part) for part in terms))
        total = terms if total is None else combine(xp, total, terms)
    return type(total)(*(np.asarray(part) for part in total))


def dense(coefficients, z_TV, terms, column_TK):
    """The dense gradient of coefficients."""
    scale, target, uniform, _ = (None if x is None else np.asarray(x) for x in coefficients[:4])
    m_T = np.asarray(terms.m)
    with np.errstate(over="ignore"):
        grad_TV = np.exp(z_TV - np.where(np.isneginf(m_T), 0, m_T)[:, None]) * scale[:, None]
    grad_TV = grad_TV if uniform is None else grad_TV - uniform[:, None]
    np.put_along_axis(grad_TV, column_TK, target.reshape(column_TK.shape), 1)
    return grad_TV
