"""A benchmark call with the vocabulary sharded over ranks: the classes of each rank, and their results, merged."""

# T = tokens, V = vocabulary, H = hidden, R = tensor-parallel ranks, n = sampled tokens

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.float64]]


def rank_sizes(vocab: int, ranks: int) -> tuple[int, ...]:
    """Count of classes on each rank, as torch.chunk and DTensor split them: the last ranks have fewer, or none.

    >>> rank_sizes(12, 4), rank_sizes(10, 4), rank_sizes(2, 3)
    ((3, 3, 3, 3), (3, 3, 3, 1), (1, 1, 0))
    """
    largest = -(-vocab // ranks)
    return tuple(min(largest, max(vocab - rank * largest, 0)) for rank in range(ranks))


def merge_ranks(per_rank: Sequence[Arrays], axes: Mapping[str, int], trained: Sequence[str]) -> list[Arrays]:
    """Results of the unsharded call, one entry for each distinct set of replicated values; one entry if ranks agree.

    Gradients sharded over the vocabulary are concatenated, and inner products with them summed. Replicated values are
    kept per rank, so that an error on a single rank is found.

    Args:
        per_rank: one entry per process, in rank order: loss and gradients by argument name, "rows" and "inner" as in
            `loss_core.bench.measure.processes.Prepared.sample`.
        axes: axis over the vocabulary, by name of the arguments that are sharded.
        trained: arguments with a gradient, in the order of "inner"; "rows" are those of the first.
    """
    if len(per_rank) == 1:
        return list(per_rank)
    gathered: Arrays = {}
    for name in per_rank[0]:
        axis = axes.get(trained[0] if name == "rows" else name)
        if axis is not None:
            gathered[name] = np.concatenate([results[name] for results in per_rank], axis=axis)
    merged: list[Arrays] = []
    for results in per_rank:
        local = {name: value for name, value in results.items() if name not in gathered}
        if "inner" in local:
            total = np.sum([other["inner"] for other in per_rank], axis=0)
            local["inner"] = np.where([name in axes for name in trained], total, local["inner"])
        if not any(all(np.array_equal(local[name], other[name], equal_nan=True) for name in local) for other in merged):
            merged.append({**gathered, **local})
    return merged
