"""Tensors for the backward are saved with `ctx.save_for_backward`, where checkpointing and offload reach them.

A tensor that hangs on a graph in another way stays in memory whatever the saved-tensor hooks do with the rest: head and
loss in checkpointed chunks then hold the gradients of all chunks at once.
"""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from helpers.torch_calls import assert_same, built, cells, configs, inputs, leaves, run

LEAD, VOCAB, HIDDEN = (2, 4), 512, 64
# Values per token (labels, row terms, losses) may stay: far less than a row of logits or hidden states per token.
PER_TOKEN = 512
every_reentrance = pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])


class MadeStorages(TorchDispatchMode):
    """Sums the memory that operations have allocated and not freed."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                storage = x.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def held(self, at_most):
        """Allocated bytes without those of unreachable objects."""
        if (held := self._held()) > at_most:
            gc.collect()
            held = self._held()
        return held

    def _held(self):
        return sum(size for reference, size in self.made.values() if not reference.expired())


def offloading():
    """Hooks that store every saved tensor outside of torch, like an offload to disk."""
    return torch.autograd.graph.saved_tensors_hooks(
        lambda x: (x.detach().double().numpy().copy(), x.dtype),
        lambda packed: torch.from_numpy(packed[0]).to(packed[1]),
    )


def arguments_of(config, **options):
    return inputs(config, LEAD, VOCAB, HIDDEN, **options)


@cells(configs())
def test_all_memory_kept_for_the_backward_passes_through_the_hooks(flag, config):
    loss = built(config, flag)
    arguments = arguments_of(config)
    expected = run(loss, arguments)
    with MadeStorages() as storages, offloading():
        value = loss(**arguments)
    limit = PER_TOKEN * arguments["labels"].numel()
    assert storages.held(limit) <= limit
    with offloading():
        got = run(loss, arguments)
    assert_same(got, expected)
    del value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
@cells(configs(reductions=["mean"]), interpreted=False)
def test_in_other_dtypes(flag, config, dtype):
    loss = built(config, flag)
    arguments = arguments_of(config, dtype=dtype)
    with MadeStorages() as storages, offloading():
        value = loss(**arguments)
    limit = PER_TOKEN * arguments["labels"].numel()
    assert storages.held(limit) <= limit
    del value


@cells(configs(), interpreted=False)
def test_save_on_cpu(flag, config):
    loss = built(config, flag)
    arguments = arguments_of(config)
    expected = run(loss, arguments)
    with torch.autograd.graph.save_on_cpu():
        got = run(loss, arguments)
    assert_same(got, expected)


@every_reentrance
@cells(configs(), interpreted=False)
def test_checkpointed_chunks_of_head_and_loss(flag, config, use_reentrant):
    loss = built(config, flag)
    g = torch.Generator().manual_seed(1)
    chunks = [arguments_of(config, seed=seed, requires_grad=False) for seed in range(4)]
    hidden = torch.randn(4, *LEAD, HIDDEN, generator=g).requires_grad_()
    weight = (torch.randn(VOCAB, HIDDEN, generator=g) / 8).requires_grad_()

    def head_and_loss(chunk, hidden, weight):
        of = "student_" if "student_lm_weight" in chunk else ""
        if f"{of}lm_weight" in chunk:
            return loss(**chunk | {f"{of}hidden_states": hidden, f"{of}lm_weight": weight}).sum()
        logits = next(name for name in chunk if name in ("logits", "student_logits"))
        return loss(**chunk | {logits: hidden @ weight.T}).sum()

    def total(call):
        parts = [call(chunk, h, weight) for chunk, h in zip(chunks, hidden.unbind(), strict=True)]
        return torch.stack(parts).sum()

    expected = torch.autograd.grad(total(head_and_loss), (hidden, weight))
    with MadeStorages() as storages:
        value = total(lambda *args: checkpoint(head_and_loss, *args, use_reentrant=use_reentrant))
    limit = PER_TOKEN * sum(chunk["labels"].numel() for chunk in chunks)
    assert storages.held(limit) <= limit
    value.backward()
    torch.testing.assert_close((hidden.grad, weight.grad), expected)


@cells(configs(), interpreted=False)
def test_a_second_backward_under_hooks(flag, config):
    loss = built(config, flag)
    arguments = arguments_of(config)
    wanted = list(leaves(arguments).values())
    with offloading():
        value = loss(**arguments).sum()
    first = [x.clone() for x in torch.autograd.grad(value, wanted, retain_graph=True)]
    second = torch.autograd.grad(value, wanted)
    torch.testing.assert_close(first, list(second))
