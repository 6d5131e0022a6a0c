"""The fused loss with eager and Triton kernels, the latter in Triton's interpreter, against float64."""

import pytest
import torch

from helpers.largest_tensor import LargestTensor
from loss_core.row_terms import CrossEntropy, Sums, TopK
from loss_core_torch import operators
from loss_core_torch.kernels import HeadOperands, Linear, Wanted
from loss_core_torch.kernels.eager import EagerKernels
from loss_core_torch.kernels.eager.sizes import Sizes
from loss_core_torch.kernels.gpu import GpuKernels
from loss_core_torch.kernels.gpu.launch import Launcher, launch
from loss_core_torch.kernels.terms import mask_coefficients
from on_torch.kernels.gpu.sets import SETS as TRITON
from on_torch.kernels.gpu.sets import V, counted, tiny_chunks, tiny_tiles

SETS = TRITON | {
    "eager": EagerKernels(),
    # Two products per tile, three tokens per block, one row per block of rows.
    "eager-tiny": EagerKernels(
        Sizes(elements_cpu=V, logits_bytes_cpu=0, min_tokens=3, max_tokens=3, tile_columns_cpu=20)
    ),
}
each_set = pytest.mark.parametrize(
    ("flag", "name"),
    [("torch:triton", name) for name in TRITON] + [("torch:eager", "eager"), ("torch:eager", "eager-tiny")],
)
triton = pytest.mark.parametrize("flag", ["torch:triton"])
H = 8
BOTH, OBJECTIVE = Wanted(True, True), CrossEntropy(V)


def _linear(num_tokens=5, dtype=torch.float32, softcap=0.0, scale=1.0):
    h, w = (torch.randn(num_tokens, H) * scale).to(dtype), torch.randn(V, H).to(dtype)
    return Linear(HeadOperands(h, w, dtype), torch.randint(0, V, (num_tokens,)), softcap=softcap)


def _with(linear, **operands):
    """The same `Linear` with other operands of its head."""
    return linear._replace(head=linear.head._replace(**operands))


def _expected(linear, coef_T):
    """Loss of each token, and the gradients of the sum of coef * loss, in float64."""
    h, w = (x.detach().clone().double().requires_grad_() for x in (linear.head.h_TH, linear.head.w_VH))
    z_TV = h @ w.T
    if linear.softcap:
        z_TV = linear.softcap * torch.tanh(z_TV / linear.softcap)
    loss_T = torch.nn.functional.cross_entropy(z_TV, linear.labels_T, reduction="none")
    return loss_T.detach(), *torch.autograd.grad(loss_T @ coef_T.double(), (h, w))


def _all_ways(kernels, linear, coef_T, smoothing=0.0):
    """Terms and gradients in one pass; and in two, with logits recomputed and kept."""
    objective = CrossEntropy(V, smoothing)
    terms, grads = operators.linear_terms_and_grads(kernels, linear, coef_T, objective, BOTH)
    yield terms, *grads[:2]
    for keep_logits in (False, True):
        terms, logits = operators.linear_terms(kernels, linear, objective.sums, keep_logits)
        coefficients = _coefficients(terms, coef_T, objective)
        yield terms, *operators.linear_grads(kernels, linear, terms, coefficients, BOTH, logits)[:2]


def _coefficients(terms, coef_T, objective=OBJECTIVE):
    # As in the autograd function: 0 for ignored tokens.
    return mask_coefficients(objective.coefficients(torch, terms, [coef_T]), coef_T != 0)


