"""Scenarios of test_triton_interpreter.py; run as a script, with TRITON_INTERPRET=1 in the environment.

Usage: triton_worker.py SCENARIO

Triton decides when it is imported whether it interprets or compiles, hence a process of its own.
"""

import contextlib
import itertools
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig, row_stats
from loss_core.check import check
from loss_core_torch import eager, triton_kernels, triton_launch, triton_linear, triton_set, triton_sizes, values

DTYPES = ("float32", "bfloat16", "float16", "float64")
FLAG = ["torch:triton"]


@contextlib.contextmanager
def patched(module, name, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def tiny_blocks():
    """Blocks of 16 columns and up to three parts, so that small inputs go through every loop and every fold."""
    size = triton_sizes.LaunchParameters(block_v=16, unroll=2, num_warps=1, num_stages=1, split=3)
    return patched(triton_sizes, "launch_parameters", lambda *_: size)


def launched(call):
    """Names of the kernels that a call launches."""
    seen = []
    triton_launch.on_launch.append(seen.append)
    try:
        call()
    finally:
        triton_launch.on_launch.remove(seen.append)
    return set(seen)


def passes(report):
    assert report.passed, "\n".join(map(str, report.failures[:5]))
    assert {row.flag for row in report.rows} == set(FLAG)
    assert not report.skipped


ALL_KERNELS = {
    "cross_entropy_stats_kernel",
    "cross_entropy_grad_kernel",
    "cross_entropy_row_kernel",
    "distillation_stats_kernel",
    "distillation_grad_kernel",
}
FOLDS = {"cross_entropy_fold_kernel", "distillation_fold_kernel"}


def matrix():
    """Every loss, case and dtype, with the sizes that the launcher chooses."""
    assert launched(lambda: passes(check(None, FLAG, dtypes=DTYPES, shape=(5, 67)))) == ALL_KERNELS


def matrix_of_tiny_blocks():
    """The same through many blocks, several parts and several chunks."""
    with tiny_blocks(), patched(triton_linear, "CHUNK_BYTES", 0), patched(triton_linear, "_CHUNK_MULTIPLE", 2):
        run = lambda: passes(check(None, FLAG, dtypes=("float32", "bfloat16"), shape=(4, 67)))  # noqa: E731
        assert launched(run) == ALL_KERNELS | FOLDS


def own_shapes():
    """Cases whose shape is the point of them."""
    only = ("vocab-1", "ragged", "strided", "many-tokens", "minus-inf", "nan-where-ignored", "huge-logits")
    passes(check(None, FLAG, dtypes=("float32",), only=only))
    passes(check(None, FLAG, dtypes=("float32",), num_random=6, only=[f"random-0-{i}" for i in range(6)]))


def large_vocabulary():
    """More than one block of the real sizes, and a row in parts."""

    def run():
        passes(check(["MaskedCrossEntropy", "KDLoss"], FLAG, dtypes=("bfloat16",), shape=(3, 40001), only=("basic",)))
        passes(check(["FusedLinearCrossEntropy"], FLAG, dtypes=("float32",), shape=(3, 40001, 4), only=("basic",)))

    assert launched(run) == ALL_KERNELS | FOLDS


def operands_of_16_bits():
    """The fused loss as on a GPU: its products take 16-bit operands, from a buffer of their own."""
    names = []

    def as_on_a_gpu(dtype, device):
        names.append(dtype)
        return dtype

    # The launch reads its own module, the report that of the set.
    with patched(triton_linear, "operand_dtype", as_on_a_gpu), patched(triton_set, "operand_dtype", as_on_a_gpu):
        passes(check("FusedLinearCrossEntropy", FLAG, dtypes=("bfloat16", "float16"), shape=(5, 67, 8)))
        with patched(triton_linear, "CHUNK_BYTES", 0), patched(triton_linear, "_CHUNK_MULTIPLE", 16):
            passes(check("FusedLinearCrossEntropy", FLAG, dtypes=("bfloat16",), shape=(50, 67, 8), only=("mean",)))
        _small_coefficients()
    assert set(names) == {torch.bfloat16, torch.float16}


def _small_coefficients():
    """A large count divides what float16 has to hold; the gradients must not lose the small probabilities."""
    hidden, weight = (torch.randn(n, 8).to(torch.float16).requires_grad_() for n in (6, 67))
    labels = torch.randint(0, 67, (6,))
    loss = FusedLinearCEConfig().build(backend="torch:triton")(hidden, labels, weight, num_label_tokens=2**20)
    got = torch.autograd.grad(loss, (hidden, weight), torch.tensor(2.0**20))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = torch.autograd.grad(
        torch.nn.functional.cross_entropy(wide[0] @ wide[1].T, labels, reduction="sum"), wide
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=4e-3, atol=2e-3)


@triton.jit
def _states_kernel(z_ptr, m_ptr, s_ptr, K: tl.constexpr, L: tl.constexpr, PIECES: tl.constexpr):
    """[PIECES, K, L] logits: extend over the pieces, fold over lanes; and the pieces one by one."""
    offs = tl.arange(0, K * L)
    m, s = tl.full([L], float("-inf"), tl.float32), tl.zeros([L], tl.float32)
    whole_m, whole_s = tl.full([], float("-inf"), tl.float32), tl.zeros([], tl.float32)
    for piece in range(PIECES):
        z_KL = tl.reshape(tl.load(z_ptr + piece * K * L + offs), [K, L])
        m, s = triton_kernels.extend(m, s, z_KL)
        empty_m, empty_s = tl.full([L], float("-inf"), tl.float32), tl.zeros([L], tl.float32)
        piece_m, piece_s = triton_kernels.extend(empty_m, empty_s, z_KL)
        piece_m, piece_s = triton_kernels.fold(piece_m, piece_s)
        tl.store(m_ptr + 2 + piece, piece_m)
        tl.store(s_ptr + 2 + piece, piece_s)
        whole_m, whole_s = triton_kernels.combine(whole_m, whole_s, piece_m, piece_s)
    row_m, row_s = triton_kernels.fold(m, s)
    tl.store(m_ptr, row_m)
    tl.store(s_ptr, row_s)
    tl.store(m_ptr + 1, whole_m)
    tl.store(s_ptr + 1, whole_s)


@triton.jit
def _kd_states_kernel(t_ptr, s_ptr, out_ptr, K: tl.constexpr, L: tl.constexpr, PIECES: tl.constexpr):
    offs = tl.arange(0, K * L)
    low, none = tl.full([L], float("-inf"), tl.float32), tl.zeros([L], tl.float32)
    m_t, s_t, a, m_s, s_s = low, none, none, low, none
    low_1, none_1 = tl.full([], float("-inf"), tl.float32), tl.zeros([], tl.float32)
    w_m_t, w_s_t, w_a, w_m_s, w_s_s = low_1, none_1, none_1, low_1, none_1
    for piece in range(PIECES):
        zt = tl.reshape(tl.load(t_ptr + piece * K * L + offs), [K, L])
        zs = tl.reshape(tl.load(s_ptr + piece * K * L + offs), [K, L])
        m_t, s_t, a, m_s, s_s = triton_kernels.kd_extend(m_t, s_t, a, m_s, s_s, zt, zs)
        p_m_t, p_s_t, p_a, p_m_s, p_s_s = triton_kernels.kd_extend(low, none, none, low, none, zt, zs)
        p_m_t, p_s_t, p_a, p_m_s, p_s_s = triton_kernels.kd_fold(p_m_t, p_s_t, p_a, p_m_s, p_s_s)
        w_m_t, w_s_t, w_a, w_m_s, w_s_s = triton_kernels.kd_combine(
            w_m_t, w_s_t, w_a, w_m_s, w_s_s, p_m_t, p_s_t, p_a, p_m_s, p_s_s
        )
    m_t, s_t, a, m_s, s_s = triton_kernels.kd_fold(m_t, s_t, a, m_s, s_s)
    tl.store(out_ptr + 0, m_t)
    tl.store(out_ptr + 1, s_t)
    tl.store(out_ptr + 2, a)
    tl.store(out_ptr + 3, m_s)
    tl.store(out_ptr + 4, s_s)
    tl.store(out_ptr + 5, w_m_t)
    tl.store(out_ptr + 6, w_s_t)
    tl.store(out_ptr + 7, w_a)
    tl.store(out_ptr + 8, w_m_s)
    tl.store(out_ptr + 9, w_s_s)


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


def laws():
    """extend, fold and combine agree with row_stats for every kind of piece, in every order."""
    rng = np.random.default_rng(0)
    pieces, k, lanes = 5, 2, 4
    for kind in ("plain", "some -inf", "empty pieces", "all -inf", "far apart"):
        z = _inputs(rng, kind, (pieces, k, lanes))
        for order in itertools.islice(itertools.permutations(range(pieces)), 0, 120, 17):
            shuffled = torch.from_numpy(z[list(order)].copy())
            m, s = torch.empty(2 + pieces), torch.empty(2 + pieces)
            _states_kernel[(1,)](shuffled, m, s, K=k, L=lanes, PIECES=pieces)
            wide = z[list(order)].astype(np.float64).reshape(pieces, -1)
            ones = [_one(np, row) for row in wide]
            expected = ones[0]
            for one in ones[1:]:
                expected = row_stats.combine(np, expected, one)
            for i in (0, 1):
                assert m[i] == expected.m, (kind, order)
                np.testing.assert_allclose(s[i], expected.s, rtol=1e-6, err_msg=kind)
            np.testing.assert_array_equal(m[2:], [one.m for one in ones])
            np.testing.assert_allclose(s[2:], [one.s for one in ones], rtol=1e-6)


def _one(xp, row):
    top = np.max(row)
    with np.errstate(invalid="ignore"):
        return row_stats.RowState(top, np.sum(np.where(row == -np.inf, 0, np.exp(row - top))), np.asarray(-np.inf))


def kd_laws():
    """The same for the state of a distillation."""
    rng = np.random.default_rng(1)
    pieces, k, lanes = 5, 2, 4
    for kinds in itertools.product(("plain", "empty pieces", "far apart", "some -inf"), ("plain", "far apart")):
        zt, zs = (_inputs(rng, kind, (pieces, k, lanes)) for kind in kinds)
        zs = np.where(zt == -np.inf, -np.inf, zs).astype(np.float32)
        out = torch.empty(10)
        _kd_states_kernel[(1,)](torch.from_numpy(zt), torch.from_numpy(zs), out, K=k, L=lanes, PIECES=pieces)
        with np.errstate(invalid="ignore"):
            parts = [
                _one_kd(t, s) for t, s in zip(*(z.astype(float).reshape(pieces, -1) for z in (zt, zs)), strict=True)
            ]
            expected = parts[0]
            for part in parts[1:]:
                expected = row_stats.combine_kd(np, expected, part)
        for got in (out[:5], out[5:]):
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-5, err_msg=str(kinds))


