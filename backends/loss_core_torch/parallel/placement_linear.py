"""The layout of hidden states and the head's weight over ranks: tensor parallel, FSDP, both, or neither."""

# V = vocabulary, H = hidden

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from loss_core_torch import compat
from loss_core_torch.parallel import placement
from loss_core_torch.parallel.collectives import check_reduce_group
from loss_core_torch.parallel.placement import Layout, Ranks, is_dtensor

# The mesh dimension of this name is the tensor-parallel one.
_TENSOR_PARALLEL = "tp"


@dataclass(frozen=True)
class LinearLayout:
    """Layout of a fused call.

    Attributes:
        tokens: the layout of the tokens, as for logits.
        redistribute: the weight is a DTensor whose rows of this rank `local_weight` returns.
        vocab_dim: dimension of the weight's mesh over which its rows stay sharded, or None.
        sequence_dim: dimension of hidden_states that is sharded over the group of the vocabulary, or None.
        partial_dims: dimensions of the weight's mesh over which the tokens, and so the ranks' gradients, differ.
        mean_size: divisor of the sum of these gradients.
    """

    tokens: Layout
    redistribute: bool = False
    vocab_dim: int | None = None
    sequence_dim: int | None = None
    partial_dims: tuple[int, ...] = ()
    mean_size: int = 1


def of_linear(hidden: Any, weight: Any, tp_group: Any, grad_reduce_group: Any, sequence_parallel: bool) -> LinearLayout:
    """The layout of hidden_states [..., H] and lm_weight [V, H].

    Raises:
        ValueError: on every rank, for placements that are not supported, or that contradict the groups.
    """
    group, index = placement.resolve_group(tp_group)
    hidden_tokens = _token_placements(hidden) if is_dtensor(hidden) else ()
    if not is_dtensor(weight):
        return _with_plain_weight(hidden, hidden_tokens, Ranks(group, index), sequence_parallel)
    _check_weight(weight)
    mesh = weight.device_mesh
    if is_dtensor(hidden) and group is None and hidden.device_mesh.ndim == 1:
        group, index = placement.mesh_group(hidden.device_mesh, 0)
    dim = _vocab_dim(weight, hidden, group, tp_group is not None)
    group, index = (None, 0) if dim is None else placement.mesh_group(mesh, dim)
    ranks = Ranks(group, index, classes=weight.shape[0])
    if is_dtensor(hidden) and hidden.device_mesh == mesh:
        return _on_same_mesh(hidden, hidden_tokens, weight, dim, ranks, sequence_parallel)
    if dim is None:
        if is_dtensor(hidden):
            raise ValueError(
                f"hidden_states has the placements {hidden.placements} on {hidden.device_mesh}, which do not tell how "
                f"the vocabulary of lm_weight ({weight.placements} on {mesh}) is sharded. Pass tp_group, or "
                "hidden_states.to_local()."
            )
        return LinearLayout(Layout(Ranks()))
    plain = _with_plain_weight(hidden, hidden_tokens, ranks, sequence_parallel)
    others = tuple(d for d in range(mesh.ndim) if d != dim and mesh.size(d) > 1)
    gathered = any(not weight.placements[d].is_replicate() for d in others)
    trainable = torch.is_grad_enabled() and weight.requires_grad
    if not (others and trainable and (gathered or grad_reduce_group is not None)):
        return replace(plain, redistribute=True, vocab_dim=dim)
    size = mesh.size() // mesh.size(dim)
    check_reduce_group(grad_reduce_group, size, "mesh size without its tensor-parallel dimension", "the tokens differ")
    tokens = replace(plain.tokens, ranks=replace(plain.tokens.ranks, grad_reduce=(grad_reduce_group,)))
    return replace(plain, tokens=tokens, redistribute=True, vocab_dim=dim, partial_dims=others, mean_size=size)


