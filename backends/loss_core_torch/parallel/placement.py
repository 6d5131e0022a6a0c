"""The layout of a call over ranks: which classes and tokens they hold, by the placements of DTensors or tp_group."""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from loss_core.field_checks import TOKEN_METRICS
from loss_core_torch import compat


@dataclass(frozen=True)
class Ranks:
    """The process groups of a call.

    Attributes:
        vocab: group over which the vocabulary is sharded, or None.
        shard_index: index of this rank's shard, in the order of the vocabulary.
        tokens: groups over which the tokens are sharded, whose losses are added up.
        grad_reduce: groups that reduce the weight's gradient in the backward: an error must reach their ranks as well.
        classes: number of classes of all ranks, where a DTensor defines it; else None.
    """

    vocab: Any = None
    shard_index: int = 0
    tokens: tuple[Any, ...] = ()
    grad_reduce: tuple[Any, ...] = ()
    classes: int | None = None


@dataclass(frozen=True)
class Layout:
    """How the tensors of a call are sharded over the ranks.

    Attributes:
        ranks: the process groups.
        mesh: of the DTensors, or None where all tensors are plain.
        tokens: placements of a tensor with one value per token, one for each dimension of the mesh.
        lead: shape of such a tensor over all ranks.
    """

    ranks: Ranks
    mesh: Any = None
    tokens: tuple[Any, ...] = ()
    lead: tuple[int, ...] = ()

    def local(self, value: Any) -> Any:
        """This rank's part of a DTensor, whose gradient is a DTensor with the same placements."""
        return value.to_local() if is_dtensor(value) else value

    def token_values(self, name: str, value: Any, local_lead: torch.Size) -> Any:
        """This rank's part of an argument with values per token, such as labels [...] or a teacher's classes [..., K].

        Args:
            value: a DTensor, or a plain tensor of this rank's tokens or of all tokens.
            local_lead: shape of this rank's tokens.
        Raises:
            ValueError: a DTensor on another mesh, or sharded in another way than the tokens.
        """
        if self.mesh is None or not isinstance(value, Tensor):
            return value
        from torch.distributed.tensor import DTensor, Replicate

        dtensor: Any = value
        if not is_dtensor(value):
            lead = value.shape[: len(self.lead)]
            if lead == local_lead or tuple(lead) != self.lead:
                return value
            dtensor = DTensor.from_local(value, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        elif dtensor.device_mesh != self.mesh:
            raise ValueError(f"{name} is a DTensor on another mesh; pass {name}.to_local() or put it on {self.mesh}.")
        for found, wanted in zip(dtensor.placements, self.tokens, strict=True):
            if found != wanted and not found.is_replicate():
                raise ValueError(
                    f"{name} has the placements {dtensor.placements}; {self.tokens} or replicated are accepted."
                )
        # Replicated to sharded: a slice, no communication.
        return dtensor.redistribute(self.mesh, self.tokens).to_local()

    def token_results(self, found: Any, labels: Any) -> Any:
        """As `token_result`, for each tensor of a tuple and each token metric of a dict."""
        if isinstance(found, Tensor):
            return self.token_result(found, labels)
        if isinstance(found, dict):
            return {name: self.token_result(x, labels) if name in TOKEN_METRICS else x for name, x in found.items()}
        parts = [None if x is None else self.token_results(x, labels) for x in found]
        return type(found)(*parts) if hasattr(found, "_fields") else tuple(parts)

    def token_result(self, loss: Tensor, labels: Any) -> Tensor:
        """The loss of each token: a DTensor where labels are one or hold all tokens, else this rank's part."""
        if self.mesh is None or not (is_dtensor(labels) or labels.shape != loss.shape):
            return loss
        from torch.distributed.tensor import DTensor

        stride = torch.empty(self.lead, device="meta").stride()
        return DTensor.from_local(
            loss, self.mesh, self.tokens, run_check=False, shape=torch.Size(self.lead), stride=stride
        )


def resolve_group(tp_group: Any) -> tuple[Any, int]:
    """The process group of a `tp_group`, None for a single rank, and the index of this rank in it.

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
    """As `resolve_group`, for a mesh dimension; the index is that in the mesh, whose order of ranks may differ."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(_not_a_member())
    return (mesh.get_group(dim), coordinate[dim]) if mesh.size(dim) > 1 else (None, 0)


def _not_a_member() -> str:
    return (
        f"Rank {dist.get_rank()} is not in the group over which the vocabulary is sharded. Call the loss on the "
        "members of tp_group only, each with its own group."
    )


def is_dtensor(value: Any) -> bool:
    """Whether a value is a DTensor, without importing the module."""
    return hasattr(value, "full_tensor")


def of_logits(name: str, logits: Any, tp_group: Any) -> Layout:
    """The layout of logits [..., V]: from the placements of a DTensor, else from tp_group.

    Raises:
        ValueError: on every rank, for placements that are not supported, or that contradict tp_group.
    """
    group, index = resolve_group(tp_group)
    if not is_dtensor(logits):
        return Layout(Ranks(group, index))
    last = logits.dim() - 1
    vocab_dims, tokens = sorted_dims(name, logits, last)
    if len(vocab_dims) > 1:
        raise ValueError(
            f"{name} has the placements {logits.placements}, which shard the vocabulary over {len(vocab_dims)} "
            "dimensions of the mesh; one is accepted."
        )
    mesh = logits.device_mesh
    if vocab_dims:
        found = mesh_group(mesh, vocab_dims[0])
        if group is not None and found[0] is not None and not same_ranks(found[0], group):
            raise ValueError(f"{name} shards its vocabulary over another group than tp_group; leave tp_group out.")
        group, index = found
    elif group is not None:
        raise ValueError(
            f"tp_group is given, but {name} has the placements {logits.placements}: no sharded vocabulary."
        )
    ranks = Ranks(group, index, token_groups(mesh, tokens), classes=logits.shape[-1])
    return Layout(ranks, mesh, tokens, tuple(logits.shape[:-1]))


def of_both(student: Any, teacher: Any, tp_group: Any) -> Layout:
    """The common layout of two logits; ValueError where they differ."""
    layout = of_logits("student_logits", student, tp_group)
    if is_dtensor(student) != is_dtensor(teacher):
        raise ValueError("student_logits and teacher_logits must both be DTensors, or both plain tensors.")
    if is_dtensor(student):
        of_logits("teacher_logits", teacher, tp_group)
        if (student.device_mesh, student.placements) != (teacher.device_mesh, teacher.placements):
            raise ValueError(
                f"student_logits has the placements {student.placements} but teacher_logits {teacher.placements}; "
                "they must match, on one mesh."
            )
    return layout


def sorted_dims(name: str, value: Any, last: int) -> tuple[list[int], tuple[Any, ...]]:
    """Mesh dimensions that shard the last dimension, and the placements of a tensor without that dimension."""
    from torch.distributed.tensor import Replicate, Shard

    vocab_dims, tokens = [], []
    for dim, placement in enumerate(value.placements):
        if type(placement) not in (Shard, Replicate):
            raise ValueError(
                f"{name} has the placements {value.placements}; Shard and Replicate are accepted. Make it so with "
                f"{name}.redistribute(...) first."
            )
        if placement.is_shard(last):
            vocab_dims.append(dim)
        tokens.append(Replicate() if placement.is_shard(last) else placement)
    return vocab_dims, tuple(tokens)


def token_groups(mesh: Any, tokens: tuple[Any, ...]) -> tuple[Any, ...]:
    """Process groups of the mesh dimensions over which tokens are sharded."""
    found = (mesh_group(mesh, dim)[0] for dim, placement in enumerate(tokens) if placement.is_shard())
    return tuple(group for group in found if group is not None)


def shards_dim(found: Any, dim: int) -> bool:
    """Whether a placement is a Shard, or FSDP's strided shard, of a tensor dimension."""
    return bool((found.is_shard() or compat.is_strided_shard(found)) and found.dim == dim)


def same_ranks(a: Any, b: Any) -> bool:
    """Whether two groups have the same members."""
    return sorted(dist.get_process_group_ranks(a)) == sorted(dist.get_process_group_ranks(b))