def _one_kd(zt, zs):
    m_t, m_s = np.max(zt), np.max(zs)
    e = np.exp(zt - (0.0 if m_t == -np.inf else m_t))
    gap = np.where(e == 0, 0.0, (zt - m_t) - (zs - m_s))
    s_s = np.sum(np.exp(zs - (0.0 if m_s == -np.inf else m_s)))
    return row_stats.KDRowState(*map(np.asarray, (m_t, np.sum(e), np.sum(e * gap), m_s, s_s)))


@triton.jit
def _tanh_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, triton_kernels.tanh(tl.load(x_ptr + offs)))


def tanh():
    """Within 4 ulp everywhere, in both dtypes, from the smallest numbers to infinity."""
    for dtype in (torch.float32, torch.float64):
        size = torch.logspace(-30, 3, 2047, dtype=torch.float64)
        x = torch.cat([size, -size, torch.tensor([0.0, torch.inf], dtype=torch.float64)]).to(dtype)
        out = torch.empty_like(x)
        _tanh_kernel[(1,)](x, out, N=x.numel())
        expected = np.tanh(x.numpy().astype(np.longdouble))
        error = np.abs(out.numpy() - expected) / np.maximum(np.abs(expected), np.finfo(np.float32).tiny)
        assert np.max(error) <= 4 * torch.finfo(dtype).eps, (dtype, np.max(error))


