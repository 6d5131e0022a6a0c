"""DTensors and meshes, in real processes (gloo): placements define the group, and gradients have them too."""

# V = vocabulary, H = hidden, T = tokens

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from helpers.process_group import World, over_processes
from helpers.sharded_problem import LOSSES, SHARDED, Problem, cases, over_heads, part_of, same_on_all_ranks, splits
from loss_core import TEParallelCEConfig
from loss_core.field_checks import METRICS
from loss_core.losses import named_cases


def _distributed(problem, mesh, placements):
    return {
        name: distribute_tensor(problem.tensor(name), mesh, placements[name]).detach().requires_grad_(
            name in problem.case.grad_of
        )
        if name in placements
        else problem.tensor(name)
        for name in problem.arrays
    }  # fmt: skip


def _placed(world, problem, mesh, placements, **fields):
    inputs = _distributed(problem, mesh, placements)
    loss = problem.build(world.flag, **fields)(**inputs)
    whole = loss.full_tensor() if isinstance(loss, DTensor) else loss
    same_on_all_ranks(whole.detach())
    problem.holds("loss", whole)
    upstream = torch.ones(()) if problem.case.upstream is None else torch.as_tensor(problem.case.upstream)
    upstream = upstream.to(whole.dtype).expand(whole.shape)
    if isinstance(loss, DTensor):
        upstream = distribute_tensor(upstream.contiguous(), mesh, loss.placements)
    loss.backward(upstream)
    for name in problem.case.grad_of:
        grad = inputs[name].grad
        if name in placements:
            assert isinstance(grad, DTensor), name
            assert grad.placements == tuple(placements[name]), name
            grad = grad.full_tensor()
        problem.holds(name, grad)


@over_processes(2, 3)
def test_a_mesh_as_group(world):
    """A 1-D mesh with its ranks in reverse: the shards are in the order of the mesh."""
    mesh = DeviceMesh("cpu", list(range(world.ranks))[::-1])
    place, sizes = world.ranks - 1 - world.rank, splits(41, world.ranks)[0]
    for loss in LOSSES:
        for case in cases(loss, only=("basic",)):
            problem = Problem(case)
            inputs = {name: problem.tensor(name, part_of(name, sizes, place)) for name in problem.arrays}
            result = problem.build(world.flag, tp_group=mesh)(**inputs)
            problem.backward(result)
            problem.holds("loss", result)
            for name in problem.case.grad_of:
                problem.holds(name, inputs[name].grad, part_of(name, sizes, place))


@over_processes(1, 2, 3, 4)
def test_a_mesh_of_one_dimension(world):
    """The group from the placement; V = 9 over 4 ranks leaves the last one empty."""
    mesh = init_device_mesh("cpu", (world.ranks,), mesh_dim_names=("tp",))
    for loss in LOSSES:
        for case in cases(loss, shape=(12, 9), only=("basic", "none", "loss-weights", "cold")):
            problem = Problem(case)
            if weight := over_heads(problem, lm_weight=[Shard(0)]):
                _placed(world, problem, mesh, weight | over_heads(problem, hidden_states=[Replicate()]))
                shares = over_heads(problem, hidden_states=[Shard(0)])
                _placed(world, problem, mesh, weight | shares | {"labels": [Replicate()]})
                _placed(world, problem, mesh, weight)
            else:
                placements = {name: [Shard(1)] for name in SHARDED if name in problem.arrays}
                _placed(world, problem, mesh, placements, tp_group=mesh)
                _placed(world, problem, mesh, placements | {"labels": [Replicate()]})


