"""Logits of a head, and its gradients summed over blocks, with MKL and oneDNN and any tiles."""

import pytest
import torch

from helpers.operations import Operations
from loss_core_torch.kernels import HeadOperands, Wanted
from loss_core_torch.kernels.eager import EagerKernels
from loss_core_torch.kernels.eager.products import Products
from loss_core_torch.kernels.heads import Head, HeadGrads, slices

# Three products: two of 16 classes, one of 5.
T, H, V = 10, 7, 2 * 16 + 5
ALL = Wanted(True, True, True)


class _ByLibrary(EagerKernels):
    def __init__(self, by_onednn):
        super().__init__()
        self._by_onednn = by_onednn

    def products(self, operand_dtype, device):
        return Products(operand_dtype, device, self._by_onednn, columns=16)


@pytest.fixture
def kernels(by_onednn):
    """Eager kernels with products of MKL or of oneDNN."""
    return _ByLibrary(by_onednn)


def _problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    h_TH, w_VH, b_V, e_TV = (torch.randn(shape, generator=generator) for shape in ((T, H), (V, H), (V,), (T, V)))
    return h_TH.to(dtype), w_VH.to(dtype), b_V.to(dtype), e_TV


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["float32", "bfloat16", "float64"]
)
def test_logits_of_some_tokens(kernels, dtype):
    h_TH, w_VH, b_V, _ = _problem(dtype)
    head = Head(kernels, HeadOperands(h_TH, w_VH, dtype, b_V))
    z_BV = torch.full((4, V), torch.nan, dtype=head.dtype)
    head.compute_logits(slice(3, 7), z_BV)
    expected = h_TH[3:7].double() @ w_VH.double().t() + b_V.double()
    torch.testing.assert_close(z_BV.double(), expected, rtol=1e-5, atol=1e-5)
    assert [tile.stop - tile.start for tile, _ in head.tiles()] == [16, 16, 5]


def test_operands_are_rounded_to_the_dtype_of_the_products():
    h_TH, w_VH, *_ = _problem()
    head = Head(_ByLibrary(False), HeadOperands(h_TH, w_VH, torch.bfloat16))
    assert torch.equal(torch.cat([w_CH for _, w_CH in head.tiles()]), w_VH.bfloat16().float())
    assert torch.equal(head.h_TH, h_TH.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [T, 4])
@pytest.mark.parametrize("classes", [V, 20])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("factor", [None, 0.25])
def test_gradients_sum_over_blocks(kernels, dtype, tokens, classes, rounded, factor):
    h_TH, w_VH, b_V, e_TV = _problem(dtype)
    head = Head(kernels, HeadOperands(h_TH, w_VH, dtype, b_V))
    factor_0d = None if factor is None else torch.tensor(factor)
    grads = HeadGrads(kernels, head, ALL, rounded=rounded, all_tokens=tokens == T, factor=factor_0d)
    for tile in slices(0, V, classes):
        for block_tokens in slices(0, T, tokens):
            grads.add(head.slice_classes(tile), tile, block_tokens, e_TV[block_tokens, tile])
    e, scale = e_TV.double(), factor or 1.0
    expected = (e @ w_VH.double() * scale, e.t() @ h_TH.double() * scale, e.sum(0) * scale)
    results = grads.result()
    result_dtype = dtype if rounded else torch.float32
    assert [x.dtype for x in results] == [torch.float32, result_dtype, result_dtype]
    for got, wanted in zip(results, expected, strict=True):
        step = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got.double(), wanted, rtol=8 * step, atol=8 * torch.finfo(torch.float32).eps * 8)


def test_tiles_are_converted_once_each_and_hidden_states_once():
    h_TH, w_VH, _, e_TV = _problem(torch.bfloat16)
    all_tokens = slice(0, T)
    with Operations() as seen:
        head = Head(EagerKernels(), HeadOperands(h_TH, w_VH, torch.bfloat16))
        grads = HeadGrads(EagerKernels(), head, ALL)
        for tile in slices(0, V, 20):
            tile_head = head.slice_classes(tile)
            tile_head.compute_logits(all_tokens, torch.empty(T, tile.stop - tile.start))
            grads.add(tile_head, tile, all_tokens, e_TV[:, tile])
    assert sorted(seen.shapes("aten::_to_copy")) == [(T, H), (V - 20, H), (20, H)]


@pytest.mark.parametrize("want", [Wanted(True, False), Wanted(False, True), Wanted(False, False, True)])
def test_gradients_that_are_not_wanted_are_empty(kernels, want):
    h_TH, w_VH, b_V, e_TV = _problem()
    head = Head(kernels, HeadOperands(h_TH, w_VH, torch.float32, b_V))
    grads = HeadGrads(kernels, head, want)
    grads.add(head, slice(0, V), slice(0, T), e_TV)
    assert [x.numel() > 0 for x in grads.result()] == list(want)


@pytest.mark.parametrize(("tokens", "vocab"), [(0, V), (T, 0)])
def test_without_tokens_or_classes_gradients_are_zero(tokens, vocab):
    h_TH, w_VH, b_V, e_TV = _problem()
    head = Head(EagerKernels(), HeadOperands(h_TH[:tokens], w_VH[:vocab], torch.float32, b_V[:vocab]))
    grads = HeadGrads(EagerKernels(), head, ALL, rounded=True, all_tokens=True)
    grads.add(head, slice(0, vocab), slice(0, tokens), e_TV[:tokens, :vocab])
    grad_h, grad_w, grad_b = grads.result()
    assert grad_h.equal(torch.zeros(tokens, H))
    assert grad_w.equal(torch.zeros(vocab, H))
    assert grad_b.equal(torch.zeros(vocab))
