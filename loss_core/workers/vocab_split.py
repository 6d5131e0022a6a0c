"""Split the arguments of a call over ranks along the vocabulary, and merge the results of the ranks."""

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
    """Argument name -> vocabulary axis, 0 or -1; the other arguments are replicated on every rank."""
    return need_definition(config).vocab_axes


def vocab_size(config: Any, arrays: Mapping[str, NDArray[Any]]) -> int:
    """Vocabulary size of a call."""
    return int(next(arrays[name].shape[axis] for name, axis in vocab_axes(config).items() if name in arrays))


def splits(vocab: int, ranks: int) -> dict[str, tuple[int, ...]]:
    """Ways to shard a vocabulary: name -> size of each rank's shard, in rank order.

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
    # Sizes in the ratio 1 : 2 : 3 ..., so that no rank's offset is a multiple of its size.
    ends = [vocab * i * (i + 1) // (ranks * (ranks + 1)) for i in range(ranks + 1)]
    found["uneven"] = tuple(b - a for a, b in itertools.pairwise(ends))
    found["empty"] = (*(len(part) for part in np.array_split(np.arange(vocab), ranks - 1)), 0)
    return found


def shard(axis: int | None, array: NDArray[Any], sizes: Sequence[int], rank: int) -> NDArray[Any]:
    """A rank's shard of an argument or gradient; a view.

    Args:
        axis: vocabulary axis, 0 or -1; None for a replicated argument.
    """
    if axis is None:
        return array
    start = sum(sizes[:rank])
    part = slice(start, start + sizes[rank])
    return array[part] if axis == 0 else array[..., part]


def merge(config: Any, of_ranks: Sequence[Evaluation]) -> Evaluation:
    """Merge the evaluations of the ranks, in rank order, into one of the unsharded call.

    Shards of gradients are concatenated. Replicated results must be bitwise equal on all ranks; the names of those that
    are not are in `ranks_differ`.
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
    # Compared as bytes, so that NaN equals itself and -0 differs from 0.
    return any(value.tobytes() != values[0].tobytes() for value in values)
