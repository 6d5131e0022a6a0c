"""Agreement of the ranks before a call, in real processes (gloo): no rank hangs, and all raise the same error."""

# T = tokens, V = vocabulary, H = hidden

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from helpers.process_group import over_processes
from loss_core import FusedLinearCEConfig, MaskedCrossEntropyConfig, TEParallelCEConfig
from loss_core_torch import compat
from loss_core_torch.parallel import agreement
from loss_core_torch.parallel.placement import Ranks


def _refused(match, call, error=ValueError):
    with pytest.raises(error, match=match):
        call()
    # The ranks still have the same count of exchanges.
    dist.barrier()


@over_processes(2, 3, 4)
def test_arguments_of_one_rank(world):
    """Arguments that do not fit together are a ValueError on every rank, and no rank hangs."""
    last = world.rank == world.ranks - 1
    own_type = TypeError if last else ValueError
    logits, labels = torch.randn(3, 5), torch.tensor([0, 1, 2])
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    longer, shorter = torch.zeros(4, dtype=torch.int64), labels[:2] if last else labels
    wrong = torch.where(torch.arange(3) == 1, 5 * world.ranks + 2, labels) if last else labels
    loss, masked, fused = (
        config(tp_group=world.group).build(backend=world.flag)
        for config in (TEParallelCEConfig, MaskedCrossEntropyConfig, FusedLinearCEConfig)
    )
    other = TEParallelCEConfig(tp_group=world.group, reduction="mean").build(backend=world.flag) if last else loss
    at = f"On rank {world.ranks - 1} of the group: labels\\[1\\] is {5 * world.ranks + 2}"
    _refused(at, lambda: loss(logits, wrong))
    _refused(at, lambda: masked(logits, wrong))
    _refused(at, lambda: fused(hidden, wrong, weight))
    _refused("labels has shape", lambda: loss(logits, shorter))
    _refused("labels has shape", lambda: fused(hidden, shorter, weight))
    _refused("shape must be the same", lambda: loss(torch.randn(4, 5), longer) if last else loss(logits, labels))
    _refused("dtype must be the same", lambda: loss(logits.double() if last else logits, labels))
    _refused("what must be the same", lambda: other(logits, labels))
    _refused("hidden_states_require_grad", lambda: fused(hidden if last else hidden.detach(), labels, weight))
    _refused("labels must be the same", lambda: loss(logits, labels.flip(0) if last else labels))
    _refused("num_valid_tokens is 2, but 3", lambda: fused(hidden, labels, weight, num_valid_tokens=2))
    _refused("count must be the same", lambda: loss(logits, labels, num_label_tokens=3 + last))
    _refused("floating|integers", lambda: loss(logits, labels.float() if last else labels), own_type)
    _refused("must be a torch.Tensor", lambda: loss([1.0] if last else logits, labels), own_type)
    # After all these, the same group still works.
    assert loss(logits, labels).isfinite()


@over_processes(2, 3, 4)
def test_placements_that_are_refused(world):
    logits, labels = torch.randn(3, 5), torch.tensor([0, 1, 2])
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    mesh = init_device_mesh("cpu", (world.ranks,))
    loss, fused = (config().build(backend=world.flag) for config in (TEParallelCEConfig, FusedLinearCEConfig))
    over_group = FusedLinearCEConfig(tp_group=world.group).build(backend=world.flag)

    def placed(x, placement):
        return DTensor.from_local(x, mesh, [placement])

    _refused("Partial", lambda: loss(placed(logits, Partial()), labels))
    _refused("Partial", lambda: fused(hidden, labels, placed(weight, Partial())))
    _refused("last dimension", lambda: fused(placed(hidden, Shard(1)), labels, placed(weight, Shard(0))))
    _refused("not sharded over tp_group", lambda: over_group(hidden, labels, placed(weight, Shard(1))))


