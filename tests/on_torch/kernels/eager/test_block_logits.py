"""Logits of a block, made tile by tile and turned into their gradient: either library of products, any tiles."""

import pytest
import torch

from loss_core.row_terms import Objective
from loss_core_torch import compat
from loss_core_torch.kernels import Linear
from loss_core_torch.kernels.eager.block_logits import BlockLogits, Tiles
from loss_core_torch.kernels.eager.products import Products
from loss_core_torch.kernels.eager.sizes import Sizes

# B = 5 tokens; three tiles of 16 classes, the last one of 5.
B, H, V = 5, 7, 2 * 16 + 5
SIZES = Sizes(tile_columns_cpu=16)

LIBRARIES = [
    pytest.param(False, id="mkl"),
    pytest.param(
        True,
        id="onednn",
        marks=pytest.mark.skipif(compat.onednn_operator() is None, reason="this PyTorch has no oneDNN"),
    ),
]


def _block(by_onednn, softcap, dtype=torch.float32):
    torch.manual_seed(0)
    h_BH, w_VH = torch.randn(B, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    # The last belongs to another rank.
    labels_B = torch.tensor([0, 16, 15, V - 1, V + 3])
    tiles = Tiles(Linear(h_BH, w_VH, labels_B, 0, softcap, dtype, Objective(V)), dtype, SIZES)
    tiles.products = Products(dtype, h_BH.device, by_onednn)
    logits = BlockLogits(torch.full((B * V,), torch.nan, dtype=dtype), labels_B, tiles, softcap)
    return logits, h_BH, w_VH, labels_B


def _exact(h_BH, w_VH, labels_B, softcap):
    """Logits, and the gradient of each token's loss by h and of their sum by w, in float64."""
    h, w = (x.double().clone().requires_grad_() for x in (h_BH, w_VH))
    z = h @ w.t()
    z = softcap * torch.tanh(z / softcap) if softcap else z
    owned_B = labels_B < V
    t_B = torch.where(owned_B, z.gather(1, torch.where(owned_B, labels_B, 0)[:, None])[:, 0], 0.0)
    grads = torch.autograd.grad((z.logsumexp(-1) - t_B).sum(), (h, w))
    return z.detach(), t_B.detach(), *grads


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("by_onednn", LIBRARIES)
@pytest.mark.parametrize("with_sum", [True, False])
def test_terms_and_gradients_are_those_of_float64(by_onednn, softcap, with_sum):
    logits, h_BH, w_VH, labels_B = _block(by_onednn, softcap)
    z_BV, t_B, grad_h, grad_w = _exact(h_BH, w_VH, labels_B, softcap)
    terms = logits.fill(h_BH, Objective(V))
    torch.testing.assert_close(terms.m.double(), z_BV.amax(-1), rtol=1e-5, atol=1e-5)
    assert terms.t[-1] == -torch.inf
    torch.testing.assert_close(terms.t[:-1].double(), t_B[:-1], rtol=1e-5, atol=1e-5)
    sums_B = (z_BV - z_BV.amax(-1, keepdim=True)).exp().sum(-1)
    if not with_sum:
        terms = terms._replace(s=logits.sums(terms.m))
        torch.testing.assert_close(terms.s.double(), sums_B, rtol=1e-4, atol=0)
    s_B, divisor_B = logits.to_gradient(terms, Objective(V), with_sum)
    torch.testing.assert_close(s_B.double(), sums_B, rtol=1e-4, atol=0)
    # Both are sums to which a block adds; the weight's is written by the first.
    gh_BH, gw_VH = torch.zeros(B, H), torch.full((V, H), torch.nan)
    logits.add_gradients(gh_BH, gw_VH, h_BH / divisor_B[:, None], first=True, last=True)
    torch.testing.assert_close((gh_BH / divisor_B[:, None]).double(), grad_h, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gw_VH.double(), grad_w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_sum_of_all_logits(softcap):
    logits, h_BH, w_VH, labels_B = _block(False, softcap)
    found = logits.fill(h_BH, Objective(V, 0.1)).z_sum
    torch.testing.assert_close(found.double(), _exact(h_BH, w_VH, labels_B, softcap)[0].sum(-1), rtol=1e-4, atol=1e-3)


def test_two_blocks_add_up():
    logits, h_BH, w_VH, labels_B = _block(False, 0.0, torch.float64)
    grad_w = _exact(h_BH, w_VH, labels_B, 0.0)[3]
    gw_VH = torch.full((V, H), torch.nan, dtype=torch.float64)
    for first in (True, False):
        _, divisor_B = logits.to_gradient(logits.fill(h_BH, Objective(V)), Objective(V), with_sum=True)
        logits.add_gradients(None, gw_VH, h_BH / divisor_B[:, None], first=first, last=not first)
    torch.testing.assert_close(gw_VH, 2 * grad_w, rtol=1e-10, atol=1e-12)


def test_a_tile_is_rounded_to_the_dtype_of_the_products():
    w_VH = torch.randn(V, H)
    tiles = Tiles(
        Linear(torch.randn(B, H), w_VH, torch.zeros(B).long(), 0, 0.0, torch.bfloat16, Objective(V)),
        torch.float32,
        SIZES,
    )
    assert torch.equal(torch.cat([w_CH for _, w_CH in tiles]), w_VH.bfloat16().float())
    assert [tile.stop - tile.start for tile in tiles.slices()] == [16, 16, 5]
