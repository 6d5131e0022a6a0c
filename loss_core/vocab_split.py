"""A call cut over ranks that share the vocabulary, and what the ranks found put together again."""

# T = tokens, V = vocabulary, H = hidden, R = tensor-parallel ranks

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.backend import Evaluation

# The axis of each argument that runs over the vocabulary; the others are the same on every rank.
VOCAB_AXIS = {"logits": -1, "student_logits": -1, "teacher_logits": -1, "lm_weight": 0}


def vocab_size(arrays: Mapping[str, NDArray[Any]]) -> int:
    """Size of the vocabulary of a call, from its arguments by name."""
    return int(next(arrays[name].shape[axis] for name, axis in VOCAB_AXIS.items() if name in arrays))


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


def shard(name: str, array: NDArray[Any], sizes: Sequence[int], rank: int) -> NDArray[Any]:
    """The part of an argument, or of its gradient, that a rank holds: a view."""
    if name not in VOCAB_AXIS:
        return array
    start = sum(sizes[:rank])
    part = slice(start, start + sizes[rank])
    return array[part] if VOCAB_AXIS[name] == 0 else array[..., part]


def together(of_ranks: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of the whole problem from those of the ranks, in rank order.

    Shards of gradients are joined. What every rank holds whole must be bitwise the same on all of them; the names of
    what is not are in `ranks_differ`.
    """
    first = of_ranks[0]
    grads, differ = {}, []
    for name, grad in first.grads.items():
        if name in VOCAB_AXIS:
            grads[name] = np.concatenate([found.grads[name] for found in of_ranks], axis=VOCAB_AXIS[name])
            continue
        grads[name] = grad
        differ += [name] if _differ([found.grads[name] for found in of_ranks]) else []
    if _differ([found.loss for found in of_ranks]):
        differ.insert(0, "loss")
    mutated = tuple(dict.fromkeys(name for found in of_ranks for name in found.mutated))
    return replace(first, grads=grads, mutated=mutated, ranks_differ=tuple(differ))


def _differ(values: Sequence[NDArray[np.float64]]) -> bool:
    # Bytes, so that a NaN equals itself and -0 is not 0.
    return any(value.tobytes() != values[0].tobytes() for value in values)
