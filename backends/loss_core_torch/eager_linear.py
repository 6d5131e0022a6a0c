"""Fused linear cross entropy in plain PyTorch operations: loss and both gradients, block of tokens by block.

Three matrix products per block and no second look at the logits: once a block's logits E = exp(z - m)
and sums s are there, with E' = E minus s at each label,

    grad_hidden = (coef / s) (E' @ W)          grad_weight += E'.T @ ((coef / s) h)

so the division by s and every factor of the loss fall on [B, H] operands, never on [B, V].

Memory: the two gradients, and the logits of a block of tokens. Those of the first, larger block stand in the memory of
the weight's gradient, which holds no values until they are done with.
"""

# T = tokens, N = tokens in products, B = tokens of a block, H = hidden, V = vocabulary, C = columns of a tile

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loss_core import row_stats
from loss_core_torch import huge_pages, row_blocks, values
from loss_core_torch.block_logits import BlockLogits, Tiles
from loss_core_torch.opaque import opaque
from loss_core_torch.values import compute_dtype

# Bytes of a block's logits. On the CPU a block is the only thing that costs memory besides the gradients, for up to
# this many hidden units, and in proportion for more: the weight's gradient, which each block is a pass over, is larger
# by as much. Elsewhere products want to be large.
_LOGITS_BYTES_CPU = 48 << 20
_HIDDEN_CPU = 512
_LOGITS_BYTES = 512 << 20

# Fewer tokens than this make the products slow (measured: 128 tokens cost as much as 512, 64 a tenth more, 32
# twice as much).
_MIN_BLOCK_TOKENS = 96
_MAX_BLOCK_TOKENS = 1024


