"""Logits of a block of tokens of the fused loss, made tile by tile of the vocabulary and turned into their gradient.

Each tile of the logits is a dense matrix of its own, [B, C]: products want their operands so.
"""

# B = tokens of a block, b = some of its rows, H = hidden, V = vocabulary (of this rank), C = columns of a tile

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loss_core_torch import row_blocks
from loss_core_torch.products import Products

# Columns of a vocabulary tile on the CPU: a tile of the weight (1536 x 512 float32 = 3 MiB) is read once from memory
# for two uses.
_TILE_COLUMNS = 1536


class Tiles:
    """Vocabulary tiles of the weight, rounded to product_dtype, in the dtype of the arithmetic.

    Attributes:
        columns: classes of a tile, more than those of the last one.
        products: what multiplies them.
    """

    def __init__(self, w_VH: Tensor, product_dtype: torch.dtype, dtype: torch.dtype) -> None:
        self._w_VH, self._product_dtype, self._dtype = w_VH, product_dtype, dtype
        self.vocab = w_VH.shape[0]
        self.columns = max(min(_TILE_COLUMNS, self.vocab) if w_VH.device.type == "cpu" else self.vocab, 1)
        self.products = Products(dtype, w_VH.device)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.vocab, self.columns):
            tile = slice(start, min(start + self.columns, self.vocab))
            yield tile, self._w_VH[tile].to(self._product_dtype).to(self._dtype)


