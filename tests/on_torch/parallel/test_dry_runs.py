"""Dry runs of large jobs: one process stands for all ranks of a group, so nobody answers a message.

Over the "fake" backend the numbers mean nothing; under LocalTensorMode, which simulates the other ranks, they are so.
"""

# T = tokens, V = vocabulary, H = hidden

import contextlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from loss_core import (
    FusedLinearCEConfig,
    FusedLinearKDConfig,
    KDLossConfig,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
)

local_tensor = pytest.importorskip("torch.distributed._local_tensor", reason="not in this version of torch")
FakeStore = pytest.importorskip("torch.testing._internal.distributed.fake_pg").FakeStore

CONFIGS = (MaskedCrossEntropyConfig, TEParallelCEConfig, FusedLinearCEConfig, KDLossConfig, FusedLinearKDConfig)
RANKS, TOKENS, HIDDEN = 4, 6, 8
ROOT = Path(__file__).parents[3]
MODES = {"fake backend": contextlib.nullcontext, "FakeTensorMode": FakeTensorMode}

pytestmark = pytest.mark.xdist_group("dry runs")


@pytest.fixture
def fake_group():
    """A group of which this process is rank 0; LocalTensorMode, too, is entered on rank 0."""
    yield from _fake_group(0)


def _fake_group(rank):
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
    yield dist.group.WORLD
    dist.destroy_process_group()


def _labels():
    return torch.tensor([0, 3, -100, 2, 1, 0])


def _inputs(config, vocab):
    """Tensors of which a gradient is wanted, by name, and the labels."""
    if config is FusedLinearCEConfig:
        shapes = {"hidden_states": (TOKENS, HIDDEN), "lm_weight": (vocab, HIDDEN)}
    elif config is FusedLinearKDConfig:
        shapes = {
            f"{of}_{name}": (size, hidden)
            for of, hidden in (("student", HIDDEN), ("teacher", HIDDEN + 3))
            for name, size in (("hidden_states", TOKENS), ("lm_weight", vocab))
        }
    elif config is KDLossConfig:
        shapes = {"student_logits": (TOKENS, vocab), "teacher_logits": (TOKENS, vocab)}
    else:
        shapes = {"logits": (TOKENS, vocab)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def _placed(inputs, mesh):
    """Over a mesh of two dimensions the tokens are sharded as well; over one only the vocabulary."""
    by_token = [Shard(0)] if mesh.ndim == 2 else []
    placements = {"states": [*by_token, Replicate()], "weight": [*(Replicate() for _ in by_token), Shard(0)]}
    found = {
        name: distribute_tensor(value, mesh, placements.get(name.rpartition("_")[2], [*by_token, Shard(1)]))
        for name, value in inputs.items()
    }
    return {name: value.detach().requires_grad_() for name, value in found.items()}


def _meshes():
    return init_device_mesh("cpu", (RANKS,)), init_device_mesh("cpu", (2, RANKS // 2))


def _trains(loss_fn, inputs):
    """Results of forward and backward have the right shapes and placements."""
    loss = loss_fn(**inputs, labels=_labels())
    assert loss.shape == (TOKENS,) or loss.shape == ()
    loss.sum().backward()
    for value in inputs.values():
        assert value.grad.shape == value.shape
        assert getattr(value.grad, "placements", None) == getattr(value, "placements", None)
    return loss


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_group(fake_group, config, mode):
    with MODES[mode]():
        inputs = {name: value.requires_grad_() for name, value in _inputs(config, 5).items()}
        _trains(config(tp_group=fake_group).build(backend="torch:eager"), inputs)


@pytest.mark.parametrize("vocab", [20, 18, 9])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_dtensors(fake_group, config, mode, vocab):
    _dry_run(config, mode, vocab)


def _dry_run(config, mode, vocab):
    for mesh in _meshes():
        with MODES[mode]():
            _trains(config().build(backend="torch:eager"), _placed(_inputs(config, vocab), mesh))


def test_dtensors_of_the_last_rank():
    """9 classes leave it none. In a separate process: DTensor caches the rank."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "backends", "tests"))
    run = subprocess.run(
        [sys.executable, __file__], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr


def test_shares_of_the_sequence(fake_group):
    loss_fn = FusedLinearCEConfig(tp_group=fake_group, sequence_parallel=True).build(backend="torch:eager")
    hidden, weight = torch.randn(3, HIDDEN, requires_grad=True), torch.randn(5, HIDDEN, requires_grad=True)
    loss_fn(hidden, torch.arange(3 * RANKS), weight).backward()
    assert (hidden.grad.shape, weight.grad.shape) == (hidden.shape, weight.shape)


def test_arguments_are_checked(fake_group):
    loss_fn = TEParallelCEConfig(tp_group=fake_group).build(backend="torch:eager")
    with pytest.raises(ValueError, match="labels has shape"):
        loss_fn(torch.randn(3, 5), _labels())
    with pytest.raises(ValueError, match=r"labels\[0\] is 20, which is neither a class in \[0, 20\)"):
        loss_fn(torch.randn(1, 5), torch.tensor([20]))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_simulated_ranks(fake_group, config, reduction):
    """LocalTensorMode: loss and gradients are those of the unsharded tensors."""
    torch.manual_seed(0)
    inputs = _inputs(config, 20)
    whole = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    fields = {"reduction": reduction} if hasattr(config, "reduction") else {}
    loss_fn = config(**fields).build(backend="torch:eager")
    expected = _trains(loss_fn, whole)
    for mesh in _meshes():
        with local_tensor.LocalTensorMode(RANKS):
            placed = _placed(inputs, mesh)
            loss = _trains(loss_fn, placed)
            grads = {name: value.grad.full_tensor().reconcile() for name, value in placed.items()}
            loss = (loss.full_tensor() if isinstance(loss, DTensor) else loss).reconcile()
        torch.testing.assert_close(loss, expected)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, whole[name].grad)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_simulated_ranks_of_a_group(fake_group, config):
    """A process group does not identify the simulated rank: only shapes are right."""
    with local_tensor.LocalTensorMode(RANKS):
        inputs = {name: value.requires_grad_() for name, value in _inputs(config, 5).items()}
        _trains(config(tp_group=fake_group).build(backend="torch:eager"), inputs)


def test_simulated_ranks_of_uneven_parts(fake_group):
    """The fused loss; over logits, DTensor's own to_local has no backward for such parts (torch 2.13)."""
    torch.manual_seed(0)
    inputs = _inputs(FusedLinearCEConfig, 18)
    whole = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    expected = _trains(FusedLinearCEConfig().build(backend="torch:eager"), whole)
    mesh = _meshes()[0]
    with local_tensor.LocalTensorMode(RANKS):
        placed = _placed(inputs, mesh)
        loss = _trains(FusedLinearCEConfig().build(backend="torch:eager"), placed).reconcile()
        grad = placed["hidden_states"].grad.full_tensor().reconcile()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, whole["hidden_states"].grad)


if __name__ == "__main__":
    for _ in _fake_group(RANKS - 1):
        for config, mode, vocab in itertools.product(CONFIGS, MODES, (20, 18, 9)):
            _dry_run(config, mode, vocab)