def of_heads(
    student: tuple[Any, Any], teacher: tuple[Any, Any], tp_group: Any, sequence_parallel: bool
) -> tuple[LinearLayout, LinearLayout]:
    """The layouts of hidden states and weight of student and teacher.

    Raises:
        ValueError: as `of_linear`, or where the two shard vocabulary or tokens differently.
    """
    layouts = tuple(of_linear(*head, tp_group, None, sequence_parallel) for head in (student, teacher))
    ranks = [layout.tokens.ranks for layout in layouts]
    groups = [[r.vocab, *r.tokens] for r in ranks]
    members = [[None if g is None else dist.get_process_group_ranks(g) for g in of_head] for of_head in groups]
    if members[0] != members[1] or ranks[0].shard_index != ranks[1].shard_index:
        raise ValueError(
            f"The student's hidden_states and lm_weight lie as {_placements(student)}, but the teacher's as "
            f"{_placements(teacher)}; both must shard the vocabulary over the same ranks, and the tokens over the same "
            "ranks."
        )
    return layouts[0], layouts[1]


def _placements(head: tuple[Any, Any]) -> str:
    """The placements of hidden states and weight, for messages."""
    return " and ".join(str(x.placements) if is_dtensor(x) else "a plain tensor" for x in head)


def _on_same_mesh(
    hidden: Any, hidden_tokens: tuple[Any, ...], weight: Any, dim: int | None, ranks: Ranks, sequence_parallel: bool
) -> LinearLayout:
    """The layout of DTensors on one mesh: the loss is that of the tokens of all ranks."""
    mesh = hidden.device_mesh
    sequence_dim = None if dim is None else _sequence_dim(hidden_tokens[dim], sequence_parallel)
    tokens = tuple(_replicate() if at == dim else p for at, p in enumerate(hidden_tokens))
    partial = tuple(at for at, p in enumerate(tokens) if p.is_shard() and mesh.size(at) > 1)
    ranks = replace(ranks, tokens=placement.token_groups(mesh, tokens))
    return LinearLayout(Layout(ranks, mesh, tokens, tuple(hidden.shape[:-1])), True, dim, sequence_dim, partial)


def local_weight(layout: LinearLayout, weight: Any) -> Any:
    """This rank's rows of the weight, gathered over all mesh dimensions but that of the vocabulary.

    The gradient is reduced over the mesh dimensions over which the tokens differ: a sum where the hidden states are a
    DTensor on the same mesh, whose loss is that of all tokens; else a mean, as in FSDP.
    """
    from torch.distributed.tensor import Partial, Replicate

    rows = [p if at == layout.vocab_dim else Replicate() for at, p in enumerate(weight.placements)]
    # Needed without a gather as well: the backward of redistribute reduces a partial gradient.
    gathered = weight.redistribute(weight.device_mesh, rows)
    grads = [Partial() if at in layout.partial_dims else p for at, p in enumerate(rows)]
    local = gathered.to_local(grad_placements=grads)
    if layout.mean_size > 1:
        local.register_hook(lambda grad: grad / layout.mean_size)
    return local


def full_lead(layout: LinearLayout, hidden: Any) -> torch.Size:
    """Leading shape of the hidden states of the full sequence.

    Raises:
        ValueError: the ranks do not hold equal shares of the sequence.
    """
    lead = list(hidden.shape[:-1])
    dim, tokens = layout.sequence_dim, layout.tokens
    if dim is None:
        return torch.Size(lead)
    if not lead:
        raise ValueError("hidden_states must have a sequence dimension for sequence_parallel, got shape [H].")
    ranks = dist.get_world_size(tokens.ranks.vocab)
    lead[dim] *= ranks
    if tokens.mesh is not None and tokens.lead[dim] % ranks:
        raise ValueError(
            f"hidden_states is sharded over a sequence of {tokens.lead[dim]} tokens on {ranks} ranks; they must hold "
            f"equal shares. Pad the sequence to a multiple of {ranks}."
        )
    return torch.Size(lead)


