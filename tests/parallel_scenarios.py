"""Vocabulary in parts over real processes, against the oracle on the whole problem: scenarios of distributed_worker.py.

A scenario takes a `World` and runs on every rank of it.
"""

# V = vocabulary, H = hidden, T = tokens

import contextlib
import dataclasses
import itertools
import unittest.mock
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig, TEParallelCEConfig, oracle
from loss_core.cases import named_cases
from loss_core.dtypes import round_to
from loss_core.tolerance import allowances, share_of_allowance
from loss_core_torch import block_logits, distributed, eager_linear, triton_sizes, values

CASES = ("basic", "mean", "none", "all-ignored", "ragged", "huge-logits", "minus-inf", "mask", "count", "loss-weights",
         "edge-labels", "nan-where-ignored", "temperature", "softcap", "softcap-none", "ignore-index-0")  # fmt: skip
SHARDED = ("logits", "student_logits", "teacher_logits", "lm_weight")
LOSSES = ("MaskedCrossEntropy", "FusedLinearCrossEntropy", "TEParallelCrossEntropy", "KDLoss")


@dataclasses.dataclass(frozen=True)
class World:
    rank: int
    ranks: int
    flag: str = "torch:eager"

    @property
    def group(self):
        return dist.group.WORLD


class Problem:
    """A case, rounded to a dtype, with the oracle's answer to all of it."""

    def __init__(self, case, dtype="float32"):
        self.case, self.dtype = case, dtype
        self.arrays = {k: round_to(v, dtype) if v.dtype.kind == "f" else v for k, v in case.arrays.items()}
        self.expected = oracle.evaluate(case.config, self.arrays, case.upstream)
        self.allowed = allowances(case.config, self.arrays, self.expected, dtype, upstream=case.upstream)

    def tensor(self, name, part=lambda x: x):
        value = self.arrays[name]
        tensor = torch.from_numpy(np.array(part(value)))
        if value.dtype.kind == "f":
            tensor = tensor.to(getattr(torch, self.dtype)).requires_grad_(name in self.case.grad_of)
        return tensor

    def build(self, flag="torch:eager", **fields):
        return type(self.case.config)(**{**self.case.config.__dict__, **fields}).build(backend=flag)

    def backward(self, loss, part=lambda x: x):
        upstream = self.case.upstream
        loss.backward(torch.ones_like(loss) if upstream is None else torch.as_tensor(part(upstream)).to(loss))

    def holds(self, name, got, part=lambda x: x):
        """A result, or part of it, is within what rounding explains."""
        whole = self.expected.loss if name == "loss" else self.expected.grads[name]
        whole, limit = part(whole), part(self.allowed[name])
        assert tuple(got.shape) == whole.shape, (self.case.name, name, tuple(got.shape), whole.shape)
        kind = str(got.dtype).removeprefix("torch.")
        share = share_of_allowance(got.detach().double().numpy(), whole, limit, kind)
        assert share.max(initial=0) <= 1, (self.case.name, name, share.max())


def cases(config, shape=(24, 41), only=CASES):
    return [case for case in named_cases(config, shape=shape) if case.name in only]


def vocab_axis(name):
    return 0 if name == "lm_weight" else -1


def part_of(name, sizes, rank):
    """This rank's columns of logits, rows of the weight; all of anything else."""
    if name not in SHARDED:
        return lambda x: x
    at = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return (lambda x: x[at]) if vocab_axis(name) == 0 else (lambda x: x[..., at])


def same_on_all_ranks(value, group=None):
    gathered = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, value.contiguous(), group=group)
    assert all(torch.equal(x.nan_to_num(), value.nan_to_num()) for x in gathered), "ranks disagree bitwise"