class BlockLogits:
    """Logits of a block in memory that is given, later their gradient.

    Args:
        memory: flat, in the dtype of the arithmetic; overwritten.
        rows: tokens of the block, B.
        tiles: of the weight.
        softcap: 0 is off. With one, tanh(logit / softcap) is what is kept.
        lender: [V, H], a weight gradient without values yet whose memory is lent instead: then B <= H, and each tile
            stands in that of its own part of the gradient, which takes its place in the end.
    """

    def __init__(self, memory: Tensor, rows: int, tiles: Tiles, softcap: float, lender: Tensor | None = None) -> None:
        self._memory = memory if lender is None else lender.view(-1)
        self._pitch = rows if lender is None else lender.shape[1]
        self._lent = lender is not None
        self._rows, self._tiles, self._softcap = rows, tiles, softcap
        # A logit is what is kept times this.
        self._factor = softcap or 1.0

    def _piece(self, tile: slice) -> Tensor:
        start = self._pitch * tile.start
        columns = tile.stop - tile.start
        return self._memory[start : start + self._rows * columns].view(self._rows, columns)

    def fill(self, h_BH: Tensor) -> Tensor:
        """Make the logits h @ W.T; returns the largest of each row."""
        m_B = h_BH.new_full((self._rows,), -torch.inf)
        for tile, w_CH in self._tiles:
            z_BC = self._piece(tile)
            self._tiles.products.into(z_BC, h_BH, w_CH.t())
            if self._softcap:
                z_BC.div_(self._softcap).tanh_()
            torch.maximum(m_B, z_BC.amax(-1), out=m_B)
        return m_B.mul_(self._factor)

    def places(self, column_B: Tensor) -> Tensor:
        """Where the logits of one class per row, int64 in [0, V), lie in the memory."""
        columns = self._tiles.columns
        start_B = column_B // columns * columns
        width_B = (self._tiles.vocab - start_B).clamp_(max=columns)
        row_B = torch.arange(self._rows, device=column_B.device)
        return start_B * self._pitch + row_B * width_B + (column_B - start_B)

    def at(self, place_B: Tensor) -> Tensor:
        """The logits at these places."""
        return self._memory[place_B] * self._factor

    def sums(self, m_B: Tensor) -> Tensor:
        """Sum of exp(logit - m) per row; the logits stay as they are."""
        s_B = torch.zeros_like(m_B)
        for b in self._row_slices():
            spare = self._memory.new_empty((b.stop - b.start) * self._tiles.columns)
            for tile in self._slices():
                z_bC = self._piece(tile)[b]
                y_bC = spare[: z_bC.numel()].view(z_bC.shape)
                number_b = row_blocks.log2_exp(z_bC, self._factor, m_B[b], y_bC)
                s_B[b] += row_blocks.without(number_b, y_bC.exp2_().sum(-1))
        return s_B

    def to_gradient(
        self, m_B: Tensor, place_B: Tensor, owned_B: Tensor | None = None, s_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """In the place of the logits E' = exp(logit - m), minus its sum at each label, times the softcap's slope.

        Each row up to a power of 2, which `sum` has as well.

        Args:
            m_B: number per row, not far below its largest logit.
            place_B: of `places`, for the labels.
            owned_B: False where the label is no class of these; None for True everywhere.
            s_B: sum of exp(logit - m), over classes that may lie elsewhere, too; None for that of these.
        Returns:
            s_B, and the sum by which E' is to be divided.
        """
        sums, powers = [], []
        for b in self._row_slices():
            m_b, kept_b = m_B[b], self._memory[place_B[b]]
            power_b, number_b = torch.zeros_like(m_b), None
            slope = self._memory.new_empty(m_b.numel() * self._tiles.columns if self._softcap else 0)
            for tile in self._slices():
                z_bC = self._piece(tile)[b]
                slope_bC = _slope(z_bC, slope[: z_bC.numel()].view(z_bC.shape)) if self._softcap else None
                number_b = row_blocks.log2_exp(z_bC, self._factor, m_b, z_bC)
                z_bC.exp2_()
                if s_B is None:
                    power_b += z_bC.sum(-1)
                if slope_bC is not None:
                    z_bC.mul_(slope_bC)
            if s_B is not None:
                power_b = s_B[b] if number_b is None else s_B[b] * number_b.exp2()
            hit_b = -power_b if not self._softcap else _slope(kept_b, torch.empty_like(kept_b)).mul_(-power_b)
            if owned_B is not None:
                hit_b = torch.where(owned_B[b], hit_b, 0.0)
            self._memory.scatter_add_(0, place_B[b], hit_b)
            powers.append(power_b)
            sums.append(row_blocks.without(number_b, power_b))
        return torch.cat(sums), torch.cat(powers)

    def add_gradients(
        self, gh_BH: Tensor | None, gw_VH: Tensor | None, scaled_BH: Tensor, *, first: bool, last: bool
    ) -> None:
        """gh += E' @ W and gw += E'.T @ scaled, each where it is wanted.

        Args:
            scaled_BH: hidden states times the factor of each token.
            first: gw holds no values yet.
            last: no block follows. Until then gw may hold what `_add_transposed` needs.
        """
        products = self._tiles.products
        scaled_HB = scaled_BH.t().contiguous() if products.by_onednn else None
        for tile, w_CH in self._tiles:
            z_BC = self._piece(tile)
            if gh_BH is not None:
                products.add(gh_BH, z_BC, w_CH)
            if gw_VH is None:
                continue
            if scaled_HB is not None:
                self._add_transposed(gw_VH[tile], scaled_HB, z_BC, first, last)
            elif not first:
                products.add(gw_VH[tile], z_BC.t(), scaled_BH)
            elif self._lent:
                gw_VH[tile] = products.new(z_BC.t(), scaled_BH)
            else:
                products.into(gw_VH[tile], z_BC.t(), scaled_BH)

    def _add_transposed(self, gw_CH: Tensor, scaled_HB: Tensor, z_BC: Tensor, first: bool, last: bool) -> None:
        """gw += E'.T @ scaled, of which gw holds the transpose until the last block.

        oneDNN wants the left operand dense as it is, and takes the right one in either order: to multiply by E'.T from
        the left, it would be transposed for each block; this way the sum is, once.
        """
        kept_HC = gw_CH.view(scaled_HB.shape[0], z_BC.shape[1])
        new_HC = self._tiles.products.new(scaled_HB, z_BC)
        if last:
            gw_CH.copy_((new_HC if first else new_HC.add_(kept_HC)).t())
        elif first:
            kept_HC.copy_(new_HC)
        else:
            kept_HC.add_(new_HC)

    def _slices(self) -> Iterator[slice]:
        for start in range(0, self._tiles.vocab, self._tiles.columns):
            yield slice(start, min(start + self._tiles.columns, self._tiles.vocab))

    def _row_slices(self) -> Iterator[slice]:
        """Rows of which one tile is small enough for a copy: all of them on a CPU."""
        rows = row_blocks.block_rows(self._tiles.columns, self._memory.device)
        for start in range(0, self._rows, rows):
            yield slice(start, min(start + rows, self._rows))


def _slope(tanh: Tensor, out: Tensor) -> Tensor:
    """1 - tanh^2, the slope of the softcap."""
    return torch.mul(tanh, tanh, out=out).neg_().add_(1.0)