def _with_plain_weight(
    hidden: Any, hidden_tokens: tuple[Any, ...], ranks: Ranks, sequence_parallel: bool
) -> LinearLayout:
    group = ranks.vocab
    if sequence_parallel and group is None and not is_dtensor(hidden):
        # One rank holds the full sequence.
        return LinearLayout(Layout(Ranks()))
    if not is_dtensor(hidden):
        return LinearLayout(Layout(ranks), sequence_dim=0 if sequence_parallel else None)
    mesh = hidden.device_mesh
    of_group = [d for d in range(mesh.ndim) if group is not None and _is_group(mesh, d, group)]
    elsewhere = [p for d, p in enumerate(hidden_tokens) if d not in of_group and p.is_shard() and mesh.size(d) > 1]
    if elsewhere:
        raise ValueError(
            f"hidden_states has the placements {hidden.placements}, so lm_weight must be a DTensor on the same mesh "
            "for its gradient to be that of all tokens. Make it one, or pass hidden_states.to_local()."
        )
    sequence_dim = _sequence_dim(hidden_tokens[of_group[0]], sequence_parallel) if of_group else None
    tokens = tuple(_replicate() for _ in hidden_tokens)
    return LinearLayout(Layout(ranks, mesh, tokens, tuple(hidden.shape[:-1])), sequence_dim=sequence_dim)


def _token_placements(hidden: Any) -> tuple[Any, ...]:
    over_hidden, tokens = placement.sorted_dims("hidden_states", hidden, hidden.dim() - 1)
    if over_hidden:
        raise ValueError(
            f"hidden_states has the placements {hidden.placements}, which shard its last dimension; it must be whole."
        )
    return tokens


def _check_weight(weight: Any) -> None:
    if any(p.is_partial() for p in weight.placements):
        raise ValueError(
            f"lm_weight has the placements {weight.placements}; Shard and Replicate are accepted. Make it so with "
            "lm_weight.redistribute(...) first."
        )


def _vocab_dim(weight: Any, hidden: Any, group: Any, named: bool) -> int | None:
    """The dimension of the weight's mesh over which the loss is tensor parallel; None for a weight to be gathered.

    Args:
        group: of tp_group, or of the mesh of hidden states.
        named: the group is that of tp_group.
    """
    mesh, names = weight.device_mesh, weight.device_mesh.mesh_dim_names or ()
    rows = [d for d, p in enumerate(weight.placements) if placement.shards_dim(p, 0) and mesh.size(d) > 1]
    if group is not None:
        found = [d for d in rows if _is_group(mesh, d, group)]
        if named and not found:
            raise ValueError(
                f"lm_weight has the placements {weight.placements} on {mesh}: its vocabulary (dimension 0) is not "
                "sharded over tp_group. Shard it there, or leave tp_group out."
            )
        if found:
            return found[0]
    if any(name == _TENSOR_PARALLEL for name in names):
        dim = names.index(_TENSOR_PARALLEL)
        if dim in rows:
            return dim
        if mesh.size(dim) > 1 and not weight.placements[dim].is_replicate():
            raise ValueError(
                f"lm_weight has the placements {weight.placements}; over the mesh dimension {_TENSOR_PARALLEL!r} it "
                "must be sharded on the vocabulary, Shard(0)."
            )
    plain = [d for d in rows if not compat.is_strided_shard(weight.placements[d])]
    if len(plain) == 1 and len(rows) > 1:
        # FSDP marks with a strided shard the mesh dimensions over which it shards a dimension that was sharded already.
        return plain[0]
    if is_dtensor(hidden) and hidden.device_mesh == mesh:
        replicated = [d for d in rows if hidden.placements[d].is_replicate()]
        for found in (replicated, rows):
            if len(found) == 1:
                return found[0]
    return None


def _is_group(mesh: Any, dim: int, group: Any) -> bool:
    found, _ = placement.mesh_group(mesh, dim)
    return found is not None and placement.same_ranks(found, group)


def _sequence_dim(found: Any, sequence_parallel: bool) -> int | None:
    if found.is_shard():
        return int(found.dim)
    if sequence_parallel:
        raise ValueError(
            "sequence_parallel=True, but hidden_states is a DTensor that is replicated over the tensor-parallel "
            "dimension of its mesh. Leave sequence_parallel out: the placement says it."
        )
    return None


def _replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()
