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

from loss_core_torch import values
from loss_core_torch.opaque import opaque
from loss_core_torch.values import compute_dtype

# Bytes of a block's logits. On the CPU a block is the only thing that costs memory besides the
# gradients; elsewhere products want to be large.
_LOGITS_BYTES_CPU = 64 << 20
_LOGITS_BYTES = 512 << 20

# Fewer tokens than this make the products slow (measured: 32 tokens cost twice as much as 512).
_MIN_BLOCK_TOKENS = 128
_MAX_BLOCK_TOKENS = 1024

# Columns of a vocabulary tile on the CPU: a tile of the weight (2048 x 1024 float32 = 8 MiB) is read
# once from memory for two uses.
_TILE_COLUMNS = 2048


def block_tokens(vocab: int, device: torch.device, itemsize: int) -> int:
    """Tokens whose logits fit the budget, a multiple of 64."""
    budget = _LOGITS_BYTES_CPU if device.type == "cpu" else _LOGITS_BYTES
    fitting = budget // max(vocab * itemsize, 1)
    return max(_MIN_BLOCK_TOKENS, min(_MAX_BLOCK_TOKENS, fitting // 64 * 64))


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
    grad_w = torch.empty(w_VH.shape if want_w else (0,), dtype=dtype, device=device)
    block = block_tokens(w_VH.shape[0], device, dtype.itemsize)
    places_N, all_count = tokens_in_products(keep_T, skip_ignored, num_valid)
    blocks = list(_token_blocks(keep_T.numel(), places_N, block))
    if not blocks:
        return loss_T, grad_h, grad_w.zero_()
    room = min(block, max(_length(at) for at in blocks)) * w_VH.shape[0]
    logits_buffer = torch.empty(room, dtype=dtype, device=device)
    slope_buffer = torch.empty(room if softcap and (want_h or want_w) else 0, dtype=dtype, device=device)
    for number, at in enumerate(blocks):
        keep_B = keep_T[at]
        # What an ignored token holds must not reach a product, not even times 0.
        h_BH = h_TH[at].to(product_dtype).to(dtype)
        if not all_count:
            h_BH = torch.where(keep_B[:, None], h_BH, 0.0)
        z_BV = logits_buffer[: h_BH.shape[0] * w_VH.shape[0]].view(h_BH.shape[0], w_VH.shape[0])
        for tile, w_CH in _tiles(w_VH, product_dtype, dtype):
            torch.mm(h_BH, w_CH.t(), out=z_BV[:, tile])
        slope_BV = _apply_softcap(z_BV, softcap, slope_buffer)
        label_B1 = torch.where(keep_B, labels_T[at], 0)[:, None]
        m_B1 = z_BV.amax(-1, keepdim=True)
        target_B1 = z_BV.gather(1, label_B1)
        s_B1 = z_BV.sub_(m_B1).exp_().sum(-1, keepdim=True)
        loss_T[at] = torch.where(keep_B, (s_B1.log() + (m_B1 - target_B1))[:, 0], 0.0)
        if not (want_h or want_w):
            continue
        z_BV.scatter_add_(1, label_B1, -s_B1)
        if slope_BV is not None:
            z_BV.mul_(slope_BV)
        factor_B1 = torch.where(keep_B, coef_T[at], 0.0)[:, None] / s_B1
        scaled_BH = h_BH * factor_B1
        gh_BH = torch.zeros_like(h_BH) if want_h else h_BH
        for tile, w_CH in _tiles(w_VH, product_dtype, dtype):
            if want_h:
                gh_BH.addmm_(z_BV[:, tile], w_CH)
            if want_w:
                torch.addmm(grad_w[tile], z_BV[:, tile].t(), scaled_BH, beta=float(number > 0), out=grad_w[tile])
        if want_h:
            grad_h[at] = gh_BH.mul_(factor_B1)
    return loss_T, grad_h, grad_w


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


def _tiles(w_VH: Tensor, product_dtype: torch.dtype, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Vocabulary tiles of the weight, rounded to product_dtype, in the dtype of the arithmetic."""
    columns = _TILE_COLUMNS if w_VH.device.type == "cpu" else w_VH.shape[0]
    for start in range(0, w_VH.shape[0], columns):
        tile = slice(start, min(start + columns, w_VH.shape[0]))
        yield tile, w_VH[tile].to(product_dtype).to(dtype)


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
