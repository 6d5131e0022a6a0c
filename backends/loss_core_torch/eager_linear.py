"""Fused linear cross entropy in plain PyTorch operations: loss and both gradients, block of tokens by block.

Three matrix products per block and no second look at the logits: once a block's logits E = exp(z - m)
and sums s are there, with E' = E minus s at each label,

    grad_hidden = (coef / s) (E' @ W)          grad_weight += E'.T @ ((coef / s) h)

so the division by s and every factor of the loss fall on [B, H] operands, never on [B, V].
"""

# T = tokens, B = tokens of a block, H = hidden, V = vocabulary, C = columns of a vocabulary tile

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loss_core import row_stats
from loss_core_torch import huge_pages, row_blocks, values
from loss_core_torch.opaque import opaque
from loss_core_torch.values import compute_dtype

# Bytes of a block's logits. On the CPU a block is the only thing that costs memory besides the
# gradients; elsewhere products want to be large.
_LOGITS_BYTES_CPU = 48 << 20
_LOGITS_BYTES = 512 << 20

# Fewer tokens than this make the products slow (measured: 128 tokens cost as much as 512, 64 a tenth more, 32
# twice as much).
_MIN_BLOCK_TOKENS = 96
_MAX_BLOCK_TOKENS = 1024

# Columns of a vocabulary tile on the CPU: a tile of the weight (1024 x 1024 float32 = 4 MiB) is read
# once from memory for two uses.
_TILE_COLUMNS = 1024


def block_tokens(vocab: int, device: torch.device, itemsize: int) -> int:
    """Tokens whose logits fit the budget, a multiple of 32."""
    budget = _LOGITS_BYTES_CPU if device.type == "cpu" else _LOGITS_BYTES
    fitting = budget // max(vocab * itemsize, 1)
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
    block = block_tokens(w_VH.shape[0], device, dtype.itemsize)
    places_N, all_count = tokens_in_products(keep_T, skip_ignored, num_valid)
    blocks = list(_token_blocks(keep_T.numel(), places_N, block))
    if not blocks:
        return loss_T, grad_h, grad_w.zero_()
    vocab = w_VH.shape[0]
    room = max(map(_length, blocks))
    tiles = Tiles(w_VH, product_dtype, dtype)
    with_grads = want_h or want_w
    buffer = torch.empty(room * vocab if with_grads else 0, dtype=dtype, device=device)
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
        z_BV = buffer[: h_BH.shape[0] * vocab].view(-1, vocab)
        for tile, w_CH in tiles:
            torch.mm(h_BH, w_CH.t(), out=z_BV[:, tile])
        loss_B, sum_B = _rows(z_BV, label_B, softcap)
        loss_T[at] = torch.where(keep_B, loss_B, 0.0)
        factor_B1 = (torch.where(keep_B, coef_T[at], 0.0) / sum_B)[:, None]
        scaled_BH = h_BH * factor_B1
        gh_BH = torch.zeros_like(h_BH) if want_h else h_BH
        for tile, w_CH in tiles:
            if want_h:
                gh_BH.addmm_(z_BV[:, tile], w_CH)
            if want_w:
                torch.addmm(grad_w[tile], z_BV[:, tile].t(), scaled_BH, beta=float(number > 0), out=grad_w[tile])
        if want_h:
            grad_h[at] = gh_BH.mul_(factor_B1)
    return loss_T, grad_h, grad_w


