"""Blocks of rows: each row once for any strides, and ignored rows skipped where possible."""

import pytest
import torch

from loss_core_torch.kernels.eager.row_blocks import Buffer, blocks, view_2d

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
def test_every_row_is_in_one_block(layout, rows):
    x = _tensor(layout)
    copied, seen = torch.full(x.shape, torch.nan), []
    for block in blocks(rows, None, x):
        block_BV = block.read(x)
        assert block_BV.shape == (block.num_rows, x.shape[-1])
        assert 0 < block.num_rows <= rows
        assert torch.equal(x.reshape(-1, x.shape[-1])[block.rows], block_BV)
        seen += range(block.rows.start, block.rows.stop)
        block.write(copied, block_BV)
    assert torch.equal(copied, x)
    assert seen == (list(range(x.shape[:-1].numel())) if x.numel() else [])


@every_layout
@some_sizes
def test_a_view_of_a_block_shares_memory(layout, rows):
    x = _tensor(layout)
    for block in blocks(rows, None, x):
        view = block.view(x)
        if view is not None:
            assert torch.equal(view, block.read(x))
            assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        # A contiguous tensor always has one.
        assert block.view(x.contiguous()) is not None


@some_sizes
def test_ignored_rows_of_a_matrix_are_skipped(rows):
    x_TV, keep_T = torch.randn(10, 4), torch.tensor([True, False] * 5)
    copied = torch.zeros_like(x_TV)
    for block in blocks(rows, keep_T, x_TV):
        assert keep_T[block.rows].all()
        block.write(copied, block.read(x_TV))
    assert torch.equal(copied, torch.where(keep_T[:, None], x_TV, 0.0))
    assert not list(blocks(rows, torch.zeros_like(keep_T), x_TV))


def test_rows_without_a_2d_view():
    x = torch.randn(2, 5, 3)
    assert view_2d(x[:, :-1]) is None
    assert view_2d(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("rows", [1, 2, 5, 37])
@pytest.mark.parametrize("columns", [1, 7, 31, 507])
def test_exp2_does_not_depend_on_the_position_in_the_block(rows, columns):
    torch.manual_seed(0)
    y_BV = torch.randn(37, columns) * 20
    full, partial = (Buffer(n, y_BV, torch.float32) for n in (37, rows))
    all_BV = full.exp2_(full.view_as(y_BV).copy_(y_BV)).clone()
    for first in range(0, 37 - rows + 1, rows):
        part_BV = y_BV[first : first + rows]
        assert torch.equal(partial.exp2_(partial.view_as(part_BV).copy_(part_BV)), all_BV[first : first + rows])
