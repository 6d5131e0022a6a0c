"""Block sizes stay within their budgets, for any vocabulary and number of hidden units."""

import pytest
import torch

from loss_core_torch.kernels import HeadSizes
from loss_core_torch.kernels.eager.sizes import SIZES

CPU = torch.device("cpu")


@pytest.mark.parametrize("vocab", [1000, 32000, 128256])
def test_a_block_of_rows_stays_within_its_budget(vocab):
    rows = SIZES.block_rows(vocab, CPU)
    assert rows * vocab * 4 <= 4 << 20 < (rows + 1) * vocab * 4


def test_a_block_holds_at_least_one_row():
    assert SIZES.block_rows(1 << 24, CPU) == 1
    assert SIZES.block_rows(0, CPU) == SIZES.elements_cpu


def _head(num_tokens, vocab, hidden):
    return HeadSizes(num_tokens, vocab, hidden, 4, 0, 0, CPU)


@pytest.mark.parametrize(("hidden", "mebibytes"), [(64, 48), (512, 48), (1024, 96), (4096, 384), (65536, 512)])
def test_a_block_of_a_large_vocabulary_stays_within_its_budget(hidden, mebibytes):
    tokens, logits_tokens, classes = SIZES.chunks(_head(8192, 128256, hidden))
    assert logits_tokens == tokens > 64
    assert classes == 128256
    assert tokens * 128256 * 4 <= mebibytes << 20 < (tokens + 32) * 128256 * 4


def test_a_tile_holds_all_tokens_and_the_classes_of_one_product():
    assert SIZES.tiles(_head(8192, 128256, 512), together=False) == (8192, 1024, 1536)
    assert SIZES.tiles(_head(10, 100, 512), together=False) == (10, 10, 100)
    assert SIZES.tiles(_head(10, 0, 512), together=False).classes == 1


def test_tiles_of_many_tokens_are_narrow():
    assert SIZES.tiles(_head(16384, 128256, 512), together=False).classes == 768
    assert SIZES.tiles(_head(1 << 20, 128256, 512), together=False).classes == 256
    on_gpu = _head(8192, 128256, 512)._replace(device=torch.device("cuda"))
    assert SIZES.tiles(on_gpu, together=False).classes * 8192 * 4 == 512 << 20


def test_together_puts_all_logits_into_one_block_if_they_fit():
    assert SIZES.tiles(_head(300, 32000, 512), together=True) == (300, 300, 32000)
    assert SIZES.tiles(_head(300, 32000, 512), together=False).classes == 1536
    assert SIZES.tiles(_head(3000, 32000, 512), together=True).classes == 1536
