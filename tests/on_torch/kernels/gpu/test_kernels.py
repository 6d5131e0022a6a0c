"""Device functions of the Triton kernels against `loss_core.row_terms`, in Triton's interpreter."""

import functools
import itertools
import sys

import numpy as np
import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton has no wheels but for Linux", allow_module_level=True)

import triton
import triton.language as tl

from loss_core import row_terms
from loss_core_torch.kernels.gpu.kernels import memory, pieces, terms
from loss_core_torch.kernels.gpu.launch import Layout, layout
from on_torch.kernels.gpu.sets import layouts

pytestmark = pytest.mark.parametrize("flag", ["torch:triton"])


@triton.jit
def _states_kernel(z_ptr, out_ptr, K: tl.constexpr, L: tl.constexpr, W: tl.constexpr, NUM_PIECES: tl.constexpr):
    """[NUM_PIECES, K, L, W] logits: extend over the pieces, fold over lanes, and the last piece once more."""
    offs = tl.arange(0, K * L * W)
    m, s, e = terms.initial_max(L, tl.float32), tl.zeros([L], tl.float32), tl.zeros([L], tl.float32)
    for piece in range(NUM_PIECES):
        z = tl.reshape(tl.load(z_ptr + piece * K * L * W + offs), [K, L, W])
        m, s, e = terms.extend(m, s, e, z, True)
    m, s, e = terms.fold(m, s, e, True)
    tl.store(out_ptr, terms.scalar(terms.row_max(m, s)))
    tl.store(out_ptr + 1, terms.scalar(s))
    tl.store(out_ptr + 2, terms.scalar(e))
    last = tl.load(z_ptr + (NUM_PIECES - 1) * K * L * W + offs)
    m, s, e = terms.extend(m, s, e, tl.reshape(last, [1, 1, K * L * W]), True)
    tl.store(out_ptr + 3, terms.scalar(terms.row_max(m, s)))
    tl.store(out_ptr + 4, terms.scalar(s))
    tl.store(out_ptr + 5, terms.scalar(e))


@triton.jit
def _pair_states_kernel(
    t_ptr, s_ptr, out_ptr, rate, K: tl.constexpr, L: tl.constexpr, W: tl.constexpr, NUM_PIECES: tl.constexpr
):
    offs = tl.arange(0, K * L * W)
    m, zeros = terms.initial_max(L, tl.float32), tl.zeros([L], tl.float32)
    m_t, s_t, a, m_s, s_s = m, zeros, zeros, m, zeros
    for piece in range(NUM_PIECES):
        zt = tl.reshape(tl.load(t_ptr + piece * K * L * W + offs), [K, L, W])
        zs = tl.reshape(tl.load(s_ptr + piece * K * L * W + offs), [K, L, W])
        m_t, s_t, a, m_s, s_s = terms.extend_pairs(m_t, s_t, a, m_s, s_s, zt, zs, rate)
    m_t, s_t, a, m_s, s_s = terms.fold_pairs(m_t, s_t, a, m_s, s_s, rate)
    tl.store(out_ptr + 0, terms.scalar(terms.row_max(m_t, s_t)))
    tl.store(out_ptr + 1, terms.scalar(s_t))
    tl.store(out_ptr + 2, terms.scalar(a))
    tl.store(out_ptr + 3, terms.scalar(terms.row_max(m_s, s_s)))
    tl.store(out_ptr + 4, terms.scalar(s_s))


def _inputs(rng, kind, shape):
    z = rng.standard_normal(shape).astype(np.float32) * 5
    if kind == "some -inf":
        z[rng.random(shape) < 0.5] = -np.inf
    elif kind == "empty pieces":
        z[rng.random(shape[0]) < 0.6] = -np.inf
    elif kind == "all -inf":
        z[:] = -np.inf
    elif kind == "far apart":
        z += np.array([0, 1e4, -1e4, 80, -80], np.float32)[: shape[0], None, None]
    return z