@each_set
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_loss_and_gradients(flag, name, softcap, dtype):
    linear = _linear(dtype=dtype, softcap=softcap)
    coef_T = torch.randn(5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    loss_T, *grads = _expected(linear, coef_T)
    # The gradient of the weight is in the dtype of the arithmetic in one pass, in its own dtype in two.
    all_ways = zip(_all_ways(SETS[name], linear, coef_T), (coef_T.dtype, dtype, dtype), strict=True)
    for (terms, *found), weight_dtype in all_ways:
        tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(CrossEntropy(V).values(torch, terms)[0].double(), loss_T, **tolerance)
        assert [got.dtype for got in found] == [coef_T.dtype, weight_dtype]
        for got, expected in zip(found, grads, strict=True):
            if got.dtype == torch.bfloat16:
                tolerance = {"rtol": 2**-8, "atol": 1e-5}
            torch.testing.assert_close(got.double(), expected, **tolerance)


@each_set
def test_the_sum_of_all_logits(flag, name):
    linear = _linear(softcap=2.0)
    expected = (2.0 * torch.tanh(linear.head.h_TH @ linear.head.w_VH.T / 2.0)).sum(-1)
    for terms, *_ in _all_ways(SETS[name], linear, torch.ones(5), smoothing=0.1):
        torch.testing.assert_close(terms.z_sum, expected, rtol=1e-4, atol=1e-4)


@each_set
def test_a_bias(flag, name):
    linear, coef_T = _with(_linear(softcap=2.0), bias_V=torch.randn(V)), torch.randn(5)
    h, w, b = (x.double().requires_grad_() for x in (linear.head.h_TH, linear.head.w_VH, linear.head.bias_V))
    z_TV = 2.0 * torch.tanh((h @ w.T + b) / 2.0)
    loss_T = torch.nn.functional.cross_entropy(z_TV, linear.labels_T, reduction="none")
    expected = torch.autograd.grad(loss_T @ coef_T.double(), (h, w, b))
    every = Wanted(True, True, True)
    terms, in_one_pass = operators.linear_terms_and_grads(SETS[name], linear, coef_T, OBJECTIVE, every)
    coefficients = _coefficients(terms, coef_T)
    in_two_passes = operators.linear_grads(SETS[name], linear, terms, coefficients, every, torch.empty(0))
    for found in (in_one_pass, in_two_passes):
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@each_set
def test_shards_of_the_vocabulary(flag, name):
    full, coef_T = _linear(), torch.randn(5)
    _, grad_h, grad_w = _expected(full, coef_T)
    terms, _ = operators.linear_terms(SETS[name], full, Sums(), False)
    w_VH = full.head.w_VH
    shards = _with(full, w_VH=w_VH[:20]), _with(full, w_VH=w_VH[20:])._replace(vocab_start=20)
    coefficients, no_logits = _coefficients(terms, coef_T), torch.empty(0)
    found = [operators.linear_grads(SETS[name], x, terms, coefficients, BOTH, no_logits) for x in shards]
    torch.testing.assert_close((found[0][0] + found[1][0]).double(), grad_h, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([found[0][1], found[1][1]]).double(), grad_w, rtol=1e-4, atol=1e-5)


@each_set
def test_a_coefficient_of_zero_gives_exact_zeros(flag, name):
    """Ignored tokens are zero rows with coefficient 0; with no valid token, the weight may hold anything."""
    linear, coef_T = _linear(), torch.tensor([1.0, 0.0, 0.0, 2.0, 0.0])
    linear.head.h_TH[1] = 0.0
    for _, grad_h, _ in _all_ways(SETS[name], linear, coef_T):
        assert not grad_h[coef_T == 0].any()
    linear.head.h_TH.zero_()
    linear.head.w_VH[3] = torch.inf
    for _, grad_h, grad_w in _all_ways(SETS[name], linear, torch.zeros(5)):
        assert not grad_w.any()
        assert grad_h.shape == linear.head.h_TH.shape


@each_set
def test_a_coefficient_of_zero_gives_exact_zeros_in_top_k_distillation(flag, name):
    linear, teacher = _linear(), TopK(torch.full((5, 3), -2.0), tail=True)
    linear = linear._replace(labels_T=torch.arange(3).expand(5, 3).contiguous())
    linear.head.h_TH.zero_()
    for row in (1, 4):  # a target, and another class
        linear.head.w_VH[row] = torch.inf
    _, grads = operators.linear_terms_and_grads(SETS[name], linear, torch.zeros(5), teacher, BOTH)
    assert not grads.weight_VH.any()


@each_set
@pytest.mark.parametrize("want", [Wanted(True, False), Wanted(False, True)], ids=["hidden", "weight"])
def test_gradients_that_are_not_wanted_are_empty(flag, name, want):
    linear, coef_T = _linear(), torch.randn(5)
    expected = _expected(linear, coef_T)[1:]
    terms, found = operators.linear_terms_and_grads(SETS[name], linear, coef_T, OBJECTIVE, want)
    recomputed = operators.linear_grads(SETS[name], linear, terms, _coefficients(terms, coef_T), want, torch.empty(0))
    for grads in (found, recomputed):
        assert grads.bias_V.numel() == 0
        for got, right, is_wanted in zip(grads[:2], expected, want[:2], strict=True):
            if is_wanted:
                torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-5)
            else:
                assert got.numel() == 0