@triton.jit
def _row_start_kernel(out_ptr, row, num_1, num_2, stride_0, stride_1, stride_2):
    where = triton_kernels.row_start(
        (tl.program_id(0) + row).to(tl.int64), num_1, num_2, stride_0, stride_1, stride_2
    )  # fmt: skip
    tl.store(out_ptr, where)


def offsets():
    """Beyond 2^31 elements: the arithmetic, and a view that really is that far apart."""
    out = torch.empty(1, dtype=torch.int64)
    _row_start_kernel[(1,)](out, 70_000, 1, 1, 65_537, 0, 0)
    assert out.item() == 70_000 * 65_537
    _row_start_kernel[(1,)](out, 70_000, 7, 11, 2**20, 2**22, 2**21)
    i_2, i_1, i_0 = 70_000 % 11, 70_000 // 11 % 7, 70_000 // 77
    assert out.item() == i_0 * 2**20 + i_1 * 2**22 + i_2 * 2**21
    # 4.3 GB, of which the system provides only the pages that are written.
    rows = torch.empty(2**31 + 4096, dtype=torch.bfloat16).as_strided((2, 40), (2**31 + 16, 1))
    columns = torch.empty(2**31 + 4096, dtype=torch.bfloat16).as_strided((2, 40), (16, (2**31 + 16) // 39))
    for far in (rows, columns):
        far.copy_(torch.randn(2, 40))
        labels = torch.tensor([3, 39])
        keep = torch.tensor([True, True])
        got, expected = (kernels.cross_entropy_stats(far, labels, 0) for kernels in (triton_set, eager))
        torch.testing.assert_close(got, expected)
        args = (far, labels, 0, keep, *expected[:2], torch.ones(2))
        torch.testing.assert_close(triton_set.cross_entropy_grad(*args), eager.cross_entropy_grad(*args))


def strides():
    """Views that no reshape can flatten, of one to six dimensions, and inputs without elements."""
    base = torch.randn(2, 3, 2, 3, 4, 9)
    views = [
        base[0, 0, 0, 0, 0],
        base[0, 0, :, :-1, 0],
        base[:, :, 0, 1:, 0, ::2],
        base.transpose(0, 3)[:, 1:, :, ::2, 1:],
        base.permute(5, 3, 1, 0, 2, 4)[::2, :-1],
        base[..., :1].expand(2, 3, 2, 3, 4, 5),
        torch.randn(5, 1).expand(5, 7),
        base[:, :0],
        torch.randn(9, 6).t(),
    ]
    with tiny_blocks():
        for view in views:
            tokens = view[..., 0].numel()
            labels = torch.randint(0, view.shape[-1], (tokens,))
            keep = torch.rand(tokens) < 0.7
            coef = torch.randn(tokens)
            stats, expected = (kernels.cross_entropy_stats(view, labels, 0) for kernels in (triton_set, eager))
            torch.testing.assert_close(stats, expected)
            args = (view, labels, 0, keep, *expected[:2], coef)
            torch.testing.assert_close(triton_set.cross_entropy_grad(*args), eager.cross_entropy_grad(*args))
            teacher = view.flip(0).contiguous() + 0.5
            # Copied: eager cuts both into the same pieces only where both have the same kind of strides.
            plain = view.contiguous()
            state = eager.distillation_stats(plain, teacher, keep, 0.5, 0)
            got = triton_set.distillation_stats(view, teacher, keep, 0.5, 0)
            for a, b in zip(got, state, strict=True):
                torch.testing.assert_close(a[keep], b[keep])
            kl = row_stats.finish_kd(torch, row_stats.KDRowState(*state))
            for of_teacher in (False, True):
                args = (teacher, keep, 0.5, 0, list(state), kl, coef, of_teacher)
                expected = eager.distillation_grad(plain, *args)
                torch.testing.assert_close(triton_set.distillation_grad(view, *args), expected, atol=1e-5, rtol=1e-4)


def labels_and_upstreams_of_any_stride():
    """Labels that are a column of a matrix, and the upstream gradient of a sum, which is one number expanded."""
    labels = torch.arange(24).view(8, 3)[:, 1]
    hidden, weight = torch.randn(8, 5), torch.randn(24, 5)
    logits = hidden @ weight.T
    cases = (
        (MaskedCrossEntropyConfig, (logits,), ()),
        (FusedLinearCEConfig, (hidden,), (weight,)),
    )
    for (make, before, after), reduction in itertools.product(cases, ("sum", "none")):
        results = []
        for kernel in ("triton", "eager"):
            leaves = [x.clone().requires_grad_() for x in (*before, *after)]
            loss = make(reduction=reduction).build(backend=f"torch:{kernel}")(leaves[0], labels, *leaves[1:])
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    args = (hidden, weight, labels, labels >= 0, torch.tensor(0.5).expand(8), 0.0, torch.float32, [True, True], False)
    torch.testing.assert_close(*(kernels.linear_cross_entropy(*args, None) for kernels in (triton_set, eager)))


def one_pass():
    """A reduced loss makes its gradient in the forward; upstream 1 leaves it alone, anything else is rounded once."""
    logits = torch.randn(4, 5, 67).to(torch.bfloat16)[:, :-1].requires_grad_()
    labels = torch.randint(0, 67, (4, 4))
    labels[0] = -100
    loss, reference = (MaskedCrossEntropyConfig().build(backend=f"torch:{kernel}") for kernel in ("triton", "eager"))
    seen = []
    triton_launch.on_launch.append(seen.append)
    value = loss(logits, labels)
    assert seen == ["cross_entropy_row_kernel"]
    for upstream in (0.37, 1.0, -3.0):  # the first takes the buffer, the others compute again
        (got,) = torch.autograd.grad(value, logits, torch.tensor(upstream), retain_graph=True)
        (expected,) = torch.autograd.grad(reference(logits, labels), logits, torch.tensor(upstream))
        # Both are rounded once, from float32 values that differ in their last bits: then by one step at most.
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=0)
        assert (got != expected).double().mean() < 0.01
    seen.clear()
    with torch.no_grad():
        torch.testing.assert_close(loss(logits, labels), value.detach())
    assert seen == ["cross_entropy_stats_kernel"]
    triton_launch.on_launch.remove(seen.append)

    labels_T, keep_T, coef_T = labels.reshape(-1), labels.reshape(-1) >= 0, torch.rand(16)
    with torch.no_grad():
        _, m_T, s_T, grad = triton_set.cross_entropy_with_grad(logits, labels_T, keep_T, coef_T)
        wanted = triton_set.cross_entropy_grad(logits, labels_T, 0, keep_T, m_T, s_T, coef_T * 0.5)
        marked = torch.full_like(grad, 7.0)
        triton_set.cross_entropy_scale_grad(marked, logits, labels_T, keep_T, m_T, s_T, coef_T, torch.tensor(1.0))
        assert bool((marked == 7.0).all()), "an upstream gradient of 1 must cost no pass over memory"
        triton_set.cross_entropy_scale_grad(grad, logits, labels_T, keep_T, m_T, s_T, coef_T, torch.tensor(0.5))
        assert torch.equal(grad, wanted)
    once = torch.autograd.grad(loss(logits, labels), logits, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        once.sum().backward()


def overwritten():
    """inplace_grad: in the backward, bit for bit what the kernels give without it, for any strides and sizes."""
    base = torch.randn(2, 3, 37)
    views = [lambda x: x, lambda x: x[:, :-1], lambda x: x[..., 1::2], lambda x: x.permute(2, 1, 0), lambda x: x[0, 0]]
    for blocks, dtype in ((contextlib.nullcontext, torch.float32), (tiny_blocks, torch.bfloat16)):
        for view, reduction, group in itertools.product(views, ("sum", "mean", "none"), (None, "weights")):
            if (group or view is views[3]) and reduction != "sum":
                continue
            results = []
            for inplace in (False, True):
                whole = base.to(dtype).requires_grad_().clone()
                logits = view(whole)
                labels = torch.arange(logits[..., 0].numel()).view(logits.shape[:-1]) * 5 % logits.shape[-1]
                labels.view(-1)[1::3] = -100
                extras = {}
                if group:
                    extras = {"loss_weights": labels * 0.03 + 0.7, "num_label_tokens": 7}
                config = MaskedCrossEntropyConfig(reduction=reduction, inplace_grad=inplace)
                with blocks():
                    loss = config.build(backend="torch:triton")(logits, labels, **extras)
                    if inplace:
                        assert torch.equal(logits, view(base.to(dtype)))
                    (grad,) = torch.autograd.grad(loss, logits, torch.full_like(loss, 0.37), retain_graph=True)
                    if inplace:
                        assert grad.data_ptr() == logits.data_ptr()
                        assert logits._version > 0
                        with pytest.raises(RuntimeError, match="Second backward"):
                            loss.sum().backward()
                results.append((loss.detach(), grad))
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b), (dtype, reduction, logits.stride(), a - b)
    configs = [MaskedCrossEntropyConfig(reduction=r, inplace_grad=True) for r in ("sum", "none")]
    passes(check(configs, FLAG, dtypes=("float32",), shape=(4, 67), only=("basic", "strided", "minus-inf")))


def skipping():
    """Ignored tokens in the products, out of them by a sync, and by the caller's number; several chunks."""
    chunks = patched(triton_linear, "CHUNK_BYTES", 0), patched(triton_linear, "_CHUNK_MULTIPLE", 2)
    skipped = [FusedLinearCEConfig(reduction=r, skip_ignored=True) for r in ("sum", "none")]
    with chunks[0], chunks[1], patched(values, "may_read", lambda x: False):
        passes(check(["FusedLinearCrossEntropy", *skipped], FLAG, dtypes=("float32",), shape=(5, 67, 8)))
        hidden, weight = torch.randn(9, 8), torch.randn(67, 8)
        hidden[::2] = torch.nan
        labels = torch.arange(9) * 7
        labels[::2] = -100
        for reduction, right in itertools.product(("mean", "none"), (True, False)):
            config = FusedLinearCEConfig(reduction=reduction)
            results = []
            for number in (None, 4 if right else 5):
                h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
                loss = config.build(backend="torch:triton")(h, labels, w, num_valid_tokens=number)
                # The upstream gradient of a sum is one number, expanded.
                results.append((loss.detach(), *torch.autograd.grad(loss.sum(), (h, w))))
            if right:
                torch.testing.assert_close(*results)
            else:
                assert all(bool(x.isnan().any()) for x in results[1])


def no_vocabulary():
    """A rank that owns no class: the state of an empty piece, gradients without elements, no launch."""
    logits, labels, keep = torch.randn(2, 3, 0), torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.bool)
    low, none = torch.full((6,), -torch.inf), torch.zeros(6)

    def run():
        torch.testing.assert_close(triton_set.cross_entropy_stats(logits, labels, 0), (low, none, low))
        assert triton_set.cross_entropy_grad(logits, labels, 0, keep, none, none, none).shape == logits.shape
        state = triton_set.distillation_stats(logits, logits, keep, 1.0, 0)
        torch.testing.assert_close(state, (low, none, none, low, none))
        args = (logits, logits, keep, 1.0, 0, list(state), none, none, False)
        assert triton_set.distillation_grad(*args).shape == logits.shape

    assert launched(run) == set()


