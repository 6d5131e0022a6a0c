"""Logits of a block, made tile by tile and turned into their gradient: either library of products, any tiles."""

import pytest
import torch

from loss_core.row_terms import CrossEntropy, LogProbability, Sums
from loss_core_torch.kernels.eager.block_logits import BlockLogits, BlockRows, Tiles
from loss_core_torch.kernels.eager.products import Products
from loss_core_torch.kernels.eager.sizes import Sizes

# B = 5 tokens; three tiles of 16 classes, the last one of 5.
B, H, V = 5, 7, 2 * 16 + 5
SIZES = Sizes(tile_columns_cpu=16)


def _block(by_onednn, softcap, dtype=torch.float32, temperature=None):
    torch.manual_seed(0)
    h_BH, w_VH = torch.randn(B, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    # The last belongs to another rank.
    labels_B = torch.tensor([0, 16, 15, V - 1, V + 3])
    tiles = Tiles(w_VH, dtype, SIZES)
    tiles.products = Products(dtype, h_BH.device, by_onednn)
    inverse_B = None if temperature is None else 1.0 / torch.linspace(0.5, temperature, B, dtype=dtype)
    rows = BlockRows(labels_B, 0, inverse_B)
    logits = BlockLogits(torch.full((B * V,), torch.nan, dtype=dtype), rows, tiles, softcap)
    return logits, h_BH, w_VH, rows


def _exact(h_BH, w_VH, rows, softcap, upstream_B, upstream_e_B):
    """Logits; and the gradient by h and w of upstream * cross entropy + upstream_e * entropy, in float64."""
    h, w = (x.double().clone().requires_grad_() for x in (h_BH, w_VH))
    z = h @ w.t()
    z = softcap * torch.tanh(z / softcap) if softcap else z
    z = z if rows.inverse_temperature_B is None else z * rows.inverse_temperature_B.double()[:, None]
    owned_B = rows.labels_B < V
    t_B = torch.where(owned_B, z.gather(1, torch.where(owned_B, rows.labels_B, 0)[:, None])[:, 0], 0.0)
    log_p = z.log_softmax(-1)
    loss = (z.logsumexp(-1) - t_B) @ upstream_B.double() - (log_p.exp() * log_p).sum(-1) @ upstream_e_B.double()
    return z.detach(), t_B.detach(), *torch.autograd.grad(loss, (h, w))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("temperature", [None, 2.0])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_terms_and_gradients_are_those_of_float64(by_onednn, softcap, temperature, with_entropy):
    logits, h_BH, w_VH, rows = _block(by_onednn, softcap, temperature=temperature)
    upstream_B, upstream_e_B = torch.linspace(-1.0, 2.0, B), torch.linspace(1.0, 0.5, B) * with_entropy
    z_BV, t_B, grad_h, grad_w = _exact(h_BH, w_VH, rows, softcap, upstream_B, upstream_e_B)
    terms = logits.fill(h_BH, Sums(z_sum=True, e=with_entropy))
    torch.testing.assert_close(terms.m.double(), z_BV.amax(-1), rtol=1e-5, atol=1e-5)
    assert terms.t[-1] == -torch.inf
    torch.testing.assert_close(terms.t[:-1].double(), t_B[:-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms.z_sum.double(), z_BV.sum(-1), rtol=1e-4, atol=1e-3)
    x_BV = z_BV - z_BV.amax(-1, keepdim=True)
    torch.testing.assert_close(terms.s.double(), x_BV.exp().sum(-1), rtol=1e-4, atol=0)
    if with_entropy:
        torch.testing.assert_close(terms.e.double(), (x_BV.exp() * x_BV).sum(-1), rtol=1e-4, atol=1e-5)
    coefficients = LogProbability(with_entropy).coefficients(torch, terms, [-upstream_B, upstream_e_B])
    logits.to_gradient(terms, coefficients)
    # Both are sums to which a block adds; the weight's is written by the first.
    gh_BH, gw_VH = torch.zeros(B, H), torch.full((V, H), torch.nan)
    logits.add_gradients(gh_BH, gw_VH, None, h_BH, first=True, last=True)
    torch.testing.assert_close(gh_BH.double(), grad_h, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gw_VH.double(), grad_w, rtol=1e-4, atol=1e-4)


def test_two_blocks_add_up():
    logits, h_BH, w_VH, rows = _block(False, 0.0, torch.float64)
    ones_B = torch.ones(B, dtype=torch.float64)
    grad_w = _exact(h_BH, w_VH, rows, 0.0, ones_B, 0.0 * ones_B)[3]
    gw_VH = torch.full((V, H), torch.nan, dtype=torch.float64)
    for first in (True, False):
        terms = logits.fill(h_BH, Sums())
        logits.to_gradient(terms, CrossEntropy(V).coefficients(torch, terms, [ones_B]))
        logits.add_gradients(None, gw_VH, None, h_BH, first=first, last=not first)
    torch.testing.assert_close(gw_VH, 2 * grad_w, rtol=1e-10, atol=1e-12)


def test_a_tile_is_rounded_to_the_dtype_of_the_products():
    w_VH = torch.randn(V, H)
    tiles = Tiles(w_VH, torch.bfloat16, SIZES)
    assert torch.equal(torch.cat([w_CH for _, w_CH in tiles]), w_VH.bfloat16().float())
    assert [tile.stop - tile.start for tile in tiles.slices()] == [16, 16, 5]