def test_laws_of_combine(flag):
    """extend and fold agree with row_terms for every kind of piece, in every order."""
    rng = np.random.default_rng(0)
    pieces, k, lanes, width = 5, 2, 4, 2
    for kind in ("plain", "some -inf", "empty pieces", "all -inf", "far apart"):
        z = _inputs(rng, kind, (pieces, k * lanes, width))
        for order in itertools.islice(itertools.permutations(range(pieces)), 0, 120, 17):
            out = torch.empty(6)
            _states_kernel[(1,)](torch.from_numpy(z[list(order)].copy()), out, K=k, L=lanes, W=width, NUM_PIECES=pieces)
            wide = z[list(order)].astype(np.float64).reshape(pieces, -1)
            ones = [_one(np, row) for row in wide]
            expected = functools.reduce(lambda a, b: row_terms.combine(np, a, b), ones)
            twice = row_terms.combine(np, expected, ones[-1])
            assert (out[0], out[3]) == (expected.m, twice.m), (kind, order)
            np.testing.assert_allclose(out[[1, 4]], [expected.s, twice.s], rtol=1e-6, err_msg=kind)
            np.testing.assert_allclose(out[[2, 5]], [expected.e, twice.e], rtol=1e-5, atol=1e-6, err_msg=kind)


def _one(xp, row):
    top = np.max(row)
    x = np.where(row == -np.inf, -np.inf, row - (0.0 if top == -np.inf else top))
    e = np.sum(np.where(row == -np.inf, 0, np.exp(x) * np.where(row == -np.inf, 0, x)))
    return row_terms.RowTerms(top, np.sum(np.exp(x)), np.asarray(-np.inf), e=e)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_laws_of_combine_pairs(flag, temperature):
    rng = np.random.default_rng(1)
    pieces, k, lanes, width = 5, 2, 4, 2
    for kinds in itertools.product(("plain", "empty pieces", "far apart", "some -inf"), ("plain", "far apart")):
        zt, zs = (_inputs(rng, kind, (pieces, k * lanes, width)) for kind in kinds)
        zs = np.where(zt == -np.inf, -np.inf, zs).astype(np.float32)
        out = torch.empty(5)
        rate = float(np.log2(np.e) / temperature)
        _pair_states_kernel[(1,)](
            torch.from_numpy(zt), torch.from_numpy(zs), out, rate, K=k, L=lanes, W=width, NUM_PIECES=pieces
        )
        # Maxima and gaps are those of the logits before the temperature.
        out[[0, 2, 3]] /= temperature
        with np.errstate(invalid="ignore"):
            parts = [
                _one_pair(t, s)
                for t, s in zip(*(z.astype(float).reshape(pieces, -1) / temperature for z in (zt, zs)), strict=True)
            ]
            expected = functools.reduce(lambda a, b: row_terms.combine_pairs(np, a, b), parts)
        # `a` is stored in GAP_UNITs.
        out[2] *= row_terms.GAP_UNIT
        expected = expected._replace(a=expected.a * row_terms.GAP_UNIT)
        np.testing.assert_allclose(out, expected, rtol=2e-5, atol=1e-5, err_msg=str(kinds))


def _one_pair(zt, zs):
    m_t, m_s = np.max(zt), np.max(zs)
    e = np.exp(zt - (0.0 if m_t == -np.inf else m_t))
    gap = np.where(e == 0, 0.0, (zt - m_t) - (zs - m_s))
    s_s = np.sum(np.exp(zs - (0.0 if m_s == -np.inf else m_s)))
    return row_terms.PairTerms(*map(np.asarray, (m_t, np.sum(e), np.sum(e * gap) / row_terms.GAP_UNIT, m_s, s_s)))


@triton.jit
def _publishing_kernel(x_ptr, partials_ptr, out_ptr, NUM_PIECES: tl.constexpr, P: tl.constexpr):
    """Publish term 1 of 2 of all pieces, and wait for it and for term 0, which is not published."""
    for piece in range(NUM_PIECES):
        pieces.publish(partials_ptr, 1, tl.load(x_ptr + piece), tl.program_id(0) + piece, NUM_PIECES)
    identity_P = tl.full([P], -7.0, x_ptr.dtype.element_ty)
    tl.store(out_ptr + tl.arange(0, P), pieces.wait_for(partials_ptr, 1, identity_P, NUM_PIECES))
    tl.store(out_ptr + P + tl.arange(0, P), pieces.wait_for(partials_ptr, 0, identity_P, NUM_PIECES))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, torch.int32), (torch.float64, torch.int64)])
