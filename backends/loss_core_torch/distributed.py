"""Vocabulary sharded over a process group: one all-gather of the packed row state, folded in rank order.

Every rank folds the same states in the same order, so the loss is bitwise the same on all of them.
The backward is local, given the state of the whole row. Shards must be of equal size here.
"""

# T = tokens, R = ranks, V = vocabulary of this rank

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from loss_core import row_stats
from loss_core_torch import values

State = TypeVar("State", row_stats.RowState, row_stats.KDRowState)


def check_group(group: Any) -> None:
    """Raise for something that is no usable process group."""
    if group is None:
        return
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "tp_group is given but torch.distributed is not initialised; "
            "call torch.distributed.init_process_group first."
        )
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"tp_group must be a torch.distributed.ProcessGroup, got {type(group).__name__}. "
            "From a 1-D DeviceMesh: mesh.get_group()."
        )


def vocab_start(vocab: int, group: Any) -> int:
    """First class of this rank, for equal shards in rank order."""
    return 0 if group is None else dist.get_rank(group) * vocab


def total_vocab(vocab: int, group: Any) -> int:
    """Classes over all ranks, for equal shards."""
    return vocab if group is None else dist.get_world_size(group) * vocab


def fold(state: State, combine: Callable[[Any, State, State], State], vocab: int, group: Any) -> State:
    """The state of the whole row on every rank.

    Args:
        state: this rank's parts, [T] each.
        combine: of `loss_core.row_stats`.
        vocab: classes of this rank.
    Raises:
        ValueError: on every rank, when the shards are not of equal size.
    """
    ranks = dist.get_world_size(group)
    # One more row carries the shard's size, so that unequal shards are noticed without a further collective.
    size = state[0].new_full((len(state), 1), float(vocab))
    packed: torch.Tensor = torch.cat([torch.stack(tuple(state)), size], dim=1).contiguous()
    gathered = packed.new_empty((ranks, *packed.shape))
    # torch 2.13 renamed the collective and warns about the old name.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(gathered.view(-1), packed.view(-1), group=group)
    sizes_R = gathered[:, 0, -1]
    if values.may_read(sizes_R) and bool((sizes_R != sizes_R[0]).any()):
        raise ValueError(
            f"Vocabulary shards must be of equal size; the ranks hold {[int(n) for n in sizes_R]} classes. Pad the "
            "head to a multiple of the group's size, with -inf logits for the classes that do not exist."
        )
    # Where the sizes can't be read without a sync, unequal ones make every loss NaN, never a plausible number.
    equal = (sizes_R == sizes_R[0]).all()
    kind = type(state)
    whole = reduce(lambda a, b: combine(torch, a, b), (kind(*rank[:, :-1]) for rank in gathered))
    return kind(*(torch.where(equal, part, torch.nan) for part in whole))


def materialize(lm_weight: Any, grad_reduce_group: Any) -> Any:
    """The whole weight of a sharded head; see FusedLinearCrossEntropy.materialize_lm_weight."""
    if not hasattr(lm_weight, "full_tensor"):
        return lm_weight
    if not (torch.is_grad_enabled() and lm_weight.requires_grad):
        return lm_weight.full_tensor()
    mesh_size = lm_weight.device_mesh.size()
    group_size = 1 if grad_reduce_group is None else dist.get_world_size(grad_reduce_group)
    if mesh_size != group_size:
        raise ValueError(
            "FusedLinearCrossEntropy needs a grad_reduce_group that matches the mesh of the sharded lm_weight: "
            f"mesh size={mesh_size}, reduction group size={group_size}. Pass the process group over which the "
            "weight is sharded and the tokens differ."
        )
    if mesh_size == 1:
        return lm_weight.full_tensor()
    from torch.distributed.tensor import Partial

    # Partial: the backward reduce-scatters this rank's full gradient into the shards.
    weight = lm_weight.full_tensor(grad_placements=[Partial()] * lm_weight.device_mesh.ndim)
    weight.register_hook(lambda grad: grad / group_size)
    return weight
