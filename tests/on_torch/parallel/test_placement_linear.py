"""The head's weight over FSDP2, tensor parallel, both, and shares of the sequence, in real processes (gloo)."""

# V = vocabulary, H = hidden

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from helpers.process_group import over_processes
from helpers.sharded_problem import Problem, cases, part_of, same_on_all_ranks, splits
from loss_core import FusedLinearCEConfig

VOCAB = 41  # divides by neither 2 nor 4


class _Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, VOCAB, bias=False)

    def forward(self, x):
        return torch.tanh(self.body(x))


def _three_steps(world, mesh, data, sharded, plain, **fields):
    """Train both; tokens of the sharded one are split over the data-parallel ranks."""
    replica, replicas = mesh.get_local_rank(data), mesh.size(mesh.mesh_dim_names.index(data))
    loss_fn, whole_fn = FusedLinearCEConfig(**fields).build(), FusedLinearCEConfig().build()
    x, labels = torch.randn(3, 4 * replicas, 8), torch.randint(0, VOCAB, (3, 4 * replicas))
    labels[:, 1] = -100
    # One replica has no valid label in the last step.
    labels[2, :4] = -100
    steps = [torch.optim.SGD(model.parameters(), lr=0.5, foreach=False) for model in (plain, sharded)]
    for x_B, labels_B in zip(x, labels, strict=True):
        count = int((labels_B != -100).sum())
        whole_fn(plain(x_B), labels_B, plain.head.weight, num_label_tokens=count).backward()
        mine = slice(replica * 4, (replica + 1) * 4)
        # FSDP averages gradients over its ranks; times their number it is the sum that the global count divides.
        loss = loss_fn(
            sharded(x_B[mine]), labels_B[mine], sharded.head.weight, num_label_tokens=count,
            grad_reduce_group=mesh.get_group(data),
        ) * replicas  # fmt: skip
        loss.backward()
        for step in steps:
            step.step()
            step.zero_grad()
    for a, b in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert isinstance(b, DTensor)
        torch.testing.assert_close(b.full_tensor(), a, rtol=1e-5, atol=1e-6)
    return loss_fn, x[0], labels[0]


def _twins():
    torch.manual_seed(0)
    plain, sharded = _Model(), _Model()
    sharded.load_state_dict(plain.state_dict())
    return plain, sharded


@over_processes(1, 2, 3)
def test_sequence_parallel(world):
    """Hidden states as equal shares of the sequence, labels of the full sequence."""
    sizes = splits(41, world.ranks)[0]
    share = slice(world.rank * 12 // world.ranks, (world.rank + 1) * 12 // world.ranks)

    def part(name):
        return (lambda x: x[share]) if name.endswith("hidden_states") else part_of(name, sizes, world.rank)

    for case in [*cases("FusedLinearCrossEntropy", shape=(12, 41)), *cases("FusedLinearKDLoss", shape=(12, 41))]:
        problem = Problem(case)
        inputs = {name: problem.tensor(name, part(name)) for name in problem.arrays}
        loss = problem.build(world.flag, tp_group=world.group, sequence_parallel=True)(**inputs)
        same_on_all_ranks(loss.detach())
        problem.backward(loss)
        problem.holds("loss", loss)
        for name in problem.case.grad_of:
            problem.holds(name, inputs[name].grad, part(name))


@over_processes(2)
def test_fsdp(world):
    """Three steps of a fully_shard'ed model equal those of the unsharded run."""
    plain, sharded = _twins()
    mesh = init_device_mesh("cpu", (world.ranks,), mesh_dim_names=("dp",))
    for part in (sharded.body, sharded.head, sharded):
        fully_shard(part, mesh=mesh)
    loss_fn, x, labels = _three_steps(world, mesh, "dp", sharded, plain)
    with pytest.raises(ValueError, match=f"mesh size={world.ranks}, reduction group size=1"):
        loss_fn(x, labels, sharded.head.weight)
    with torch.no_grad():
        torch.testing.assert_close(loss_fn(x, labels, sharded.head.weight), loss_fn(x, labels, plain.head.weight))


@over_processes(4)
def test_fsdp_and_tensor_parallel(world):
    """FSDP x tensor parallel: both shard the head's vocabulary; by each way of naming the tensor-parallel dimension."""
    for names, with_group in ((("dp", "tp"), False), (("dp", "model"), True), (("data", "model"), False)):
        plain, sharded = _twins()
        mesh = init_device_mesh("cpu", (2, world.ranks // 2), mesh_dim_names=names)
        tensor_parallel = mesh[names[1]]
        head = distribute_tensor(sharded.head.weight.detach(), tensor_parallel, [Shard(0)])
        sharded.head.weight = torch.nn.Parameter(head)
        for part in (sharded.body, sharded.head, sharded):
            fully_shard(part, mesh=mesh[names[0]])
        assert sharded.head.weight.device_mesh.ndim == 2
        fields = {"tp_group": tensor_parallel} if with_group else {}
        loss_fn, x, labels = _three_steps(world, mesh, names[0], sharded, plain, **fields)
        with pytest.raises(ValueError, match="without its tensor-parallel dimension=2, reduction group size=1"):
            loss_fn(x, labels, sharded.head.weight)


@over_processes(4)
def test_a_sharded_head_with_shares_of_the_sequence(world):
    """FSDP x tensor parallel with shares of the sequence, plain or as DTensors of the tensor-parallel mesh."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, world.ranks // 2), mesh_dim_names=("dp", "tp"))
    plain = torch.nn.Linear(8, VOCAB, bias=False)
    head = torch.nn.Linear(8, VOCAB, bias=False)
    head.weight = torch.nn.Parameter(distribute_tensor(plain.weight.detach(), mesh["tp"], [Shard(0)]))
    fully_shard(head, mesh=mesh["dp"])
    x, labels = torch.randn(2, 6, 8), torch.randint(0, VOCAB, (2, 6))
    whole = x.clone().requires_grad_()
    # The mean over replicas, as with grad_reduce_group, of their sums.
    (FusedLinearCEConfig().build()(whole, labels, plain.weight) / 2).backward()
    replica, place = mesh.get_coordinate()
    share = slice(place * 3, place * 3 + 3)
    for placed in (False, True):
        mine = whole.detach()[replica][share].requires_grad_()
        hidden = DTensor.from_local(mine, mesh["tp"], [Shard(0)]) if placed else mine
        loss_fn = FusedLinearCEConfig(sequence_parallel=not placed).build()
        loss_fn(hidden, labels[replica], head.weight, grad_reduce_group=mesh.get_group("dp")).backward()
        torch.testing.assert_close(mine.grad, 2 * whole.grad[replica][share])
        torch.testing.assert_close(head.weight.grad.full_tensor(), plain.weight.grad)
        head.weight.grad = None
