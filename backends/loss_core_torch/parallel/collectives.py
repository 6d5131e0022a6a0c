"""The collectives of a call: all-gathers of row terms and of hidden states, sums over ranks, and the sharded weight.

Every rank folds the same terms in the same order, so the loss is bitwise the same on all of them.
"""

# T = tokens, R = ranks

from __future__ import annotations

from functools import reduce
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from loss_core import row_terms
from loss_core.row_terms import MixtureTerms, PairTerms, RowTerms
from loss_core_torch import compat

Terms = TypeVar("Terms", RowTerms, PairTerms)


def fold_mixture(terms: MixtureTerms, group: Any) -> MixtureTerms:
    """Mixture terms of full rows on every rank, from one all-gather; None as in `fold`."""
    if group is None:
        return terms
    return MixtureTerms(*reduce(torch.add, gather_equal(torch.stack(tuple(terms)), group)))


def fold(terms: Terms, group: Any, bad_T: Tensor | None = None) -> Terms:
    """Terms of full rows on every rank, from one all-gather.

    Args:
        terms: of this rank's part of the rows, [T] each, or [T, K], with the same T on every rank. None stays None.
        group: over which the rows are sharded; None: they are full.
        bad_T: [T] bool, tokens whose terms become NaN on every rank, or None.
    """
    if group is None:
        return terms
    combine: Any = row_terms.combine if isinstance(terms, RowTerms) else row_terms.combine_pairs
    present = {name: value for name, value in zip(terms._fields, terms, strict=True) if value is not None}
    # [T, K] terms are packed as K rows of [T].
    flat = [x_T.t() if x_T.dim() == 2 else x_T[None] for x_T in present.values()]
    packed = torch.cat(flat)
    if bad_T is not None:
        packed = packed.masked_fill(bad_T, torch.nan)

    def unpacked(part: Tensor) -> Terms:
        values = zip(part.split([len(x) for x in flat]), present.values(), strict=True)
        return terms._replace(**dict(zip(present, (x.t() if y.dim() == 2 else x[0] for x, y in values), strict=True)))

    return reduce(lambda a, b: combine(torch, a, b), map(unpacked, gather_equal(packed, group)))


def gather_equal(part: Tensor, group: Any) -> Tensor:
    """The tensors of all ranks, which have the same shape, as [R, ...] in rank order. One collective."""
    part = part.contiguous()
    gathered = part.new_empty((dist.get_world_size(group), *part.shape))
    compat.all_gather(gathered.view(-1), part.view(-1), group)
    return gathered


def gather_shares(share: Tensor, dim: int, group: Any) -> Tensor:
    """The full tensor, from the equal shares of the ranks along `dim`, in rank order. One collective."""
    return gather_equal(share, group).movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter_shares(full: Tensor, shape: torch.Size, dim: int, group: Any) -> Tensor:
    """The sum over the ranks of this rank's share: the reverse of `gather_shares`. One collective.

    Args:
        full: the full tensor, in any shape.
        shape: of a share.
    """
    ranks = dist.get_world_size(group)
    shares_R = full.view(*shape[:dim], ranks, *shape[dim:]).movedim(dim, 0).contiguous()
    share = full.new_empty(shape)
    compat.reduce_scatter(share.view(-1), shares_R.view(-1), group)
    return share


class SumOverRanks(Function):
    """Sum over the ranks of groups, in rank order. The gradient of each rank's part is that of the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, groups: tuple[Any, ...]) -> Tensor:
        for group in groups:
            part = reduce(torch.add, gather_equal(part, group))
        return part

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def materialize(lm_weight: Any, grad_reduce_group: Any) -> Any:
    """The full weight of a sharded head; see FusedLinearCrossEntropy.materialize_lm_weight."""
    if not hasattr(lm_weight, "full_tensor"):
        return lm_weight
    if not (torch.is_grad_enabled() and lm_weight.requires_grad):
        return lm_weight.full_tensor()
    mesh_size = lm_weight.device_mesh.size()
    check_reduce_group(grad_reduce_group, mesh_size, "mesh size", "the weight is sharded and the tokens differ")
    if mesh_size == 1:
        return lm_weight.full_tensor()
    from torch.distributed.tensor import Partial

    # Partial: the backward reduce-scatters this rank's full gradient into the shards.
    weight = lm_weight.full_tensor(grad_placements=[Partial()] * lm_weight.device_mesh.ndim)
    weight.register_hook(lambda grad: grad / mesh_size)
    return weight


def check_reduce_group(group: Any, size: int, of: str, where: str) -> None:
    """Refuse a grad_reduce_group whose size is not `size`, the number of ranks that reduce the weight's gradient.

    Args:
        group: None is one process.
        of: name of the size, for the message.
        where: what the ranks of the right group have in common, for the message.
    """
    group_size = 1 if group is None else dist.get_world_size(group)
    if group_size != size:
        raise ValueError(
            "FusedLinearCrossEntropy needs a grad_reduce_group that matches the mesh of the sharded lm_weight: "
            f"{of}={size}, reduction group size={group_size}. Pass the process group over which {where}."
        )