def compiled():
    """torch.compile calls the launches as they are, without a break in the graph."""
    logits = torch.randn(3, 4, 37)
    labels = torch.randint(0, 37, (3, 4))
    for config, args in ((MaskedCrossEntropyConfig(), (logits,)), (KDLossConfig(), (logits, logits.flip(0)))):
        loss = config.build(backend="torch:triton")
        eager_loss = config.build(backend="torch:eager")
        results = []
        for function in (torch.compile(loss, fullgraph=True, backend="aot_eager"), eager_loss):
            leaf = args[0].clone().requires_grad_()
            value = function(leaf, *args[1:], labels)
            value.backward()
            results.append((value.detach(), leaf.grad))
        torch.testing.assert_close(*results)


@triton.jit
def _padding_of_zeros(row_ptr, offs_v, mask_v, stride_v, dtype: tl.constexpr, EVICT: tl.constexpr):
    return tl.load(row_ptr + offs_v.to(tl.int64) * stride_v, mask=mask_v, other=0.0).to(dtype)


@triton.jit
def _combine_without_rescaling(m, s, new_m):
    return s


def _one_part_too_few(num_rows, vocab, dtype, kind):
    size, part, parts = _parts(num_rows, vocab, dtype, kind)
    return size, part, max(parts - 1, 1)


