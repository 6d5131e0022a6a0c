"""Blocks of rows: whatever the strides, each row once, and none that is ignored where it can be left out."""

import math

import pytest
import torch

from loss_core_torch.kernels.eager.row_blocks import (
    Buffer,
    blocks,
    log2_exp,
    matrix,
    row_dots,
    row_sums,
    without,
)

LAYOUTS = {
    "a row": lambda x: x[0, 0, 0],
    "a matrix": lambda x: x[0, 0],
    "contiguous": lambda x: x,
    "a slice": lambda x: x[:, :, :-1],
    "two slices": lambda x: x[:, 1:, 1:],
    "every other column": lambda x: x[..., ::2],
    "transposed": lambda x: x.transpose(0, 2),
    "the vocabulary outermost": lambda x: x.permute(3, 1, 0, 2),
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "without rows": lambda x: x[:, :0],
    "without columns": lambda x: x[..., :0],
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
some_sizes = pytest.mark.parametrize("rows", [1, 3, 1000])


def _tensor(layout):
    return layout(torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5))


@every_layout
@some_sizes
def test_every_row_lies_in_one_block(layout, rows):
    x = _tensor(layout)
    copied, seen = torch.full(x.shape, torch.nan), []
    for block in blocks(rows, None, x):
        block_BV = block.take(x)
        assert block_BV.shape == (block.length(), x.shape[-1])
        assert 0 < block.length() <= rows
        assert torch.equal(x.reshape(-1, x.shape[-1])[block.at], block_BV)
        seen += range(block.at.start, block.at.stop)
        block.put(copied, block_BV)
    assert torch.equal(copied, x)
    assert seen == (list(range(x.shape[:-1].numel())) if x.numel() else [])


@every_layout
@some_sizes
def test_a_view_of_a_block_is_on_the_same_memory(layout, rows):
    x = _tensor(layout)
    for block in blocks(rows, None, x):
        view = block.view(x)
        if view is not None:
            assert torch.equal(view, block.take(x))
            assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        # A dense tensor always has one.
        assert block.view(x.contiguous()) is not None


@some_sizes
def test_ignored_rows_of_a_matrix_are_left_out(rows):
    x_TV, keep_T = torch.randn(10, 4), torch.tensor([True, False] * 5)
    copied = torch.zeros_like(x_TV)
    for block in blocks(rows, keep_T, x_TV):
        assert keep_T[block.at].all()
        block.put(copied, block.take(x_TV))
    assert torch.equal(copied, torch.where(keep_T[:, None], x_TV, 0.0))
    assert not list(blocks(rows, torch.zeros_like(keep_T), x_TV))


def test_rows_that_no_view_holds_as_a_matrix():
    x = torch.randn(2, 5, 3)
    assert matrix(x[:, :-1]) is None
    assert matrix(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("rows", [1, 2, 5, 37])
@pytest.mark.parametrize("columns", [1, 7, 31, 507])
def test_a_power_does_not_depend_on_where_in_the_block_it_lies(rows, columns):
    torch.manual_seed(0)
    y_BV = torch.randn(37, columns) * 20
    together, alone = (Buffer(n, y_BV, torch.float32) for n in (37, rows))
    all_BV = together.exp2(together.take(y_BV).copy_(y_BV)).clone()
    for first in range(0, 37 - rows + 1, rows):
        part_BV = y_BV[first : first + rows]
        assert torch.equal(alone.exp2(alone.take(part_BV).copy_(part_BV)), all_BV[first : first + rows])


@pytest.mark.parametrize("columns", [33, 40_000, 300_000])
def test_a_sum_does_not_depend_on_how_many_rows_there_are(columns):
    # PyTorch sums a row of more than 32,768 in two pieces where it is alone, and there are two threads.
    torch.manual_seed(0)
    x_BV, y_BV = torch.rand(5, columns), torch.rand(5, columns)
    for rows in (slice(0, 1), slice(4, 5), slice(1, 3)):
        assert torch.equal(row_sums(x_BV[rows]), row_sums(x_BV)[rows])
        assert torch.equal(row_dots(x_BV[rows], y_BV[rows]), row_dots(x_BV, y_BV)[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("largest", [0.0, 64.0, -8192.0, 2.0**17, 2.0**24, 1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_the_powers_of_two_are_the_exponentials(dtype, largest, factor):
    # Multiples of 1/8, and powers of two: factor z is exact, and so is factor z - m.
    torch.manual_seed(0)
    z_BV = (torch.randn(3, 50, dtype=dtype) * 8).round() / 8
    z_BV[1] += largest  # of the second row alone: what it holds must not touch the others
    m_B = z_BV.amax(-1) * factor
    number_B = log2_exp(z_BV, factor, m_B, y_BV := torch.empty_like(z_BV))
    got_B = without(number_B, y_BV.exp2().sum(-1))
    shift_B = torch.where(m_B == -math.inf, 0.0, m_B.double())
    want_B = (z_BV.double() * factor - shift_B[:, None]).exp().sum(-1)
    torch.testing.assert_close(got_B.double(), want_B, rtol=32 * torch.finfo(dtype).eps, atol=0, equal_nan=True)