def _rows(z_BV: Tensor, label_B: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """Loss per token; and in the place of the logits E', with the sums by which it is to be divided.

    By rows of a few MiB, so that only the first look at a logit goes to memory.
    """
    losses, sums = [], []
    rows = row_blocks.block_rows(z_BV.shape[-1], z_BV.device)
    slope_BV = z_BV.new_empty(min(rows, z_BV.shape[0]) if softcap else 0, z_BV.shape[1])
    for z_bV, label_b in zip(z_BV.split(rows), label_B.split(rows), strict=True):
        slope_bV = _apply_softcap(z_bV, softcap, slope_BV[: z_bV.shape[0]])
        label_b1 = label_b[:, None]
        m_b = z_bV.amax(-1)
        target_b = z_bV.gather(1, label_b1)[:, 0]
        number_b = row_blocks.log2_exp(z_bV, 1.0, m_b, z_bV)
        sum_b = z_bV.exp2_().sum(-1)
        losses.append(row_blocks.without(number_b, sum_b).log() + (m_b - target_b))
        sums.append(sum_b)
        z_bV.scatter_add_(1, label_b1, -sum_b[:, None])
        if slope_bV is not None:
            z_bV.mul_(slope_bV)
    return torch.cat(losses), torch.cat(sums)


def _loss(h_BH: Tensor, tiles: Tiles, label_B: Tensor, softcap: float) -> Tensor:
    """Loss per token where no gradient is wanted: the logits of one vocabulary tile at a time."""
    empty_B = h_BH.new_full(label_B.shape, -torch.inf)
    state = row_stats.RowState(empty_B, torch.zeros_like(empty_B), empty_B)
    buffer = h_BH.new_empty(h_BH.shape[0] * tiles.columns)
    none = buffer.new_empty(0)
    for tile, w_CH in tiles:
        z_BC = buffer[: h_BH.shape[0] * w_CH.shape[0]].view(-1, w_CH.shape[0])
        torch.mm(h_BH, w_CH.t(), out=z_BC)
        _apply_softcap(z_BC, softcap, none)
        local_B = label_B - tile.start
        owned_B = (local_B >= 0) & (local_B < w_CH.shape[0])
        target_B = z_BC.gather(1, torch.where(owned_B, local_B, 0)[:, None])[:, 0]
        m_B = z_BC.amax(-1)
        number_B = row_blocks.log2_exp(z_BC, 1.0, m_B, z_BC)
        s_B = row_blocks.without(number_B, z_BC.exp2_().sum(-1))
        part = row_stats.RowState(m_B, s_B, torch.where(owned_B, target_B, -torch.inf))
        state = row_stats.combine(torch, state, part)
    return row_stats.finish(torch, state)


def _length(at: slice | Tensor) -> int:
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


def _token_blocks(num_tokens: int, places_N: Tensor | None, block: int) -> Iterator[slice | Tensor]:
    """Places of the tokens of each block: slices of all, or indices."""
    if places_N is not None:
        yield from places_N.split(block) if places_N.numel() else ()
        return
    for start in range(0, num_tokens, block):
        yield slice(start, min(start + block, num_tokens))


class Tiles:
    """Vocabulary tiles of the weight, rounded to product_dtype, in the dtype of the arithmetic.

    Attributes:
        columns: classes of a tile, more than those of the last one.
    """

    def __init__(self, w_VH: Tensor, product_dtype: torch.dtype, dtype: torch.dtype) -> None:
        self._w_VH, self._product_dtype, self._dtype = w_VH, product_dtype, dtype
        self.columns = min(_TILE_COLUMNS, w_VH.shape[0]) if w_VH.device.type == "cpu" else w_VH.shape[0]

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        vocab = self._w_VH.shape[0]
        for start in range(0, vocab, self.columns):
            tile = slice(start, min(start + self.columns, vocab))
            yield tile, self._w_VH[tile].to(self._product_dtype).to(self._dtype)


def _apply_softcap(z_BV: Tensor, softcap: float, buffer: Tensor) -> Tensor | None:
    """z <- c tanh(z / c) in place; returns the slope 1 - tanh^2 when there is a buffer for it."""
    if not softcap:
        return None
    z_BV.div_(softcap).tanh_()
    slope_BV = None
    if buffer.numel():
        slope_BV = buffer[: z_BV.numel()].view(z_BV.shape)
        torch.mul(z_BV, z_BV, out=slope_BV).neg_().add_(1.0)
    z_BV.mul_(softcap)
    return slope_BV