def splits(vocab, ranks):
    """As even as it goes; as DTensor cuts it; nearly all on the last rank; empty parts at the end and in front."""
    even = [vocab // ranks + (rank < vocab % ranks) for rank in range(ranks)]
    chunk = -(-vocab // ranks)
    chunks = [max(0, min(chunk, vocab - chunk * rank)) for rank in range(ranks)]
    lopsided = [1] * (ranks - 1) + [vocab - ranks + 1]
    return [even, chunks, lopsided, [vocab, *[0] * (ranks - 1)], [*[0] * (ranks - 1), vocab]]


def _sharded(world, problem, sizes, with_count=False, **fields):
    inputs = {name: problem.tensor(name, part_of(name, sizes, world.rank)) for name in problem.arrays}
    count = {"num_valid_tokens": int(problem.expected.keep_T.sum())} if with_count else {}
    built = problem.build(world.flag, tp_group=world.group, **fields)
    assert built.kernel_choice.flag == world.flag
    loss = built(**inputs, **count)
    same_on_all_ranks(loss.detach())
    problem.backward(loss)
    problem.holds("loss", loss)
    for name in problem.case.grad_of:
        problem.holds(name, inputs[name].grad, part_of(name, sizes, world.rank))
        assert inputs[name].grad.dtype == inputs[name].dtype


def every_loss_and_case(world):
    for loss in LOSSES:
        found = cases(loss)
        assert len(found) >= 8
        for case in found:
            _sharded(world, Problem(case), splits(41, world.ranks)[0])


def even_parts(world, loss, dtype):
    """What a kernel that takes equal parts alone can do."""
    found = cases(loss, shape=(24, 82 * world.ranks))
    assert len(found) >= 8
    for case in found:
        _sharded(world, Problem(case, dtype), [82] * world.ranks)


def every_split(world):
    for loss in LOSSES:
        for case in cases(loss, only=("basic", "softcap", "edge-labels")):
            for sizes in splits(41, world.ranks):
                _sharded(world, Problem(case), sizes)


def few_classes(world):
    """Fewer classes than ranks: with DTensor's split, ranks without any."""
    for loss in LOSSES:
        for case in cases(loss, shape=(6, 2), only=("basic", "all-ignored")):
            _sharded(world, Problem(case), splits(2, world.ranks)[1])


def other_dtypes(world):
    for loss, dtype in itertools.product(LOSSES, ("bfloat16", "float64")):
        for case in cases(loss, only=("basic", "none", "softcap-none", "temperature")):
            _sharded(world, Problem(case, dtype), splits(41, world.ranks)[0])


def logits_computed_again(world):
    """A budget that not all tokens fit: the fused loss goes over its blocks twice, in small pieces."""
    with contextlib.ExitStack() as stack:
        for name, value in (("_LOGITS_BYTES_CPU", 0), ("_MIN_BLOCK_TOKENS", 5), ("_MAX_BLOCK_TOKENS", 5)):
            stack.enter_context(unittest.mock.patch.object(eager_linear, name, value))
        stack.enter_context(unittest.mock.patch.object(block_logits, "_TILE_COLUMNS", 7))
        for case in cases("FusedLinearCrossEntropy"):
            for sizes in splits(41, world.ranks)[1:3]:
                _sharded(world, Problem(case), sizes)


def with_triton(world):
    """Triton's kernels, with the sizes that the launcher chooses; few rows, the interpreter being slow."""
    for loss, dtype in itertools.product(LOSSES, ("float32", "bfloat16")):
        for case in cases(loss, shape=(5, 41), only=("none", "nan-where-ignored", "softcap", "temperature")):
            _sharded(world, Problem(case, dtype), splits(41, world.ranks)[0])
    for case in cases("FusedLinearCrossEntropy", shape=(4, 5), only=("basic", "all-ignored")):
        for sizes in splits(5, world.ranks)[2:]:
            _sharded(world, Problem(case), sizes)


def with_triton_in_pieces(world):
    """The same in blocks of 16 columns, rows in parts, and chunks of two tokens whose logits do not wait."""
    from loss_core_torch import triton_linear

    size = triton_sizes.LaunchParameters(block_v=16, unroll=2, num_warps=1, num_stages=1, split=3)
    with (
        unittest.mock.patch.object(triton_linear, "CHUNK_BYTES", 0),
        unittest.mock.patch.object(triton_linear, "_CHUNK_MULTIPLE", 2),
        unittest.mock.patch.object(triton_sizes, "launch_parameters", return_value=size),
    ):
        for loss in LOSSES:
            for case in cases(loss, shape=(5, 97), only=("basic", "softcap-none")):
                fields = {"skip_ignored": False} if loss == "FusedLinearCrossEntropy" else {}
                _sharded(world, Problem(case), splits(97, world.ranks)[1], **fields)


def values_stay_on_the_device(world):
    """As on a GPU: nothing may be read back, shapes are agreed on once, a wrong label is NaN on every rank."""
    with unittest.mock.patch.object(values, "may_read", return_value=False):
        for loss in LOSSES:
            for case in cases(loss, only=("basic", "mean", "softcap-none", "nan-where-ignored")):
                _sharded(world, Problem(case), splits(41, world.ranks)[0])
                if loss == "FusedLinearCrossEntropy":
                    _sharded(world, Problem(case), splits(41, world.ranks)[0], skip_ignored=True)
                    _sharded(world, Problem(case), splits(41, world.ranks)[0], with_count=True)
        loss_fn = TEParallelCEConfig(tp_group=world.group, reduction="none").build(backend=world.flag)
        logits, labels = torch.randn(3, 4 + world.rank), torch.tensor([0, 1, 2])
        first = loss_fn(logits, labels)
        with unittest.mock.patch("loss_core_torch.agreement.exchange", side_effect=AssertionError("agreed already")):
            same_on_all_ranks(first.detach())
            assert torch.equal(loss_fn(logits, labels), first)
            # Only one rank has the wrong label.
            wrong = torch.tensor([0, 10_000 if world.rank == 0 else 1, 2])
            assert loss_fn(logits, wrong).isnan().tolist() == [False, True, False]


def backward_twice(world):
    for loss in LOSSES:
        for case in cases(loss, only=("basic",)):
            problem, sizes = Problem(case), splits(41, world.ranks)[0]
            inputs = {name: problem.tensor(name, part_of(name, sizes, world.rank)) for name in problem.arrays}
            result = problem.build(world.flag, tp_group=world.group)(**inputs)
            wanted = [inputs[name] for name in problem.case.grad_of]
            twice = [torch.autograd.grad(result, wanted, retain_graph=True) for _ in range(2)]
            for once, again in zip(*twice, strict=True):
                torch.testing.assert_close(once, again, rtol=1e-6, atol=1e-7)


def over_the_logits(world):
    """inplace_grad: this rank's part of the gradient in the memory of its logits."""
    for loss in ("MaskedCrossEntropy", "TEParallelCrossEntropy"):
        for case in cases(loss, only=("basic", "none")):
            problem, sizes = Problem(case), splits(41, world.ranks)[2]
            inputs = {name: problem.tensor(name, part_of(name, sizes, world.rank)) for name in problem.arrays}
            leaf = inputs["logits"]
            inputs["logits"] = leaf.clone()
            result = problem.build(world.flag, tp_group=world.group, inplace_grad=True)(**inputs)
            problem.backward(result)
            problem.holds("loss", result)
            for got in (leaf.grad, inputs["logits"]):
                problem.holds("logits", got, part_of("logits", sizes, world.rank))


def sequence_parallel(world):
    """Hidden states as equal shares of the sequence, labels whole."""
    for case in cases("FusedLinearCrossEntropy", shape=(12, 41)):
        problem, sizes = Problem(case), splits(41, world.ranks)[0]
        share = slice(world.rank * 12 // world.ranks, (world.rank + 1) * 12 // world.ranks)
        inputs = {name: problem.tensor(name, part_of(name, sizes, world.rank)) for name in problem.arrays}
        inputs["hidden_states"] = problem.tensor("hidden_states", lambda x, share=share: x[share])
        loss = problem.build(world.flag, tp_group=world.group, sequence_parallel=True)(**inputs)
        same_on_all_ranks(loss.detach())
        problem.backward(loss)
        problem.holds("loss", loss)
        problem.holds("hidden_states", inputs["hidden_states"].grad, lambda x, share=share: x[share])
        problem.holds("lm_weight", inputs["lm_weight"].grad, part_of("lm_weight", sizes, world.rank))


def a_mesh_as_group(world):
    """A 1-D mesh, with its ranks in reverse: the parts are in the mesh's order."""
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


# --- DTensors


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


def placed_on_one_dimension(world):
    """The group from the placement; V = 9 over 4 ranks leaves the last one empty."""
    mesh = init_device_mesh("cpu", (world.ranks,), mesh_dim_names=("tp",))
    for loss in LOSSES:
        for case in cases(loss, shape=(12, 9), only=("basic", "none", "loss-weights", "cold")):
            problem = Problem(case)
            if loss == "FusedLinearCrossEntropy":
                weight = {"lm_weight": [Shard(0)]}
                _placed(world, problem, mesh, weight | {"hidden_states": [Replicate()]})
                _placed(world, problem, mesh, weight | {"hidden_states": [Shard(0)], "labels": [Replicate()]})
                _placed(world, problem, mesh, weight)
            else:
                placements = {name: [Shard(1)] for name in SHARDED if name in problem.arrays}
                _placed(world, problem, mesh, placements, tp_group=mesh)
                _placed(world, problem, mesh, placements | {"labels": [Replicate()]})


def placed_on_two_dimensions(world):
    """dp x tp: tokens over one dimension, unevenly, classes over the other. The loss is that of all tokens."""
    mesh = init_device_mesh("cpu", (2, world.ranks // 2))
    for loss in LOSSES:
        for case in cases(loss, shape=(7, 41), only=("basic", "none", "mean", "loss-weights", "mask")):
            problem = Problem(case)
            names = [name for name in ("labels", "mask", "loss_weights") if name in problem.arrays]
            by_token = {name: [Shard(0), Replicate()] for name in names}
            if loss == "FusedLinearCrossEntropy":
                inputs = {"hidden_states": [Shard(0), Replicate()], "lm_weight": [Replicate(), Shard(0)]}
                _placed(world, problem, mesh, inputs | by_token)
                _placed(world, problem, mesh, inputs | {"lm_weight": [Shard(0), Shard(0)]})
                _placed(world, problem, mesh, inputs | {"lm_weight": [Replicate(), Replicate()]})
            else:
                logits = [name for name in SHARDED if name in problem.arrays]
                _placed(world, problem, mesh, by_token | {name: [Shard(0), Shard(1)] for name in logits})
                # Labels of all tokens on every rank; tokens in the second dimension of the mesh, or in none.
                _placed(world, problem, mesh, {name: [Shard(0), Shard(1)] for name in logits})
                if case.name == "mean":
                    _placed(world, problem, mesh, {name: [Shard(1), Shard(0)] for name in logits})
                    _placed(world, problem, mesh, {name: [Replicate(), Shard(1)] for name in logits})
                    _placed(world, problem, mesh, {name: [Shard(0), Replicate()] for name in logits})


def a_batch_of_sequences(world):
    """[B, S, ...]: the sequence is dimension 1, over the mesh dimension of the vocabulary or over another."""
    mesh = init_device_mesh("cpu", (2, world.ranks // 2), mesh_dim_names=("cp", "tp"))
    for loss in LOSSES:
        for case in named_cases(loss, only=("mean", "basic")):
            problem = Problem(case)
            if loss == "FusedLinearCrossEntropy":
                weight = {"lm_weight": [Replicate(), Shard(0)]}
                _placed(world, problem, mesh, weight | {"hidden_states": [Shard(1), Replicate()]})
                _placed(world, problem, mesh, weight | {"hidden_states": [Shard(0), Shard(1)]})
            else:
                placements = {name: [Shard(1), Shard(2)] for name in SHARDED if name in problem.arrays}
                _placed(world, problem, mesh, placements | {"labels": [Shard(1), Replicate()]})


def tokens_elsewhere(world):
    """dp x tp with plain local tensors: each row of the mesh is a problem of its own, and one has no label at all."""
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


# --- collectives, refusals


def collectives(world):
    """Forward one; backward none over logits, one for the fused loss. Bytes do not depend on the vocabulary."""

    def traced(loss, vocab=41, **fields):
        case = cases(loss, shape=(12, vocab), only=("mean", "temperature"))[0]
        problem, sizes = Problem(case), splits(vocab, world.ranks)[0]
        inputs = {name: problem.tensor(name, part_of(name, sizes, world.rank)) for name in problem.arrays}
        if fields.get("sequence_parallel"):
            share = slice(world.rank * 12 // world.ranks, (world.rank + 1) * 12 // world.ranks)
            inputs["hidden_states"] = problem.tensor("hidden_states", lambda x: x[share])
        built = problem.build(world.flag, tp_group=world.group, **fields)
        gathered = []

        def gather(packed, group):
            gathered.append(packed.numel())
            return gather_equal(packed, group)

        gather_equal = distributed.gather_equal
        with CommDebugMode() as forward, unittest.mock.patch.object(distributed, "gather_equal", gather):
            result = built(**inputs)
        with CommDebugMode() as backward:
            result.backward()
        return forward.get_total_counts(), backward.get_total_counts(), gathered

    for loss, numbers in (("MaskedCrossEntropy", 3), ("TEParallelCrossEntropy", 3), ("KDLoss", 5)):
        assert traced(loss) == traced(loss, 82) == (1, 0, [numbers * 12])
    fused = "FusedLinearCrossEntropy"
    assert traced(fused) == traced(fused, 82) == (1, 1, [3 * 12])
    assert traced(fused, sequence_parallel=True)[:2] == (2, 1)


def no_tokens(world):
    for loss in LOSSES:
        for case in named_cases(loss, shape=(0, 41), only=("basic", "none")):
            _sharded(world, Problem(case), splits(41, world.ranks)[0])


def _refused(world, match, call, alone=ValueError):
    with pytest.raises(alone, match=match):
        call()
    # The ranks are still in step.
    dist.barrier()


def refusals(world):
    """What can't be right on all ranks together is a ValueError on every one of them, and no rank waits for another."""
    group, last = world.group, world.rank == world.ranks - 1
    build = lambda config=TEParallelCEConfig, **fields: config(tp_group=group, **fields).build(backend=world.flag)  # noqa: E731
    logits, labels = torch.randn(3, 5), torch.tensor([0, 1, 2])
    wrong = torch.where(torch.arange(3) == 1, 5 * world.ranks + 2, labels) if last else labels
    at = f"On rank {world.ranks - 1} of the group: labels\\[1\\] is {5 * world.ranks + 2}"
    _refused(world, at, lambda: build()(logits, wrong))
    _refused(world, at, lambda: build(MaskedCrossEntropyConfig)(logits, wrong))
    _refused(world, at, lambda: build(KDLossConfig)(logits, logits, wrong))
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    _refused(world, at, lambda: build(FusedLinearCEConfig)(hidden, wrong, weight))
    shape = "labels has shape"
    _refused(world, shape, lambda: build()(logits, labels[:2] if last else labels))
    _refused(world, shape, lambda: build(FusedLinearCEConfig)(hidden, labels[:2] if last else labels, weight))
    number = 4 if last else 3
    _refused(world, "shape must be the same", lambda: build()(torch.randn(number, 5), torch.zeros(number).long()))
    _refused(world, "dtype must be the same", lambda: build()(logits.double() if last else logits, labels))
    _refused(world, "what must be the same", lambda: build(reduction="mean" if last else "sum")(logits, labels))
    _refused(
        world,
        "hidden_states_require_grad",
        lambda: build(FusedLinearCEConfig)(hidden if last else hidden.detach(), labels, weight),
    )
    _refused(world, "labels must be the same", lambda: build()(logits, labels.flip(0) if last else labels))
    _refused(
        world,
        "num_valid_tokens is 2, but 3",
        lambda: build(FusedLinearCEConfig)(hidden, labels, weight, num_valid_tokens=2),
    )
    _refused(world, "count must be the same", lambda: build()(logits, labels, num_label_tokens=3 + last))
    _refused(
        world,
        "floating|integers",
        lambda: build()(logits, labels.float() if last else labels),
        (TypeError if last else ValueError),
    )
    _refused(
        world,
        "must be a torch.Tensor",
        lambda: build()([1.0] if last else logits, labels),
        (TypeError if last else ValueError),
    )
    mesh = init_device_mesh("cpu", (world.ranks,))
    partial = DTensor.from_local(logits, mesh, [Partial()])
    _refused(world, "Partial", lambda: TEParallelCEConfig().build(backend=world.flag)(partial, labels))
    fused = FusedLinearCEConfig().build(backend=world.flag)
    placed = lambda x, p: DTensor.from_local(x, mesh, [p])  # noqa: E731
    _refused(world, "Partial", lambda: fused(hidden, labels, placed(weight, Partial())))
    _refused(world, "last dimension", lambda: fused(placed(hidden, Shard(1)), labels, placed(weight, Shard(0))))
    _refused(
        world, "not sharded over tp_group", lambda: build(FusedLinearCEConfig)(hidden, labels, placed(weight, Shard(1)))
    )
    uneven = torch.randn(2 + last, 4)
    _refused(
        world,
        "equal|labels has shape",
        lambda: build(FusedLinearCEConfig, sequence_parallel=True)(
            uneven, torch.zeros(2 * world.ranks + 1).long(), weight
        ),
    )
    two = init_device_mesh("cpu", (world.ranks, 1), mesh_dim_names=("dp", "tp"))
    _refused(world, "1-D DeviceMesh", lambda: TEParallelCEConfig(tp_group=two).build()(logits, labels))
    _refused(world, "ProcessGroup", lambda: TEParallelCEConfig(tp_group="tp").build()(logits, labels))
    # After all these, the same group still works.
    assert build()(logits, labels).isfinite()


def refusals_across_replicas(world):
    """dp x tp: a mistake in one replica stops all of them, wherever their tokens meet."""
    mesh = init_device_mesh("cpu", (2, world.ranks // 2), mesh_dim_names=("dp", "tp"))
    logits = distribute_tensor(torch.randn(6, 8), mesh, [Shard(0), Shard(1)])
    labels = torch.tensor([0, 9 if world.rank == 0 else 1, 2])
    at = r"On rank 0 of the group: labels\[1\] is 9, which is neither a class in \[0, 8\)"
    loss_fn = MaskedCrossEntropyConfig().build()
    _refused(world, at, lambda: loss_fn(logits, labels))
    _refused(world, at, lambda: KDLossConfig().build()(logits, logits, labels))
    by_token = logits.redistribute(mesh, [Shard(0), Replicate()])
    _refused(world, at, lambda: loss_fn(by_token, torch.tensor([0, 9 if world.rank in (0, 1) else 1, 2])))
    head = DTensor.from_local(torch.randn(2, 4), mesh, [Shard(0), Shard(0)])
    fused = FusedLinearCEConfig(tp_group=mesh["tp"]).build()
    hidden = torch.randn(3, 4)
    head.requires_grad_()
    _refused(world, at, lambda: fused(hidden, labels, head, grad_reduce_group=mesh.get_group("dp")))


def a_rank_outside(world):
    """The group of all ranks but the last: an error there, the loss everywhere else."""
    group = dist.new_group(list(range(world.ranks - 1)))
    logits, labels = torch.randn(3, 5), torch.tensor([0, 1, 2])
    loss_fn = TEParallelCEConfig(tp_group=group).build()
    if world.rank == world.ranks - 1:
        with pytest.raises(ValueError, match="is not in the group"):
            loss_fn(logits, labels)
    else:
        assert loss_fn(logits, labels).isfinite()


def a_rank_that_does_not_come(world):
    """The others give up after the timeout of the process group, and name it."""
    from loss_core_torch import agreement

    store = agreement._store(world.group)
    before = store.timeout
    store.set_timeout(timedelta(seconds=1))
    try:
        if world.rank:
            with pytest.raises(ValueError, match=r"Ranks \[0\] of the group did not come"):
                TEParallelCEConfig(tp_group=world.group).build()(torch.randn(3, 5), torch.tensor([0, 1, 2]))
        else:
            agreement._COUNTS[world.group] += 1
    finally:
        store.set_timeout(before)
    dist.barrier()


def keys_do_not_pile_up(world):
    from loss_core_torch import agreement

    loss_fn = TEParallelCEConfig(tp_group=world.group).build()
    for _ in range(3):
        loss_fn(torch.randn(3, 5), torch.tensor([0, 1, 2]))
    dist.barrier()
    count = agreement._COUNTS[world.group]
    store = distributed_c10d.PrefixStore("loss_core", agreement._store(world.group))
    there = [store.check([f"{at}/{world.rank}"]) for at in range(count - 3, count + 1)]
    assert there == [False, False, False, True]


def compiled(world):
    """torch.compile breaks its graph at the loss, and the result is the same."""
    logits, labels = torch.randn(3, 5), torch.tensor([0, 1, 2])
    loss_fn = TEParallelCEConfig(tp_group=world.group).build()
    step = torch.compile(lambda x: loss_fn(2 * x, labels) * 3, backend="aot_eager")
    assert torch.equal(step(logits), loss_fn(2 * logits, labels) * 3)
