"""One rank of a scenario of test_torch_distributed.py; run as a script, one process per rank.

Usage: distributed_worker.py RANK WORLD_SIZE FOLDER [FLAG]

Runs every scenario in turn, since starting two interpreters takes longer than all of them.
"""

import sys
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from loss_core import FusedLinearCEConfig, KDLossConfig, TEParallelCEConfig, oracle
from loss_core.cases import named_cases
from loss_core.dtypes import round_to
from loss_core.tolerance import allowances, share_of_allowance
from loss_core_torch import values
from worker_exit import leave_after

VOCAB = 506  # divides by 2


def _same_on_all_ranks(value):
    gathered = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, value)
    assert all(torch.equal(x, value) for x in gathered), "ranks disagree bitwise"


def _shard(x, rank, ranks):
    size = x.shape[-1] // ranks
    return np.ascontiguousarray(x[..., rank * size : (rank + 1) * size])


def vocabulary_sharded(config, dtype, rank, ranks, flag="torch:eager"):
    """Each rank holds an equal share of the vocabulary; loss and gradients against the whole problem."""
    group = dist.group.WORLD
    only = ("basic", "mean", "none", "all-ignored", "ragged", "huge-logits", "minus-inf", "mask", "count",
            "loss-weights", "edge-labels", "nan-where-ignored", "temperature")  # fmt: skip
    cases = [case for case in named_cases(config, shape=(24, VOCAB)) if case.name in only]
    assert len(cases) >= 8
    for case in cases:
        arrays = {k: round_to(v, dtype) if v.dtype.kind == "f" else v for k, v in case.arrays.items()}
        expected = oracle.evaluate(case.config, arrays, case.upstream)
        allowed = allowances(case.config, arrays, expected, dtype, upstream=case.upstream)
        inputs = {}
        for name, value in arrays.items():
            local = _shard(value, rank, ranks) if name.endswith("logits") else value
            inputs[name] = torch.from_numpy(np.array(local))
            if value.dtype.kind == "f":
                inputs[name] = inputs[name].to(getattr(torch, dtype)).requires_grad_(name in case.grad_of)
        built = type(case.config)(**{**case.config.__dict__, "tp_group": group}).build(backend=flag)
        assert built.kernel_choice.flag == flag
        loss = built(**inputs)
        _same_on_all_ranks(loss.detach())
        upstream = torch.ones_like(loss) if case.upstream is None else torch.as_tensor(case.upstream).to(loss)
        loss.backward(upstream)
        results = {"loss": (loss, expected.loss, allowed["loss"])}
        for name in case.grad_of:
            whole, limit = expected.grads[name], allowed[name]
            if name.endswith("logits"):
                whole, limit = _shard(whole, rank, ranks), _shard(limit, rank, ranks)
            results[name] = (inputs[name].grad, whole, limit)
        for name, (got, whole, limit) in results.items():
            kind = str(got.dtype).removeprefix("torch.")
            share = share_of_allowance(got.detach().double().numpy(), whole, limit, kind)
            assert share.max(initial=0) <= 1, (case.name, name, share.max())


def _refuses(rank, ranks):
    """Shards of unequal size: a ValueError on every rank, and no hang."""
    logits = torch.randn(3, 4 + rank)
    loss_fn, labels = TEParallelCEConfig(tp_group=dist.group.WORLD).build(), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"\[4, 5\]"):
        loss_fn(logits, labels)
    # On a device whose values stay there, NaN.
    with unittest.mock.patch.object(values, "may_read", return_value=False):
        assert loss_fn(logits, labels).isnan()


class _Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 40, bias=False)

    def forward(self, x):
        return torch.tanh(self.body(x))


def _fsdp(rank, ranks):
    """Three steps of a fully_shard'ed model, tokens split over ranks, equal those of the unsharded run."""
    torch.manual_seed(0)
    plain, sharded = _Head(), _Head()
    sharded.load_state_dict(plain.state_dict())
    mesh = init_device_mesh("cpu", (ranks,))
    fully_shard(sharded.body, mesh=mesh)
    fully_shard(sharded.head, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    loss_fn = FusedLinearCEConfig().build()
    x, labels = torch.randn(3, 4 * ranks, 8), torch.randint(0, 40, (3, 4 * ranks))
    labels[:, 1] = -100
    steps = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (plain, sharded)]
    for x_B, labels_B in zip(x, labels, strict=True):
        count = int((labels_B != -100).sum())
        loss_fn(plain(x_B), labels_B, plain.head.weight, num_label_tokens=count).backward()
        mine = slice(rank * 4, (rank + 1) * 4)
        # FSDP averages gradients over ranks; times the ranks, it is the sum that the global count wants.
        loss = loss_fn(
            sharded(x_B[mine]), labels_B[mine], sharded.head.weight, num_label_tokens=count,
            grad_reduce_group=mesh.get_group(),
        ) * ranks  # fmt: skip
        loss.backward()
        for step in steps:
            step.step()
            step.zero_grad()
    for a, b in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert isinstance(b, DTensor)
        torch.testing.assert_close(b.full_tensor(), a, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=f"mesh size={ranks}, reduction group size=1"):
        loss_fn(x[0], labels[0], sharded.head.weight)
    with torch.no_grad():
        torch.testing.assert_close(
            loss_fn(x[0], labels[0], sharded.head.weight), loss_fn(x[0], labels[0], plain.head.weight)
        )


SHARDED = {
    "parallel-float32": lambda r, n, flag: vocabulary_sharded("TEParallelCrossEntropy", "float32", r, n, flag),
    "parallel-bfloat16": lambda r, n, flag: vocabulary_sharded("TEParallelCrossEntropy", "bfloat16", r, n, flag),
    "kd-float32": lambda r, n, flag: vocabulary_sharded(KDLossConfig(temperature=2.0), "float32", r, n, flag),
}
# Where the kernel plays no part, or eager's own suffices.
WHOLE = {"unequal": _refuses, "fsdp": _fsdp}


def main():
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    flag = sys.argv[4] if len(sys.argv) > 4 else "torch:eager"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(Path(folder) / "store").as_uri(), rank=rank, world_size=ranks)
    try:
        for name, sharded in SHARDED.items():
            sharded(rank, ranks, flag)
            print("held:", name, flush=True)
        for name, scenario in WHOLE.items() if flag == "torch:eager" else ():
            scenario(rank, ranks)
            print("held:", name, flush=True)
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    leave_after(main)
