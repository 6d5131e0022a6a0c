"""Logits of a block of tokens of the fused loss, made tile by tile of the vocabulary and turned into their gradient.

Each tile of the logits is a dense matrix of its own, [B, C]: products want their operands so.
"""

# B = tokens of a block, b = some of its rows, H = hidden, V = vocabulary (of this rank), C = columns of a tile,
# K = targets of a row

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from loss_core.row_terms import Coefficients, RowTerms, Sums
from loss_core_torch.kernels.eager.exponentials import exponents, log2_exp, softcap_slope, to_gradient, without
from loss_core_torch.kernels.eager.products import Products
from loss_core_torch.kernels.eager.sizes import Sizes
from loss_core_torch.kernels.terms import Targets, by_logits, per_row
from loss_core_torch.tracing import compute_dtype


class Tiles:
    """Vocabulary tiles of a weight, rounded to the product dtype, in the dtype of the arithmetic.

    Attributes:
        columns: classes of a tile, more than those of the last one.
        products: what multiplies them.
    """

    def __init__(self, w_VH: Tensor, product_dtype: torch.dtype, sizes: Sizes, bias_V: Tensor | None = None) -> None:
        self._w_VH, self._product_dtype, self._sizes, self._bias_V = w_VH, product_dtype, sizes, bias_V
        self._dtype = dtype = compute_dtype(product_dtype)
        self.vocab, device = w_VH.shape[0], w_VH.device
        self.columns = sizes.tile_columns(self.vocab, device)
        # Rows of which one tile is small enough for a copy: all of them on a CPU.
        self.rows = sizes.block_rows(self.columns, device)
        self.products = Products(dtype, device)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for tile in self.slices():
            yield tile, self._w_VH[tile].to(self._product_dtype).to(self._dtype)

    def slices(self) -> Iterator[slice]:
        """The classes of each tile."""
        for start in range(0, self.vocab, self.columns):
            yield slice(start, min(start + self.columns, self.vocab))

    def logits(self, tile: slice, w_CH: Tensor, h_BH: Tensor, out_BC: Tensor) -> None:
        """h @ W.T + b of a tile."""
        self.products.into(out_BC, h_BH, w_CH.t())
        if self._bias_V is not None:
            out_BC += self._bias_V[tile].to(self._dtype)

    def only(self, tile: slice) -> Tiles:
        """One tile as a weight of its own."""
        bias_C = None if self._bias_V is None else self._bias_V[tile]
        return Tiles(self._w_VH[tile], self._product_dtype, self._sizes, bias_C)


class BlockRows(NamedTuple):
    """What is known of the rows of a block.

    Attributes:
        labels_B: the targets, [B] or [B, K], as in `Rows`.
        vocab_start: first class of this weight.
        inverse_temperature_B: factor of the logits, after the softcap, or None.
    """

    labels_B: Tensor
    vocab_start: int
    inverse_temperature_B: Tensor | None