@triton
def test_logits_are_kept_only_if_one_chunk_holds_them(flag):
    for name, kept in (("own-sizes", True), ("tiny-blocks", False), ("eager", True), ("eager-tiny", False)):
        _, logits = operators.linear_terms(SETS[name], _linear(), Sums(), True)
        assert bool(logits.numel()) == kept
        assert operators.linear_terms(SETS[name], _linear(), Sums(), False)[1].numel() == 0


@triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_block_tokens_limits_logits_and_their_gradient(flag, dtype):
    # Operands as on a GPU, so that a 16-bit gradient has separate memory. Two rows of logits are as large as the
    # weight's gradient.
    rows = []

    def start_and_count(kernel, grid, *args, **options):
        rows.append(grid[0])
        launch(kernel, grid, *args, **options)

    kernels = GpuKernels(Launcher(launch=start_and_count, operand_dtype=lambda product_dtype, _: product_dtype))
    h_TH, w_VH, coef_T = torch.randn(10, 2).to(dtype), torch.randn(V, 2).to(dtype), torch.randn(10)
    linear = Linear(HeadOperands(h_TH, w_VH, dtype), torch.randint(0, V, (10,)), block_tokens=2)
    _, *grads = _expected(linear, coef_T)
    ways = _all_ways(kernels, linear, coef_T)
    for _ in range(3):
        with LargestTensor() as seen:
            _, *found = next(ways)
        assert 0 < seen.numel <= 2 * V
        for got, expected in zip(found, grads, strict=True):
            step = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(got.double(), expected, rtol=step, atol=step * expected.abs().max().item())
    assert max(rows) == 2


@triton
def test_operands_of_16_bits_and_small_coefficients(flag):
    """As on a GPU. Small coefficients, as of a mean over many tokens, must not make float16 operands underflow."""
    for dtype in (torch.bfloat16, torch.float16):
        kernels, _ = counted(operand_dtype=lambda product_dtype, _: product_dtype, chunks=tiny_chunks, tiles=tiny_tiles)
        narrow, coef_T = _linear(dtype=dtype, scale=0.5), torch.full((5,), 2.0**-20)
        _, *grads = _expected(narrow, coef_T)
        step = torch.finfo(dtype).eps
        for linear in (narrow, _with(narrow, w_VH=narrow.head.w_VH.float())):
            for _, *found in _all_ways(kernels, linear, coef_T):
                for got, expected in zip(found, grads, strict=True):
                    # Rounding of a gradient to float16, which is coarse near 0.
                    coarse = 2.0**-25 if got.dtype == torch.float16 else 0.0
                    tolerance = {"rtol": 4 * step, "atol": 2 * step * 2.0**-20 + coarse}
                    torch.testing.assert_close(got.double(), expected, **tolerance)


@triton
def test_small_probabilities_in_float16(flag):
    """On a GPU, a weight's gradient of 1e-5 was off by 5e-7: in float16, values below 6e-5 have fewer bits."""
    kernels, _ = counted(operand_dtype=lambda product_dtype, _: product_dtype)
    torch.manual_seed(0)
    linear, coef_T = _linear(dtype=torch.float16, scale=4.0), torch.full((5,), 3.0)
    # A float32 weight, so that its gradient is not rounded to float16.
    linear = _with(linear, w_VH=linear.head.w_VH.float())
    *_, grad_w = _expected(linear, coef_T)
    size_V = grad_w.abs().amax(-1)
    small = (size_V > 1e-6) & (size_V < 1e-4)
    assert small.any()
    for *_, got_w in _all_ways(kernels, linear, coef_T):
        error = (got_w.double() - grad_w)[small].norm(dim=-1) / grad_w[small].norm(dim=-1)
        assert error.max() < 2**-9