@over_processes(2, 3, 4)
def test_shares_of_the_sequence_that_differ(world):
    loss_fn = FusedLinearCEConfig(tp_group=world.group, sequence_parallel=True).build(backend=world.flag)
    hidden = torch.randn(2 + (world.rank == world.ranks - 1), 4)
    labels = torch.zeros(2 * world.ranks + 1, dtype=torch.int64)
    _refused("equal|labels has shape", lambda: loss_fn(hidden, labels, torch.randn(5, 4)))


@over_processes(4)
def test_refusals_across_replicas(world):
    """dp x tp: an error in one replica is raised in all of them where tokens are sharded over the replicas."""
    mesh = init_device_mesh("cpu", (2, world.ranks // 2), mesh_dim_names=("dp", "tp"))
    logits = distribute_tensor(torch.randn(6, 8), mesh, [Shard(0), Shard(1)])
    labels = torch.tensor([0, 9 if world.rank == 0 else 1, 2])
    at = r"On rank 0 of the group: labels\[1\] is 9, which is neither a class in \[0, 8\)"
    loss_fn = MaskedCrossEntropyConfig().build()
    _refused(at, lambda: loss_fn(logits, labels))
    by_token = logits.redistribute(mesh, [Shard(0), Replicate()])
    _refused(at, lambda: loss_fn(by_token, torch.tensor([0, 9 if world.rank in (0, 1) else 1, 2])))
    head = DTensor.from_local(torch.randn(2, 4), mesh, [Shard(0), Shard(0)])
    fused = FusedLinearCEConfig(tp_group=mesh["tp"]).build()
    hidden = torch.randn(3, 4)
    head.requires_grad_()
    _refused(at, lambda: fused(hidden, labels, head, grad_reduce_group=mesh.get_group("dp")))


@over_processes(2, 3)
def test_a_rank_that_makes_no_call(world):
    """The others raise after the timeout of the process group and name it. The next call works on all ranks."""
    store = compat.group_store(world.group)
    before = store.timeout
    loss_fn = TEParallelCEConfig(tp_group=world.group).build()
    for late in range(world.ranks):
        store.set_timeout(timedelta(seconds=1))
        if world.rank != late:
            with pytest.raises(ValueError, match=rf"Ranks \[.*{late}.*\] of the group did not come"):
                loss_fn(torch.randn(3, 5), torch.tensor([0, 1, 2]))
        dist.barrier()
        # The ranks that make the call may be slow.
        store.set_timeout(before)
        assert loss_fn(torch.randn(3, 5), torch.tensor([0, 1, 2])).isfinite()


@over_processes(4)
def test_a_rank_whose_placements_are_refused(world):
    """It raises before it publishes a message; the others wait no longer than the timeout."""
    store = compat.group_store(world.group)
    before = store.timeout
    store.set_timeout(timedelta(seconds=1))
    mesh = init_device_mesh("cpu", (world.ranks,))
    logits, labels = torch.randn(3, 5), torch.tensor([0, 1, 2])
    loss_fn = TEParallelCEConfig(tp_group=world.group).build()
    mine = DTensor.from_local(logits, mesh, [Partial()]) if world.rank == 1 else logits
    _refused(
        "Partial" if world.rank == 1 else r"Ranks \[.*1.*\] of the group did not come", lambda: loss_fn(mine, labels)
    )
    store.set_timeout(before)
    assert loss_fn(logits, labels).isfinite()


@over_processes(2)
def test_keys_are_deleted(world):
    loss_fn = TEParallelCEConfig(tp_group=world.group).build()
    numbers = []
    for _ in range(3):
        loss_fn(torch.randn(3, 5), torch.tensor([0, 1, 2]))
        dist.barrier()
        numbers.append(compat.group_store(world.group).num_keys())
        dist.barrier()
    assert numbers == numbers[:1] * 3


# --- where values are not readable, as on an accelerator


def _agreed(world, like, labels, read_values=False, check=None, what="loss()"):
    """The shards that `agree` returns for logits on this rank."""
    tokens = agreement.Tokens(labels.shape, labels, labels != -100, None, None)
    ranks = Ranks(world.group, world.rank)
    return agreement.agree(ranks, what, like, -1, -100, check or (lambda: tokens), read_values=read_values)[1]


@pytest.mark.parametrize("read_values", [False, True])
@over_processes(4)
def test_heads_that_differ_only_on_some_ranks(world, read_values):
    """Heads whose shards have the same size on most ranks: these can't distinguish them, and yet no rank hangs."""
    labels = torch.zeros(3, dtype=torch.int64)
    for _ in range(2):
        for sizes in ((3, 3, 3, 1), (3, 3, 3, 2), (2, 3, 3, 1), (3, 3, 2, 1), (3, 0, 3, 3)):
            found = _agreed(world, torch.empty(3, sizes[world.rank]), labels, read_values)
            assert (found.start, found.total) == (sum(sizes[: world.rank]), sum(sizes)), sizes


@over_processes(4)
def test_losses_over_heads_that_differ_only_on_some_ranks(world):
    torch.manual_seed(0)
    loss_fn = TEParallelCEConfig(tp_group=world.group).build()
    for sizes in ((3, 3, 3, 1), (3, 3, 3, 2), (2, 3, 3, 2), (3, 3, 2, 2)):
        logits, labels = torch.randn(4, sum(sizes)), torch.tensor([0, 2, 5, 9])
        loss = loss_fn(logits.split(sizes, -1)[world.rank], labels)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))