def _rows_of_a_matrix(x):
    return 1, 1, x.stride(-2), 0, 0, x.stride(-1)


_parts = triton_launch._parts


def injected_bugs():
    """The check goes red for bugs made on purpose, and green again without them."""
    bugs = [
        (triton_kernels, "load_logits", _padding_of_zeros, "ragged"),
        (triton_kernels, "moved", _combine_without_rescaling, "basic"),
        (triton_launch, "_parts", _one_part_too_few, "basic"),
        (triton_launch, "_rows", _rows_of_a_matrix, "strided"),
        (triton_set, "cross_entropy_scale_grad", lambda *_: None, "basic"),
    ]
    for module, name, wrong, case in bugs:
        losses = ["MaskedCrossEntropy"] if name != "load_logits" else ["MaskedCrossEntropy", "KDLoss"]
        # A case at a given shape has one leading dimension: too few to be mistaken in.
        shape = None if case == "strided" else (4, 67)
        for loss in losses:
            with tiny_blocks():
                with patched(module, name, wrong):
                    report = check(loss, FLAG, dtypes=("float32",), shape=shape, only=(case,))
                    assert not report.passed, (loss, name)
                    assert not any(finding.problem for finding in report.failures), report.failures[0]
                passes(check(loss, FLAG, dtypes=("float32",), shape=shape, only=(case,)))


def refuses_without_a_gpu():
    """A launch that is not interpreted says so, and what to use, for tensors on the CPU."""
    with patched(triton_launch, "_INTERPRETED", False), pytest.raises(ImportError, match="Use 'torch:eager'"):
        MaskedCrossEntropyConfig().build(backend="torch:triton")(torch.randn(2, 3), torch.tensor([0, 1]))


def auto_stays_eager():
    # Nothing was measured for Triton, so that the table does not name it; `bench --tune` may.
    choice = MaskedCrossEntropyConfig().build().kernel_choice
    assert choice.flag == "torch:eager"
    assert {"eager", "triton"} <= set(choice.candidates)


SCENARIOS = (
    matrix, matrix_of_tiny_blocks, own_shapes, large_vocabulary, operands_of_16_bits, laws, kd_laws, tanh, offsets,
    strides, labels_and_upstreams_of_any_stride, one_pass, overwritten, skipping, no_vocabulary, compiled,
    injected_bugs, refuses_without_a_gpu, auto_stays_eager,
)  # fmt: skip


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    next(scenario for scenario in SCENARIOS if scenario.__name__ == sys.argv[1])()
    print("held:", sys.argv[1])


if __name__ == "__main__":
    main()