@triton
def test_a_gradient_larger_than_its_coefficient_fits_float16(flag):
    """z_loss makes it larger by 1 + 2 z_loss lse; the largest float16 is 65,504."""
    kernels, _ = counted(operand_dtype=lambda product_dtype, _: product_dtype)
    linear, coef_T = _linear(dtype=torch.float16, scale=4.0), torch.ones(5)
    objective = CrossEntropy(V, z_loss=1000.0)
    h, w = (x.double().requires_grad_() for x in (linear.head.h_TH, linear.head.w_VH))
    lse_T = (h @ w.T).logsumexp(-1)
    expected = torch.autograd.grad((lse_T + 1000.0 * lse_T.square()).sum(), (h, w))
    _, grads = operators.linear_terms_and_grads(kernels, linear, coef_T, objective, BOTH)
    for got, wanted in zip(grads, expected, strict=False):
        assert (got.double() - wanted).norm() < 2**-9 * wanted.norm()


@triton
def test_scaled_is_rounded_once(flag):
    grad, factor = torch.randn(3, 1000), torch.tensor(1 / 3)
    for kernels in SETS.values():
        for dtype in (torch.bfloat16, torch.float32):
            assert torch.equal(kernels.scaled(grad.clone(), factor, dtype), (grad * factor).to(dtype))
            # A gradient that is not wanted.
            assert kernels.scaled(grad.new_empty(0), factor, dtype).shape == (0,)


@triton
def test_blocks_may_use_the_memory_that_rounding_needs_later(flag):
    """Only if the gradient of the weight is wanted, and rounded."""
    rounded_bytes = []

    def chunks(sizes):
        rounded_bytes.append(sizes.rounded_bytes)
        return tiny_chunks(sizes)

    kernels, _ = counted(chunks=chunks)
    narrow = _linear(dtype=torch.bfloat16)
    wide = _with(narrow, w_VH=narrow.head.w_VH.float())
    for linear, want in ((narrow, BOTH), (narrow, Wanted(True, False)), (wide, BOTH)):
        operators.linear_terms_and_grads(kernels, linear, torch.ones(5), OBJECTIVE, want)
    assert rounded_bytes == [V * H * 2, 0, 0]


@triton
def test_no_tokens_and_no_vocabulary(flag):
    for linear in (_linear(0), _with(_linear(), w_VH=torch.empty(0, H))):
        num_tokens = len(linear.head.h_TH)
        for terms, grad_h, grad_w in _all_ways(SETS["own-sizes"], linear, torch.ones(num_tokens)):
            assert terms.m.shape == (num_tokens,)
            assert torch.equal(grad_h, torch.zeros(num_tokens, H))
            assert torch.equal(grad_w, torch.zeros(linear.head.w_VH.shape))


@triton
def test_products_are_full_float32_for_any_matmul_precision(flag):
    linear, coef_T = _linear(), torch.randn(5)
    expected = list(_all_ways(SETS["own-sizes"], linear, coef_T))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = list(_all_ways(SETS["own-sizes"], linear, coef_T))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for want, got in zip(expected, found, strict=True):
        assert torch.equal(want[1], got[1])
        assert torch.equal(want[2], got[2])


@triton
def test_products_into_16_bits_accumulate_in_float32(flag):
    """Otherwise a split product into bfloat16 of the vendor's library would be summed in bfloat16."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    seen = []

    def start_and_look(kernel, *args, **options):
        seen.extend(getattr(matmul, name) for name in names)
        launch(kernel, *args, **options)

    kernels, linear = GpuKernels(Launcher(launch=start_and_look)), _linear(dtype=torch.bfloat16)
    terms, _ = operators.linear_terms(kernels, linear, Sums(), False)
    seen.clear()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        operators.linear_grads(kernels, linear, terms, _coefficients(terms, torch.ones(5)), BOTH, torch.empty(0))
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen
    assert not any(seen)
    assert all(getattr(matmul, name) for name in names)