@over_processes(4)
def test_a_mesh_of_two_dimensions(world):
    """dp x tp: tokens over one dimension, unevenly, classes over the other. The loss is that of all tokens."""
    mesh = init_device_mesh("cpu", (2, world.ranks // 2))
    for loss in LOSSES:
        for case in cases(loss, shape=(7, 41), only=("basic", "none", "mean", "loss-weights", "mask")):
            problem = Problem(case)
            names = [name for name in ("labels", "mask", "loss_weights") if name in problem.arrays]
            by_token = {name: [Shard(0), Replicate()] for name in names}
            if hidden := over_heads(problem, hidden_states=[Shard(0), Replicate()]):
                inputs = hidden | over_heads(problem, lm_weight=[Replicate(), Shard(0)])
                _placed(world, problem, mesh, inputs | by_token)
                _placed(world, problem, mesh, inputs | over_heads(problem, lm_weight=[Shard(0), Shard(0)]))
                _placed(world, problem, mesh, inputs | over_heads(problem, lm_weight=[Replicate(), Replicate()]))
            else:
                logits = [name for name in SHARDED if name in problem.arrays]
                _placed(world, problem, mesh, by_token | {name: [Shard(0), Shard(1)] for name in logits})
                # Labels of all tokens on every rank; tokens in the second dimension of the mesh, or in none.
                _placed(world, problem, mesh, {name: [Shard(0), Shard(1)] for name in logits})
                if case.name == "mean":
                    _placed(world, problem, mesh, {name: [Shard(1), Shard(0)] for name in logits})
                    _placed(world, problem, mesh, {name: [Replicate(), Shard(1)] for name in logits})
                    _placed(world, problem, mesh, {name: [Shard(0), Replicate()] for name in logits})


@over_processes(4)
def test_a_batch_of_sequences(world):
    """[B, S, ...]: the sequence is dimension 1, over the mesh dimension of the vocabulary or over another."""
    mesh = init_device_mesh("cpu", (2, world.ranks // 2), mesh_dim_names=("cp", "tp"))
    for loss in LOSSES:
        for case in named_cases(loss, only=("mean", "basic")):
            problem = Problem(case)
            if weight := over_heads(problem, lm_weight=[Replicate(), Shard(0)]):
                for placements in ([Shard(1), Replicate()], [Shard(0), Shard(1)]):
                    _placed(world, problem, mesh, weight | over_heads(problem, hidden_states=placements))
            else:
                placements = {name: [Shard(1), Shard(2)] for name in SHARDED if name in problem.arrays}
                _placed(world, problem, mesh, placements | {"labels": [Shard(1), Replicate()]})


@over_processes(4)
def test_tokens_of_other_replicas(world):
    """dp x tp with plain local tensors: each row of the mesh is a separate problem, one of them without a label."""
    mesh = init_device_mesh("cpu", (2, world.ranks // 2), mesh_dim_names=("dp", "tp"))
    replica, place = mesh.get_coordinate()
    inner = World(place, world.ranks // 2, world.flag)
    sizes = splits(41, inner.ranks)[0]
    for loss in LOSSES:
        for case in cases(loss, only=(("basic", "all-ignored")[replica],)):
            problem = Problem(case)
            inputs = {name: problem.tensor(name, part_of(name, sizes, place)) for name in problem.arrays}
            result = problem.build(world.flag, tp_group=mesh["tp"])(**inputs)
            problem.backward(result)
            problem.holds("loss", result)
            for name in problem.case.grad_of:
                problem.holds(name, inputs[name].grad, part_of(name, sizes, place))


@over_processes(2, 3)
def test_a_rank_outside_of_the_group(world):
    """The group of all ranks but the last: an error there, the loss everywhere else."""
    group = dist.new_group(list(range(world.ranks - 1)))
    logits, labels = torch.randn(3, 5), torch.tensor([0, 1, 2])
    loss_fn = TEParallelCEConfig(tp_group=group).build()
    if world.rank == world.ranks - 1:
        with pytest.raises(ValueError, match="is not in the group"):
            loss_fn(logits, labels)
    else:
        assert loss_fn(logits, labels).isfinite()


@over_processes(2, 3)
def test_invalid_groups(world):
    logits, labels = torch.randn(3, 5), torch.tensor([0, 1, 2])
    two = init_device_mesh("cpu", (world.ranks, 1), mesh_dim_names=("dp", "tp"))
    for group, match in ((two, "1-D DeviceMesh"), ("tp", "ProcessGroup")):
        with pytest.raises(ValueError, match=match):
            TEParallelCEConfig(tp_group=group).build()(logits, labels)


@over_processes(2)
def test_metrics_of_tokens_that_are_sharded(world):
    """Over all tokens, the same on every rank; per token they have the placements of the loss."""
    mesh, labels = init_device_mesh("cpu", (world.ranks,)), torch.tensor([1, -100, 2, 3, -100, -100])
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    placed = distribute_tensor(logits, mesh, [Shard(0)])
    for reduction in ("mean", "none"):
        loss_fn = TEParallelCEConfig(reduction=reduction, metrics=METRICS).build(backend=world.flag)
        loss, found = loss_fn(placed, labels)
        _, expected = loss_fn(logits, labels)
        assert found["num_valid"] == 3
        assert isinstance(found["lse"], DTensor) == isinstance(loss, DTensor) == (reduction == "none")
        for name, value in expected.items():
            whole = found[name].full_tensor() if isinstance(found[name], DTensor) else found[name]
            same_on_all_ranks(whole)
            torch.testing.assert_close(whole, value)
