"""Sizes of blocks keep to their budgets, for every vocabulary and number of hidden units."""

import pytest
import torch

from loss_core_torch.kernels.eager.sizes import SIZES

CPU = torch.device("cpu")


@pytest.mark.parametrize("vocab", [1000, 32000, 128256])
def test_a_block_of_rows_keeps_to_its_budget(vocab):
    rows = SIZES.block_rows(vocab, CPU)
    assert rows * vocab * 4 <= 4 << 20 < (rows + 1) * vocab * 4


def test_a_block_holds_one_row_at_least():
    assert SIZES.block_rows(1 << 24, CPU) == 1
    assert SIZES.block_rows(0, CPU) == SIZES.elements_cpu
    assert SIZES.tile_columns(0, CPU) == 1


@pytest.mark.parametrize(("hidden", "mebibytes"), [(64, 48), (512, 48), (1024, 96), (4096, 384), (65536, 512)])
def test_a_block_of_a_large_vocabulary_keeps_to_its_budget(hidden, mebibytes):
    tokens = SIZES.linear_tokens(128256, hidden, CPU, 4)
    assert tokens > 64
    assert tokens * 128256 * 4 <= mebibytes << 20 < (tokens + 32) * 128256 * 4
