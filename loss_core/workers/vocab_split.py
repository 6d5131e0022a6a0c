"""A call split over ranks by its vocabulary, and the results of the ranks, merged."""

# V = vocabulary, R = tensor-parallel ranks

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.dispatch.protocol import Evaluation
from loss_core.losses.definition import need_definition


def vocab_axes(config: Any) -> dict[str, int]:
    """Axis over the vocabulary, 0 or -1, by argument name; the other arguments are the same on every rank."""
    return need_definition(config).vocab_axes


def vocab_size(config: Any, arrays: Mapping[str, NDArray[Any]]) -> int:
    """Size of the vocabulary of a call, from its arguments by name."""
    return int(next(arrays[name].shape[axis] for name, axis in vocab_axes(config).items() if name in arrays))


def splits(vocab: int, ranks: int) -> dict[str, tuple[int, ...]]:
    """Ways to share a vocabulary: name -> size of each rank's shard, in rank order.

    >>> splits(6, 3)
    {'even': (2, 2, 2), 'uneven': (1, 2, 3), 'empty': (3, 3, 0)}
    >>> splits(507, 2)
    {'uneven': (169, 338), 'empty': (507, 0)}
    >>> splits(507, 1)
    {'whole': (507,)}
    """
    if ranks == 1:
        return {"whole": (vocab,)}
    found = {"even": (vocab // ranks,) * ranks} if vocab % ranks == 0 else {}
    # Sizes in the proportion 1 : 2 : 3 ..., so that no rank's offset is a multiple of its own size.
    ends = [vocab * i * (i + 1) // (ranks * (ranks + 1)) for i in range(ranks + 1)]
    found["uneven"] = tuple(b - a for a, b in itertools.pairwise(ends))
    found["empty"] = (*(len(part) for part in np.array_split(np.arange(vocab), ranks - 1)), 0)
    return found


def shard(axis: int | None, array: NDArray[Any], sizes: Sequence[int], rank: int) -> NDArray[Any]:
    """The part of an argument, or of its gradient, that a rank holds: a view.

    Args:
        axis: over the vocabulary, 0 or -1; None for an argument that every rank holds whole.
    """
    if axis is None:
        return array
    start = sum(sizes[:rank])
    part = slice(start, start + sizes[rank])
    return array[part] if axis == 0 else array[..., part]


def merge(config: Any, of_ranks: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of the whole problem from those of the ranks, in rank order.

    Shards of gradients are joined. What every rank holds whole must be bitwise the same on all of them; the names of
    what is not are in `ranks_differ`.
    """
    first, axes = of_ranks[0], vocab_axes(config)
    grads, differ = {}, []
    for name, grad in first.grads.items():
        if name in axes:
            grads[name] = np.concatenate([found.grads[name] for found in of_ranks], axis=axes[name])
            continue
        grads[name] = grad
        differ += [name] if _differ([found.grads[name] for found in of_ranks]) else []
    if _differ([found.loss for found in of_ranks]):
        differ.insert(0, "loss")
    mutated = tuple(dict.fromkeys(name for found in of_ranks for name in found.mutated))
    kernel = " and ".join(dict.fromkeys(found.kernel for found in of_ranks))
    return replace(first, grads=grads, mutated=mutated, ranks_differ=tuple(differ), kernel=kernel)


def _differ(values: Sequence[NDArray[np.float64]]) -> bool:
    # Bytes, so that a NaN equals itself and -0 is not 0.
    return any(value.tobytes() != values[0].tobytes() for value in values)