def logits_bytes(hidden: int, device: torch.device) -> int:
    """Bytes that the logits of a block may take."""
    if device.type != "cpu":
        return _LOGITS_BYTES
    return min(_LOGITS_BYTES_CPU * max(hidden, _HIDDEN_CPU) // _HIDDEN_CPU, _LOGITS_BYTES)


def block_tokens(vocab: int, hidden: int, device: torch.device, itemsize: int) -> int:
    """Tokens whose logits fit the budget, a multiple of 32."""
    fitting = logits_bytes(hidden, device) // max(vocab * itemsize, 1)
    return max(_MIN_BLOCK_TOKENS, min(_MAX_BLOCK_TOKENS, fitting // 32 * 32))


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype in which the logits' gradient enters its two products: that of the arithmetic, on every device.

    Args:
        dtype: to which hidden states and weight are rounded.
    """
    return compute_dtype(dtype)


def _fake_linear(
    h_TH: Tensor,
    w_VH: Tensor,
    labels_T: Tensor,
    keep_T: Tensor,
    coef_T: Tensor,
    softcap: float,
    product_dtype: torch.dtype,
    want_grads: list[bool],
    skip_ignored: bool | None,
    num_valid: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(h_TH.dtype)
    want_h, want_w = want_grads
    loss_T = h_TH.new_zeros(keep_T.shape, dtype=dtype)
    grad_h = torch.zeros(h_TH.shape if want_h else (0,), dtype=dtype, device=h_TH.device)
    grad_w = torch.zeros(w_VH.shape if want_w else (0,), dtype=dtype, device=h_TH.device)
    return loss_T, grad_h, grad_w


@opaque(_fake_linear)
def linear_cross_entropy(
    h_TH: Tensor,
    w_VH: Tensor,
    labels_T: Tensor,
    keep_T: Tensor,
    coef_T: Tensor,
    softcap: float,
    product_dtype: torch.dtype,
    want_grads: list[bool],
    skip_ignored: bool | None,
    num_valid: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of softcap(h @ W.T) per token, and the gradients of sum(coef * loss).

    Args:
        h_TH, w_VH: float; labels_T: int64, inside [0, V) wherever keep_T is True.
        keep_T: bool; whether tokens with False take part in products, as zeros: see `tokens_in_products`.
        coef_T: factor of each token's loss in the objective.
        softcap: 0 is off.
        product_dtype: dtype to which both operands are rounded first (autocast); their own otherwise.
        want_grads: whether the gradient of h, of W, is wanted.
        skip_ignored, num_valid: see `tokens_in_products`.
    Returns:
        loss_T, grad_h, grad_w in the dtype of the arithmetic; a gradient that is not wanted is empty.
        loss is 0 where keep is False.
    """
    want_h, want_w = want_grads
    dtype = compute_dtype(h_TH.dtype)
    device = h_TH.device
    loss_T = torch.zeros(keep_T.shape, dtype=dtype, device=device)
    grad_h = torch.zeros(h_TH.shape if want_h else (0,), dtype=dtype, device=device)
    # The first block writes every entry; without any block zeros are right.
    grad_w = huge_pages.empty(w_VH.shape if want_w else torch.Size([0]), dtype, device)
    places_N, all_count = tokens_in_products(keep_T, skip_ignored, num_valid)
    num_tokens = keep_T.numel() if places_N is None else places_N.numel()
    vocab, hidden = w_VH.shape
    block = block_tokens(vocab, hidden, device, dtype.itemsize)
    # Nothing stands in the weight's gradient before the first block is done: there is room for the logits of H tokens.
    lent = min(hidden, _MAX_BLOCK_TOKENS) if want_w and device.type == "cpu" else 0
    lent = lent if lent > block else 0
    blocks = list(token_blocks(keep_T.numel(), places_N, block, lent or block))
    if not blocks:
        return loss_T, grad_h, grad_w.zero_()
    with_grads = want_h or want_w
    room = min(block, max(num_tokens - lent, 0)) if with_grads else 0
    buffer = torch.empty(room * vocab, dtype=dtype, device=device)
    tiles = Tiles(w_VH, product_dtype, dtype)
    for number, at in enumerate(blocks):
        keep_B = keep_T[at]
        # What an ignored token holds must not reach a product, not even times 0.
        h_BH = h_TH[at].to(product_dtype).to(dtype)
        if not all_count:
            h_BH = torch.where(keep_B[:, None], h_BH, 0.0)
        label_B = labels_T[at] if all_count else torch.where(keep_B, labels_T[at], 0)
        if not with_grads:
            loss_T[at] = torch.where(keep_B, _loss(h_BH, tiles, label_B, softcap), 0.0)
            continue
        logits = BlockLogits(buffer, h_BH.shape[0], tiles, softcap, grad_w if lent and number == 0 else None)
        m_B = logits.fill(h_BH)
        place_B = logits.places(label_B)
        target_B = logits.at(place_B)
        s_B, power_B = logits.to_gradient(m_B, place_B)
        loss_T[at] = torch.where(keep_B, s_B.log() + (m_B - target_B), 0.0)
        factor_B1 = (torch.where(keep_B, coef_T[at], 0.0) / power_B)[:, None]
        gh_BH = torch.zeros_like(h_BH) if want_h else None
        last = number == len(blocks) - 1
        logits.add_gradients(gh_BH, grad_w if want_w else None, h_BH * factor_B1, first=number == 0, last=last)
        if gh_BH is not None:
            grad_h[at] = gh_BH.mul_(factor_B1)
    return loss_T, grad_h, grad_w


def _loss(h_BH: Tensor, tiles: Tiles, label_B: Tensor, softcap: float) -> Tensor:
    """Loss per token where no gradient is wanted: the logits of one vocabulary tile at a time."""
    empty_B = h_BH.new_full(label_B.shape, -torch.inf)
    state = row_stats.RowState(empty_B, torch.zeros_like(empty_B), empty_B)
    buffer = h_BH.new_empty(h_BH.shape[0] * tiles.columns)
    factor = softcap or 1.0
    for tile, w_CH in tiles:
        z_BC = buffer[: h_BH.shape[0] * w_CH.shape[0]].view(-1, w_CH.shape[0])
        tiles.products.into(z_BC, h_BH, w_CH.t())
        if softcap:
            z_BC.div_(softcap).tanh_()
        local_B = label_B - tile.start
        owned_B = (local_B >= 0) & (local_B < w_CH.shape[0])
        target_B = z_BC.gather(1, torch.where(owned_B, local_B, 0)[:, None])[:, 0] * factor
        m_B = z_BC.amax(-1) * factor
        number_B = row_blocks.log2_exp(z_BC, factor, m_B, z_BC)
        s_B = row_blocks.without(number_B, z_BC.exp2_().sum(-1))
        part = row_stats.RowState(m_B, s_B, torch.where(owned_B, target_B, -torch.inf))
        state = row_stats.combine(torch, state, part)
    return row_stats.finish(torch, state)


def length(at: slice | Tensor) -> int:
    """Tokens of a block."""
    return at.stop - at.start if isinstance(at, slice) else at.numel()


def tokens_in_products(keep_T: Tensor, skip_ignored: bool | None, num_valid: int | None) -> tuple[Tensor | None, bool]:
    """Which tokens take part in the matrix products.

    Args:
        skip_ignored: whether ignored ones stay out; None: where it costs no sync. Their number must be on the host
            for that, which is one sync on an accelerator.
        num_valid: this number, where the caller knows it: no sync then, and shapes that depend on no value. A
            larger one repeats token 0, a smaller one loses tokens: the caller makes such a loss NaN.
    Returns:
        Their places in ascending order, [N] int64, or None for all T tokens; and whether it is certain that all
        of them count.
    """
    if num_valid is not None:
        return torch.nonzero_static(keep_T, size=num_valid, fill_value=0)[:, 0], False
    if not (values.may_read(keep_T) if skip_ignored is None else skip_ignored):
        return None, False
    places_N = keep_T.nonzero()[:, 0]
    return (None if places_N.numel() == keep_T.numel() else places_N), True


def token_blocks(num_tokens: int, places_N: Tensor | None, block: int, first: int) -> Iterator[slice | Tensor]:
    """Places of the tokens of each block: slices of all, or indices.

    Args:
        block, first: tokens of a block, and of the first one.
    """
    total = num_tokens if places_N is None else places_N.numel()
    stop = 0
    while stop < total:
        start, stop = stop, min(stop + (block if stop else first), total)
        yield slice(start, stop) if places_N is None else places_N[start:stop]
