"""Vocabulary sharded over a process group: one all-gather of the packed row state, folded in rank order.

Every rank folds the same states in the same order, so the loss is bitwise the same on all of them.
The backward is local, given the state of the whole row.
"""

# T = tokens, R = ranks, V = vocabulary of this rank

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh

from loss_core import row_stats
from loss_core_torch import agreement, values
from loss_core_torch.checks import Tokens

State = TypeVar("State", row_stats.RowState, row_stats.KDRowState)


@dataclass(frozen=True)
class Shards:
    """Where this rank's part of the vocabulary lies.

    Attributes:
        group: process group over which it is sharded.
        start: first class of this rank.
        total: classes of all ranks.
        even: every rank holds as many, in the order of the group.
    """

    group: Any
    start: int
    total: int
    even: bool


@dataclass(frozen=True)
class Ranks:
    """Who takes part in a call.

    Attributes:
        vocab: group over which the vocabulary is sharded, or None.
        place: of this rank's part in the order of the parts.
        tokens: groups over which the tokens are sharded, whose losses are added up.
        others: groups that must not part when a rank fails: those of further collectives.
    """

    vocab: Any = None
    place: int = 0
    tokens: tuple[Any, ...] = ()
    others: tuple[Any, ...] = ()

    def alone(self) -> bool:
        """Whether nobody else needs to know what this rank does."""
        return self.vocab is None and not self.tokens and not self.others


def resolve_group(tp_group: Any) -> tuple[Any, int]:
    """The process group of a `tp_group`, None where it has one rank only, and this rank's place in it.

    Raises:
        ValueError: it is no group, not initialised, of several dimensions, or this rank is not in it.
    """
    if tp_group is None:
        return None, 0
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "tp_group is given but torch.distributed is not initialised; "
            "call torch.distributed.init_process_group first."
        )
    if isinstance(tp_group, DeviceMesh):
        if tp_group.ndim != 1:
            raise ValueError(
                f"tp_group must be a 1-D DeviceMesh, got one with the dimensions {tp_group.mesh_dim_names or ''} of "
                f"sizes {tuple(tp_group.shape)}. Take the one that shards the vocabulary, such as mesh['tp']."
            )
        return mesh_group(tp_group, 0)
    if tp_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(_not_a_member())
    if not isinstance(tp_group, dist.ProcessGroup):
        raise ValueError(
            f"tp_group must be a torch.distributed.ProcessGroup or a 1-D DeviceMesh, got {type(tp_group).__name__}."
        )
    try:
        rank, ranks = dist.get_rank(tp_group), dist.get_world_size(tp_group)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"tp_group is a process group that torch.distributed does not know: {error}") from error
    if rank < 0:
        raise ValueError(_not_a_member())
    return (tp_group, rank) if ranks > 1 else (None, 0)


