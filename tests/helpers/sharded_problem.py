"""A case whose vocabulary is sharded over ranks, with the oracle's result of the unsharded call."""

# V = vocabulary, H = hidden, T = tokens

import numpy as np
import torch
import torch.distributed as dist

from loss_core.dtypes import round_to
from loss_core.losses import allowances, error_ratio, named_cases, oracle

CASES = ("basic", "mean", "none", "all-ignored", "ragged", "huge-logits", "minus-inf", "mask", "count", "loss-weights",
         "edge-labels", "nan-where-ignored", "temperature", "softcap", "softcap-none", "ignore-index-0", "reverse",
         "jsd", "jsd-ruled-out", "jsd-huge-logits", "reverse-heads", "jsd-heads")  # fmt: skip
SHARDED = ("logits", "student_logits", "teacher_logits", "lm_weight", "student_lm_weight", "teacher_lm_weight")
LOSSES = ("MaskedCrossEntropy", "FusedLinearCrossEntropy", "TEParallelCrossEntropy", "KDLoss", "FusedLinearKDLoss")


class Problem:
    """A case rounded to a dtype, with the oracle's result of the unsharded call."""

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
        """Assert that a result, or part of it, is within its allowance."""
        whole = self.expected.loss if name == "loss" else self.expected.grads[name]
        whole, limit = part(whole), part(self.allowed[name])
        assert tuple(got.shape) == whole.shape, (self.case.name, name, tuple(got.shape), whole.shape)
        kind = str(got.dtype).removeprefix("torch.")
        share = error_ratio(got.detach().double().numpy(), whole, limit, kind)
        assert share.max(initial=0) <= 1, (self.case.name, name, share.max())


def cases(config, shape=(24, 41), only=CASES):
    return [case for case in named_cases(config, shape=shape) if case.name in only]


def vocab_axis(name):
    return 0 if name.endswith("lm_weight") else -1


def over_heads(problem, **placements):
    """Apply placements of hidden_states and lm_weight to every head of a problem, by argument name."""
    of_heads = [name.removesuffix("lm_weight") for name in problem.arrays if name.endswith("lm_weight")]
    return {f"{of}{name}": placement for of in of_heads for name, placement in placements.items()}


def part_of(name, sizes, rank):
    """Function that takes a rank's columns of logits or rows of a weight; the identity for any other argument."""
    if name not in SHARDED:
        return lambda x: x
    at = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return (lambda x: x[at]) if vocab_axis(name) == 0 else (lambda x: x[..., at])


def same_on_all_ranks(value, group=None):
    gathered = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, value.contiguous(), group=group)
    assert all(torch.equal(x.nan_to_num(), value.nan_to_num()) for x in gathered), "ranks disagree bitwise"


def splits(vocab, ranks):
    """Shard sizes: as even as possible; as DTensor; nearly all on the last rank; empty shards at the end, and first."""
    even = [vocab // ranks + (rank < vocab % ranks) for rank in range(ranks)]
    chunk = -(-vocab // ranks)
    chunks = [max(0, min(chunk, vocab - chunk * rank)) for rank in range(ranks)]
    lopsided = [1] * (ranks - 1) + [vocab - ranks + 1]
    return [even, chunks, lopsided, [vocab, *[0] * (ranks - 1)], [*[0] * (ranks - 1), vocab]]


def holds_sharded(world, problem, sizes, with_count=False, kernels=None, **fields):
    """Assert that loss and gradients are right on every rank, each with its shard of the vocabulary.

    kernels: used instead of those of the flag.
    """
    inputs = {name: problem.tensor(name, part_of(name, sizes, world.rank)) for name in problem.arrays}
    count = {"num_valid_tokens": int(problem.expected.keep_T.sum())} if with_count else {}
    built = problem.build(world.flag, tp_group=world.group, **fields)
    built = built if kernels is None else built.with_kernels(kernels)
    assert built.kernel_choice.flag == world.flag
    loss = built(**inputs, **count)
    same_on_all_ranks(loss.detach())
    problem.backward(loss)
    problem.holds("loss", loss)
    for name in problem.case.grad_of:
        problem.holds(name, inputs[name].grad, part_of(name, sizes, world.rank))
        assert inputs[name].grad.dtype == inputs[name].dtype
