"""A benchmark's call over ranks that share the vocabulary: which rank holds what, and their results, merged."""

# T = tokens, V = vocabulary, H = hidden, R = tensor-parallel ranks, n = sampled tokens

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.float64]]


def rank_sizes(vocab: int, ranks: int) -> tuple[int, ...]:
    """Classes of each rank, in rank order, as torch.chunk and DTensor split them: the last ranks have fewer, or none.

    >>> rank_sizes(12, 4), rank_sizes(10, 4), rank_sizes(2, 3)
    ((3, 3, 3, 3), (3, 3, 3, 1), (1, 1, 0))
    """
    most = -(-vocab // ranks)
    return tuple(min(most, max(vocab - rank * most, 0)) for rank in range(ranks))


def views(of_ranks: Sequence[Arrays], axes: Mapping[str, int], trained: Sequence[str]) -> list[Arrays]:
    """The results of the whole call as each rank sees them; one entry where all see the same.

    Parts of gradients by the vocabulary are concatenated, and inner products with them summed. Of what every
    rank holds whole, each entry has another rank's copy: one that is wrong on a single rank must be found.

    Args:
        of_ranks: of each process, in rank order: loss and gradients by argument name, "rows" and "inner" as
            `loss_core.bench.measure.processes.Prepared.sample` has them.
        axes: axis over the vocabulary, by name of the arguments that are sharded.
        trained: arguments with a gradient, in the order of "inner"; "rows" are those of the first.
    """
    if len(of_ranks) == 1:
        return list(of_ranks)
    joined: Arrays = {}
    for name in of_ranks[0]:
        axis = axes.get(trained[0] if name == "rows" else name)
        if axis is not None:
            joined[name] = np.concatenate([found[name] for found in of_ranks], axis=axis)
    seen: list[Arrays] = []
    for found in of_ranks:
        whole = {name: value for name, value in found.items() if name not in joined}
        if "inner" in whole:
            total = np.sum([other["inner"] for other in of_ranks], axis=0)
            whole["inner"] = np.where([name in axes for name in trained], total, whole["inner"])
        if not any(all(np.array_equal(whole[name], other[name], equal_nan=True) for name in whole) for other in seen):
            seen.append({**joined, **whole})
    return seen