def mesh_group(mesh: Any, dim: int) -> tuple[Any, int]:
    """As `resolve_group`, for a dimension of a mesh. A mesh may list its ranks in an order of its own."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(_not_a_member())
    return (mesh.get_group(dim), coordinate[dim]) if mesh.size(dim) > 1 else (None, 0)


def _not_a_member() -> str:
    return (
        f"Rank {dist.get_rank()} is not in the group over which the vocabulary is sharded. Call the loss on the "
        "members of tp_group only, each with its own group."
    )


def agree(
    ranks: Ranks, what: str, like: Any, vocab_dim: int, ignore_index: int, check: Callable[[], Tokens]
) -> tuple[Tokens, Shards | None]:
    """Check the arguments on every rank, and learn where this rank's part of the vocabulary begins.

    Where values may be read, the ranks exchange at each call what they are about to do, labels included; elsewhere
    only once for each set of shapes, and a label that is no class becomes NaN.

    Args:
        what: the loss and its settings, which must be the same everywhere.
        like: this rank's logits or weight, not checked yet; vocab_dim: its dimension over the vocabulary.
        check: looks at this rank's arguments; may raise.
    Raises:
        ValueError: on every rank, where the arguments of any rank can't be used, or do not fit those of another.
    """
    is_tensor = isinstance(like, Tensor) and like.dim() > 0
    vocab, dtype = (like.shape[vocab_dim], str(like.dtype)) if is_tensor else (0, "")
    tokens, problem, own = None, None, None
    readable = not is_tensor or values.may_read(like)
    tell = agreement.exchange if readable else agreement.remembered
    try:
        tokens = check()
    # Whatever it is, the others must hear of it before it is raised.
    except Exception as error:
        own, problem = error, f"{type(error).__name__}: {error}"
        if not readable and any(agreement.has_agreed(g) for g in (ranks.vocab, *ranks.tokens, *ranks.others) if g):
            # The others know these shapes and will not come to an exchange.
            raise
    message = {"what": what, "vocab": vocab, "place": ranks.place, "dtype": dtype, "problem": problem}
    if tokens is not None:
        message |= {"shape": list(tokens.shape)} | (_values(tokens) if readable else {})
    ranks_of_vocab = [message] if ranks.vocab is None else tell(ranks.vocab, message)
    problem = _problem(ranks_of_vocab, ignore_index)
    for group in (*ranks.tokens, *ranks.others):
        found = tell(group, {"what": what, "problem": problem})
        problem = _first_problem(found) or agreement.differing(found, ("what",))
    if own is not None:
        raise own
    if problem is not None:
        raise ValueError(problem)
    assert tokens is not None
    if ranks.vocab is None:
        return tokens, None
    sizes = [message["vocab"] for message in sorted(ranks_of_vocab, key=lambda m: m["place"])]
    in_order = all(message["place"] == rank for rank, message in enumerate(ranks_of_vocab))
    even = in_order and all(size == vocab for size in sizes)
    return tokens, Shards(ranks.vocab, sum(sizes[: ranks.place]), sum(sizes), even)


def _values(tokens: Tokens) -> dict[str, Any]:
    """What the ranks must have in common beside shapes: a checksum of each input, the ends of the labels."""
    message: dict[str, Any] = {"count": None if tokens.num_tokens is None else float(tokens.num_tokens)}
    labels_T = torch.where(tokens.keep_T, tokens.labels_T, 0)
    for name, value in (("labels", labels_T), ("labels and mask", tokens.keep_T), ("loss_weights", tokens.weights_T)):
        if value is not None:
            message[name] = zlib.crc32(value.detach().contiguous().view(torch.uint8).numpy().data)
    if labels_T.numel():
        for name, at in (("low", labels_T.argmin()), ("high", labels_T.argmax())):
            message[name] = [list(_position(int(at), tokens.shape)), int(labels_T[at])]
    return message


def _position(index: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(index), shape)) if shape else ()


def _first_problem(messages: Sequence[dict[str, Any]]) -> str | None:
    for rank, message in enumerate(messages):
        if message["problem"] is not None:
            return _on_rank(rank, message["problem"], len(messages))
    return None


def _on_rank(rank: int, text: str, ranks: int) -> str:
    """Says where, unless an inner group has said so, or this rank is alone."""
    return text if ranks == 1 or text.startswith("On rank ") else f"On rank {rank} of the group: {text}"


def _problem(messages: Sequence[dict[str, Any]], ignore_index: int) -> str | None:
    """What stands in the way of a call, the same text on every rank; None if nothing does."""
    problem = _first_problem(messages) or agreement.differing(messages, ("what", "shape", "dtype"))
    if problem is not None:
        return problem
    total = sum(message["vocab"] for message in messages)
    for rank, message in enumerate(messages):
        for position, label in (message[end] for end in ("low", "high") if end in message):
            if not 0 <= label < total:
                text = (
                    f"labels{position} is {label}, which is neither a class in [0, {total}) nor ignore_index "
                    f"({ignore_index})."
                )
                return _on_rank(rank, text, len(messages))
    for name in ("labels", "labels and mask", "loss_weights"):
        sums = [message.get(name) for message in messages]
        other = next((rank for rank, value in enumerate(sums) if value != sums[0]), None)
        if other is not None:
            return (
                f"{name} must be the same on every rank of the group over which the vocabulary is sharded; those of "
                f"rank {other} differ from those of rank 0."
            )
    return agreement.differing(messages, ("count",))


def fold(state: State, combine: Callable[[Any, State, State], State], group: Any, bad_T: Tensor | None = None) -> State:
    """The state of the whole row on every rank.

    Args:
        state: this rank's parts, [T] each; as many tokens on every rank.
        combine: of `loss_core.row_stats`.
        bad_T: tokens that are to be NaN on every rank, or None.
    """
    packed = torch.stack(tuple(state))
    if bad_T is not None:
        packed = packed.masked_fill(bad_T, torch.nan)
    gathered = gather_equal(packed, group)
    kind = type(state)
    return reduce(lambda a, b: combine(torch, a, b), (kind(*rank) for rank in gathered))


def gather_equal(packed: Tensor, group: Any) -> Tensor:
    """[R, ...]: the tensors of all ranks, which have one shape, in rank order. One collective."""
    packed = packed.contiguous()
    gathered = packed.new_empty((dist.get_world_size(group), *packed.shape))
    # torch 2.13 renamed the collective and warns about the old name.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(gathered.view(-1), packed.view(-1), group=group)
    return gathered


class SumOverRanks(Function):
    """Sum over the ranks of groups, in rank order. Each rank's part gets the gradient of the sum as it is."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, groups: tuple[Any, ...]) -> Tensor:
        for group in groups:
            part = reduce(torch.add, gather_equal(part, group))
        return part

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


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