class BlockLogits:
    """Logits of a block, later their gradient, in memory that is given.

    Args:
        memory: flat, in the dtype of the arithmetic; overwritten.
        rows: of the block.
        tiles: of the weight.
        softcap: 0 is off. With one, tanh(logit / softcap) is what is kept.
    """

    def __init__(self, memory: Tensor, rows: BlockRows, tiles: Tiles, softcap: float) -> None:
        self._memory, self._rows, self._tiles, self._softcap = memory, len(rows.labels_B), tiles, softcap
        # z is what is kept times this, and times the inverse temperature.
        self._factor, self._inverse_B = softcap or 1.0, rows.inverse_temperature_B
        self._labels_B, self._vocab_start = rows.labels_B, rows.vocab_start

    def make(self, h_BH: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Make the logits h @ W.T + b; gives each tile while it is at hand."""
        for tile, w_CH in self._tiles:
            z_BC = self._piece(tile)
            self._tiles.logits(tile, w_CH, h_BH, z_BC)
            if self._softcap:
                z_BC.div_(self._softcap).tanh_()
            yield tile, z_BC

    def fill(self, h_BH: Tensor, sums: Sums) -> RowTerms:
        """Make the logits; returns their terms."""
        m_B = self._memory.new_full((self._rows,), -torch.inf)
        t_B = torch.full_like(self._labels_B, -torch.inf, dtype=m_B.dtype)
        z_sum_B = torch.zeros_like(m_B) if sums.z_sum else None
        for tile, z_BC in self.make(h_BH):
            targets = self._targets(tile)
            torch.maximum(t_B, targets.read(z_BC, -torch.inf), out=t_B)
            if not targets.is_one:
                targets.write(z_BC, -torch.inf)
            torch.maximum(m_B, z_BC.amax(-1), out=m_B)
            if z_sum_B is not None:
                z_sum_B += z_BC.sum(-1)
        factor_B = torch.full_like(m_B, self._factor) if self._inverse_B is None else self._factor * self._inverse_B
        terms = RowTerms(m_B * factor_B, m_B, t_B * per_row(factor_B, t_B))
        s_B, e_B = self._sums(terms.m, sums.e)
        return terms._replace(s=s_B, z_sum=None if z_sum_B is None else z_sum_B * factor_B, e=e_B)

    def _sums(self, m_B: Tensor, with_e: bool) -> tuple[Tensor, Tensor | None]:
        """s and e of each row; the logits stay as they are."""
        s_B, e_B = torch.zeros_like(m_B), torch.zeros_like(m_B) if with_e else None
        for b in self._row_slices():
            spare, spare_x = self._spare(b), self._spare(b) if with_e else None
            for tile in self._tiles.slices():
                z_bC = self._piece(tile)[b]
                y_bC = self._take(spare, z_bC)
                number_b = self._log2_exp(z_bC, m_B, b, y_bC)
                x_bC = None if spare_x is None else exponents(y_bC, number_b, self._take(spare_x, z_bC))
                y_bC.exp2_()
                s_B[b] += without(number_b, y_bC.sum(-1))
                if e_B is not None and x_bC is not None:
                    e_B[b] += without(number_b, x_bC.mul_(y_bC).sum(-1))
        return s_B, e_B

    def to_gradient(self, terms: RowTerms, coefficients: Coefficients) -> None:
        """Turn the logits into their gradient, in the place of the logits.

        Args:
            terms: of these rows, of which m and t are looked at.
            coefficients: of these rows, over the whole vocabulary.
        """
        coefficients = by_logits(coefficients, terms.t, self._softcap, self._inverse_B)
        for b in self._row_slices():
            part = coefficients.of_rows(b)
            spare = self._spare(b) if self._softcap else None
            spare_x = self._spare(b) if part.slope is not None else None
            for tile in self._tiles.slices():
                z_bC = self._piece(tile)[b]
                slope_bC = None if spare is None else softcap_slope(z_bC, self._take(spare, z_bC))
                number_b = self._log2_exp(z_bC, terms.m, b, z_bC)
                x_bC = None if spare_x is None else exponents(z_bC, number_b, self._take(spare_x, z_bC))
                to_gradient(z_bC.exp2_(), number_b, part, x_bC, slope_bC, z_bC)
                self._targets(tile, b).write(z_bC, part.target)

    def _log2_exp(self, z_bC: Tensor, m_B: Tensor, b: slice, out_bC: Tensor) -> Tensor | None:
        if self._inverse_B is not None:
            z_bC = torch.mul(z_bC, self._inverse_B[b, None], out=out_bC)
        return log2_exp(z_bC, self._factor, m_B[b], out_bC)

    def _spare(self, b: slice) -> Tensor:
        """Memory of some rows of a tile."""
        return self._memory.new_empty((b.stop - b.start) * self._tiles.columns)

    def _take(self, spare: Tensor, like_bC: Tensor) -> Tensor:
        return spare[: like_bC.numel()].view(like_bC.shape)

    def add_gradients(
        self,
        gh_BH: Tensor | None,
        gw_VH: Tensor | None,
        gb_V: Tensor | None,
        h_BH: Tensor,
        *,
        first: bool,
        last: bool,
    ) -> None:
        """gh += E @ W, gw += E.T @ h and gb += sums of E, each where it is wanted; E is the gradient by the logits.

        Args:
            first, last: block of the sum gw; see `Products.accumulate`.
        """
        products = self._tiles.products
        h_HB = products.turned(h_BH)
        for tile, w_CH in self._tiles:
            e_BC = self._piece(tile)
            if gh_BH is not None:
                products.add(gh_BH, e_BC, w_CH)
            if gw_VH is not None:
                products.accumulate(gw_VH[tile], e_BC, h_BH, h_HB, first, last)
            if gb_V is not None:
                gb_V[tile] += e_BC.sum(0)

    def _piece(self, tile: slice) -> Tensor:
        """The logits of a tile."""
        start, columns = self._rows * tile.start, tile.stop - tile.start
        return self._memory[start : start + self._rows * columns].view(self._rows, columns)

    def _targets(self, tile: slice, b: slice = slice(None)) -> Targets:
        """Where the targets of some rows are in a tile."""
        return Targets.of(self._labels_B[b], self._vocab_start + tile.start, tile.stop - tile.start)

    def _row_slices(self) -> Iterator[slice]:
        """Rows of which one tile is small enough for a copy."""
        rows = self._tiles.rows
        for start in range(0, self._rows, rows):
            yield slice(start, min(start + rows, self._rows))
