"""The losses over a sharded vocabulary, in real processes (gloo), against the oracle on the unsharded problem."""

# V = vocabulary, H = hidden, T = tokens

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.process_group import over_processes
from helpers.sharded_problem import LOSSES, Problem, cases, holds_sharded, part_of, same_on_all_ranks, splits
from loss_core import TEParallelCEConfig
from loss_core.losses import named_cases
from loss_core.row_terms import PairTerms, RowTerms, combine_pairs, entropy
from loss_core_torch.parallel import collectives


@pytest.mark.parametrize("loss", LOSSES)
@over_processes(1, 2)
def test_every_case(world, loss):
    found = cases(loss)
    assert len(found) >= 8
    for case in found:
        holds_sharded(world, Problem(case), splits(41, world.ranks)[0])


@pytest.mark.parametrize("loss", LOSSES)
@over_processes(2, 3, 4)
def test_every_split(world, loss):
    for case in cases(loss, only=("basic", "softcap", "edge-labels")):
        for sizes in splits(41, world.ranks):
            holds_sharded(world, Problem(case), sizes)


@pytest.mark.parametrize("loss", LOSSES)
@over_processes(2, 3, 4)
def test_few_classes(world, loss):
    """Fewer classes than ranks: with DTensor's split, ranks without any."""
    for case in cases(loss, shape=(6, 2), only=("basic", "all-ignored")):
        holds_sharded(world, Problem(case), splits(2, world.ranks)[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("loss", LOSSES)
@over_processes(2)
def test_other_dtypes(world, loss, dtype):
    for case in cases(loss, only=("basic", "none", "softcap-none", "temperature")):
        holds_sharded(world, Problem(case, dtype), splits(41, world.ranks)[0])


@pytest.mark.parametrize("loss", LOSSES)
@over_processes(2)
def test_no_tokens(world, loss):
    for case in named_cases(loss, shape=(0, 41), only=("basic", "none")):
        holds_sharded(world, Problem(case), splits(41, world.ranks)[0])


@pytest.mark.parametrize("loss", LOSSES)
@over_processes(2)
def test_backward_twice(world, loss):
    for case in cases(loss, only=("basic",)):
        problem, sizes = Problem(case), splits(41, world.ranks)[0]
        inputs = {name: problem.tensor(name, part_of(name, sizes, world.rank)) for name in problem.arrays}
        result = problem.build(world.flag, tp_group=world.group)(**inputs)
        wanted = [inputs[name] for name in problem.case.grad_of]
        twice = [torch.autograd.grad(result, wanted, retain_graph=True) for _ in range(2)]
        for once, again in zip(*twice, strict=True):
            torch.testing.assert_close(once, again, rtol=1e-6, atol=1e-7)


@over_processes(2)
def test_inplace_grad(world):
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


@over_processes(2)
def test_compiled(world):
    """torch.compile breaks its graph at the loss, and the result is the same."""
    logits, labels = torch.randn(3, 5), torch.tensor([0, 1, 2])
    loss_fn = TEParallelCEConfig(tp_group=world.group).build()
    step = torch.compile(lambda x: loss_fn(2 * x, labels) * 3, backend="aot_eager")
    assert torch.equal(step(logits), loss_fn(2 * logits, labels) * 3)


# TEParallelCrossEntropy runs the code of MaskedCrossEntropy.
@pytest.mark.parametrize(
    ("loss", "dtype"),
    [("MaskedCrossEntropy", "bfloat16"), ("FusedLinearCrossEntropy", "bfloat16"), ("KDLoss", "bfloat16"),
     ("FusedLinearKDLoss", "bfloat16"), ("TEParallelCrossEntropy", "float32")],
)  # fmt: skip
@over_processes(2, flag="torch:triton")
def test_triton(world, loss, dtype):
    """Triton's kernels, with the sizes that the launcher chooses; few rows, the interpreter being slow."""
    for case in cases(loss, shape=(5, 41), only=("none", "nan-where-ignored", "softcap", "temperature")):
        holds_sharded(world, Problem(case, dtype), splits(41, world.ranks)[0])


@over_processes(2, flag="torch:triton")
def test_triton_with_empty_parts(world):
    for case in cases("FusedLinearCrossEntropy", shape=(4, 5), only=("basic", "all-ignored")):
        for sizes in splits(5, world.ranks)[2:]:
            holds_sharded(world, Problem(case), sizes)


class _Sizes(TorchDispatchMode):
    """Collectives of a call: name and number of elements that this rank sends."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            # (output, input, group), or (list of tensors, group).
            sent = args[1] if isinstance(args[1], torch.Tensor) else args[0][0]
            self.found.append((func.__name__.split(".")[0], sent.numel()))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("vocab", [41, 82])
@over_processes(2)
def test_number_and_size_of_collectives(world, vocab):
    """Forward one; backward none over logits, one for the fused loss. Sizes do not depend on the vocabulary."""
    gather, reduce, scatter = "_allgather_base_", "allreduce_", "_reduce_scatter_base_"

    def collectives_of(loss, only=("mean", "temperature"), **fields):
        case = cases(loss, shape=(12, vocab), only=only)[0]
        problem, sizes = Problem(case), splits(vocab, world.ranks)[0]
        inputs = {name: problem.tensor(name, part_of(name, sizes, world.rank)) for name in problem.arrays}
        if fields.get("sequence_parallel"):
            share = slice(world.rank * 6, world.rank * 6 + 6)
            inputs["hidden_states"] = problem.tensor("hidden_states", lambda x: x[share])
        built = problem.build(world.flag, tp_group=world.group, **fields)
        with _Sizes() as forward:
            result = built(**inputs)
        with _Sizes() as backward:
            result.backward()
        return forward.found, backward.found, inputs, int((problem.arrays["labels"] != case.config.ignore_index).sum())

    assert collectives_of("MaskedCrossEntropy")[:2] == ([(gather, 3 * 12)], [])
    assert collectives_of("TEParallelCrossEntropy")[:2] == ([(gather, 3 * 12)], [])
    assert collectives_of("KDLoss")[:2] == ([(gather, 5 * 12)], [])
    # The mixture terms need the pair terms of all ranks first.
    assert collectives_of("KDLoss", ("jsd",))[:2] == ([(gather, 5 * 12), (gather, 2 * 12)], [])
    forward, backward, inputs, kept = collectives_of("FusedLinearCrossEntropy")
    whole = inputs["hidden_states"].numel()
    # Ignored tokens are excluded from the products, so no terms of them are gathered.
    assert kept < 12
    assert (forward, backward) == ([(gather, 3 * kept)], [(reduce, whole)])
    forward, backward, *_ = collectives_of("FusedLinearCrossEntropy", sequence_parallel=True)
    assert (forward, backward) == ([(gather, whole // 2), (gather, 3 * kept)], [(scatter, whole)])


@pytest.mark.parametrize("with_others", [False, True])
@over_processes(2, 3)
def test_fold_row_terms(world, with_others):
    """Terms of full rows, one rank without a class; a token in bad_T of one rank is NaN on all of them."""
    torch.manual_seed(0)
    sizes = [4] * (world.ranks - 1) + [0]
    z_TV, labels_T = torch.randn(5, sum(sizes)), torch.tensor([0, 1, 2, 3, 0])
    z = z_TV.split(sizes, -1)[world.rank]
    m, t = (x.expand(5).clone() for x in torch.full((2, 1), -torch.inf))
    if z.numel():
        m = z.amax(-1)
    if world.rank == 0:
        t = z.gather(-1, labels_T[:, None])[:, 0]
    x = z - m[:, None]
    others = (z.sum(-1), (x.exp() * x).sum(-1)) if with_others else (None, None)
    terms = RowTerms(m, x.exp().sum(-1), t, *others)
    bad_T = torch.arange(5) == (4 if world.rank == world.ranks - 1 else 5)
    found = collectives.fold(terms, world.group, bad_T)
    assert [x[4].isnan().item() for x in found if x is not None] == [True] * (5 if with_others else 3)
    lse_T = found.m + found.s.log()
    torch.testing.assert_close(lse_T[:4], z_TV.logsumexp(-1)[:4])
    assert torch.equal(found.t[:4], z_TV.gather(-1, labels_T[:, None])[:4, 0])
    if with_others:
        torch.testing.assert_close(found.z_sum[:4], z_TV.sum(-1)[:4])
        log_p_TV = z_TV.log_softmax(-1)
        torch.testing.assert_close(entropy(torch, found)[:4], -(log_p_TV.exp() * log_p_TV).sum(-1)[:4])
    else:
        assert found.z_sum is None
        assert found.e is None
    for term in found:
        if term is not None:
            same_on_all_ranks(term)


@over_processes(2, 3)
def test_fold_pair_terms(world):
    torch.manual_seed(0)
    parts = [PairTerms(*torch.rand(5, 4)) for _ in range(world.ranks)]
    expected = functools.reduce(lambda a, b: combine_pairs(torch, a, b), parts)
    found = collectives.fold(parts[world.rank], world.group)
    assert isinstance(found, PairTerms)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@over_processes(2, 3)
def test_shares(world):
    """gather_shares and its reverse, along any dimension."""
    whole = torch.arange(2 * 6 * 3.0).view(2, 6, 3)
    share = whole.chunk(world.ranks, 1)[world.rank]
    assert torch.equal(collectives.gather_shares(share, 1, world.group), whole)
    summed = collectives.reduce_scatter_shares(whole * (world.rank + 1), share.shape, 1, world.group)
    assert torch.equal(summed, share * sum(range(1, world.ranks + 1)))
