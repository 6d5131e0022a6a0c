"""Reduction of token losses that are sharded over ranks."""

import torch

from helpers.process_group import over_processes
from loss_core_torch.inputs import Tokens
from loss_core_torch.reduction import count_valid, reduce_tokens, zero_where_ignored

LOSS_T, LABELS_T = torch.tensor([2.0, 7.0, 5.0]), torch.tensor([1, 0, 2])


@over_processes(2)
def test_sums_and_counts_of_all_ranks_add_up(world):
    # 2 + 7 of one rank, 4 of the other.
    keep_T, groups = torch.tensor([True, world.rank == 0, False]), (world.group,)
    tokens = Tokens(LABELS_T.shape, LABELS_T, keep_T)
    loss_T = zero_where_ignored(LOSS_T * (1 + world.rank), keep_T)
    assert reduce_tokens(loss_T, tokens, "sum", groups) == 13
    assert reduce_tokens(loss_T, tokens, "mean", groups) == torch.tensor(13.0) / 3
    everything = tokens._replace(keep_T=None)
    assert reduce_tokens(loss_T, everything, "mean", groups) == torch.tensor(13.0) / 6
    number = count_valid(tokens, groups)
    assert (number.dtype, int(number), int(count_valid(everything, groups))) == (torch.int64, 3, 6)
    none = tokens._replace(keep_T=torch.zeros(3, dtype=torch.bool))
    assert reduce_tokens(torch.zeros(3), none, "mean", groups) == 0