def test_published_terms_are_read_back(flag, dtype, bits):
    """Even a NaN with the bits of an unpublished term, for which other programs would wait."""
    x = torch.tensor([1.5, -torch.inf, torch.nan, -0.0, torch.nan], dtype=dtype)
    x.view(bits)[4] = pieces.UNPUBLISHED.value
    partials, out = torch.full((2, 5), pieces.UNPUBLISHED.value, dtype=bits), torch.empty(16, dtype=dtype)
    _publishing_kernel[(1,)](x, partials, out, NUM_PIECES=5, P=8)
    assert (partials[1] != pieces.UNPUBLISHED.value).all()
    assert (partials[0] == pieces.UNPUBLISHED.value).all()
    torch.testing.assert_close(out[:5], x, rtol=0, atol=0, equal_nan=True)
    assert out[8:13].isnan().all()
    assert (out[[*range(5, 8), *range(13, 16)]] == -7.0).all()


@triton.jit
def _tanh_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, terms.tanh(tl.load(x_ptr + offs)))


def test_tanh(flag):
    """Within 4 ulp everywhere, in both dtypes, from 1e-30 to infinity."""
    for dtype in (torch.float32, torch.float64):
        size = torch.logspace(-30, 3, 2047, dtype=torch.float64)
        x = torch.cat([size, -size, torch.tensor([0.0, torch.inf], dtype=torch.float64)]).to(dtype)
        out = torch.empty_like(x)
        _tanh_kernel[(1,)](x, out, N=x.numel())
        expected = np.tanh(x.numpy().astype(np.longdouble))
        error = np.abs(out.numpy() - expected) / np.maximum(np.abs(expected), np.finfo(np.float32).tiny)
        assert np.max(error) <= 4 * torch.finfo(dtype).eps, (dtype, np.max(error))


@triton.jit
def _coefficients_kernel(
    m_ptr, s_ptr, t_ptr, upstream_ptr, out_ptr, num_classes, LABEL_SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, T)
    scale, target, uniform = terms.cross_entropy_coefficients(
        tl.load(m_ptr + offs),
        tl.load(s_ptr + offs),
        tl.load(t_ptr + offs),
        tl.load(upstream_ptr + offs),
        num_classes,
        LABEL_SMOOTHING,
        Z_LOSS,
    )
    tl.store(out_ptr + offs, scale)
    tl.store(out_ptr + T + offs, target)
    tl.store(out_ptr + 2 * T + offs, uniform)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.1, 0.5)])
def test_coefficients_are_those_of_row_terms(flag, smoothing, z_loss, dtype):
    z_TV = torch.randn(8, 11, dtype=dtype) * 3
    m_T = z_TV.amax(-1)
    terms = row_terms.RowTerms(m_T, (z_TV - m_T[:, None]).exp().sum(-1), z_TV[:, 4], z_TV.sum(-1))
    upstream_T, out = torch.randn(8, dtype=dtype), torch.empty(3, 8, dtype=dtype)
    options = {"LABEL_SMOOTHING": smoothing, "Z_LOSS": z_loss}
    _coefficients_kernel[(1,)](terms.m, terms.s, terms.t.contiguous(), upstream_T, out, 11, **options, T=8)
    objective = row_terms.CrossEntropy(11, smoothing, z_loss)
    expected = objective.coefficients(torch, terms, [upstream_T])
    for got, want in zip(out, expected[:3], strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want)


@triton.jit
def _row_start_kernel(out_ptr, row, layout):
    tl.store(out_ptr, memory.row_start((tl.program_id(0) + row).to(tl.int64), layout))


def test_row_start(flag):
    out = torch.empty(1, dtype=torch.int64)
    _row_start_kernel[(1,)](out, 70_000, Layout((), (65_537,), 1))
    assert out.item() == 70_000 * 65_537
    _row_start_kernel[(1,)](out, 70_000, Layout((11, 7), (2**21, 2**22, 2**20), 1))
    i_2, i_1, i_0 = 70_000 % 11, 70_000 // 11 % 7, 70_000 // 77
    assert out.item() == i_0 * 2**20 + i_1 * 2**22 + i_2 * 2**21


@pytest.mark.parametrize("name", layouts())
def test_row_start_of_every_layout(flag, name):
    view = layouts()[name]
    out = torch.empty(1, dtype=torch.int64)
    starts = torch.arange(2 * 3 * 2 * 3 * 3 * 9).as_strided(view.shape, view.stride(), view.storage_offset())[..., 0]
    for row in range(0, starts.numel(), 7):
        _row_start_kernel[(1,)](out, row, layout(view))
        assert out.item() + view.storage_offset() == starts.flatten()[row]