@over_processes(2, 3)
def test_mismatches_without_reading_values(world):
    """Each is a ValueError on every rank, also for shapes of earlier calls, and the next call works."""
    last = world.rank == world.ranks - 1
    labels, like = torch.zeros(3, dtype=torch.int64), torch.empty(3, 5)
    for _ in range(2):
        _agreed(world, like, labels)
        _refused("dtype must be the same", lambda: _agreed(world, like.double() if last else like, labels))
        _refused("shape must be the same", lambda: _agreed(world, like, labels[:2] if last else labels))
        _refused("what must be the same", lambda: _agreed(world, like, labels, what=f"loss({last})"))


@over_processes(2, 3)
def test_a_rank_that_fails_its_own_checks(world):
    """It raises its own error, the others a ValueError that names it, whatever earlier calls agreed on."""
    labels, like = torch.zeros(3, dtype=torch.int64), torch.empty(3, 5)

    def check():
        raise TypeError("labels must be integers")

    for failing in range(world.ranks):
        _agreed(world, like, labels)
        mine = failing == world.rank
        match = "^labels must" if mine else f"On rank {failing} of the group: TypeError: labels must be integers"
        _refused(
            match, lambda mine=mine: _agreed(world, like, labels, check=check if mine else None),
            TypeError if mine else ValueError,
        )  # fmt: skip


@over_processes(2)
def test_labels_that_differ_where_values_are_readable(world):
    labels, like = torch.tensor([0, 1, 2 - world.rank]), torch.empty(3, 5)
    _refused("labels must be the same", lambda: _agreed(world, like, labels, read_values=True))
    _agreed(world, like, labels)


@over_processes(4)
def test_numbers_of_valid_tokens_that_differ(world):
    """num_valid_tokens must be equal only on the ranks of a replica, and may change at each call."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2))
    weight = torch.randn(8, 4)
    for valid in ((3, 1), (2, 2), (0, 3)):
        labels = torch.full((2, 3), -100)
        for replica, number in enumerate(valid):
            labels[replica, :number] = torch.arange(number)
        hidden = torch.randn(6, 4, requires_grad=True)
        placed = distribute_tensor(hidden.detach(), mesh, [Shard(0), Replicate()]).requires_grad_()
        mine = labels[mesh.get_coordinate()[0]]
        head = distribute_tensor(weight, mesh, [Replicate(), Shard(0)])
        number = valid[mesh.get_coordinate()[0]]
        loss = FusedLinearCEConfig().build()(placed, mine, head, num_valid_tokens=number)
        whole = FusedLinearCEConfig().build()(hidden, labels.flatten(), weight)
        torch.testing.assert_close(loss, whole)
        loss.backward()
        whole.backward()
        torch.testing.assert_close(placed.grad.full_tensor(), hidden.grad)
