"""The log-probabilities of verl's policies: those of the formula in float64, and where verl is installed its own."""

# T = tokens, V = vocabulary, H = hidden

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from helpers.largest_tensor import LargestTensor
from helpers.process_group import over_processes
from helpers.tiny_models import batch, made
from loss_core import BackendUnavailable
from loss_core.dispatch.observed import names, observing
from loss_core_torch.integrations import verl as ours_for_verl
from loss_core_torch.integrations.verl import FusedLinearForPPO, linear_cross_entropy

V, H, T = 97, 32, 24
needs_verl = pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed")


def problem(dtype=torch.float32):
    """Hidden states, weight and labels, and upstream gradients of log-probabilities and entropies."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, T // 2, H, generator=generator).to(dtype).requires_grad_()
    weight = (2.0 * H**-0.5 * torch.randn(V, H, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (2, T // 2), generator=generator)
    return hidden, weight, labels, torch.randn(2, 2, T // 2, generator=generator)


def by_formula(temperature):
    """Results and gradients in float64."""
    hidden, weight, labels, upstream = problem(torch.float64)
    log_p = (hidden @ weight.T / temperature).log_softmax(-1)
    results = log_p.gather(-1, labels[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)
    gradients = torch.autograd.grad(results, (hidden, weight), upstream.double().unbind())
    return [x.detach() for x in (*results, *gradients)]


def close(found, expected, **tolerance):
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-5}
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double().reshape(y.shape), y.double(), **tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_module_is_the_formula(temperature):
    hidden, weight, labels, upstream = problem()
    results = FusedLinearForPPO(backend="torch:eager")(hidden, weight, labels, temperature)
    assert [(x.shape, x.dtype) for x in results] == [(labels.shape, torch.float32)] * 2
    close((*results, *torch.autograd.grad(results, (hidden, weight), upstream.unbind())), by_formula(temperature))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_function_is_the_formula(reduction):
    hidden, weight, labels, _ = problem()
    log_probs, entropy = linear_cross_entropy(hidden, weight, labels, 0.7, reduction)
    expected, entropies, *_ = by_formula(0.7)
    assert entropy.shape == (T,)
    assert log_probs.shape == ((T,) if reduction == "none" else ())
    close((log_probs, entropy), (expected if reduction == "none" else getattr(expected, reduction)(), entropies))


@over_processes(2)
def test_over_ranks(world):
    hidden, weight, labels, upstream = problem()
    parts = [40, V - 40]
    mine = weight.detach().split(parts)[world.rank].clone().requires_grad_()
    results = linear_cross_entropy(hidden, mine, labels, 0.7, "none", world.group, backend=world.flag)
    by_hidden, by_weight = torch.autograd.grad(results, (hidden, mine), upstream.flatten(1).unbind())
    # As in verl, the gradient of the hidden states is summed over the ranks.
    torch.distributed.all_reduce(by_hidden)
    expected = by_formula(0.7)
    close((*results, by_hidden, by_weight), (*expected[:3], expected[3].split(parts)[world.rank]))


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
@over_processes(2)
def test_over_megatrons_sequence_parallel(world):
    from megatron.core.tensor_parallel import mappings

    hidden, weight, labels, upstream = problem()
    mine = weight.detach().tensor_split(2)[world.rank].clone().requires_grad_()
    share = hidden.detach().flatten(0, 1).tensor_split(2)[world.rank].clone().requires_grad_()
    # Its collectives read the current GPU.
    with mock.patch.object(torch.cuda, "current_device", return_value=torch.device("cpu")):
        gathered = mappings.gather_from_sequence_parallel_region(share, group=world.group)
        results = linear_cross_entropy(gathered, mine, labels, 0.7, "none", world.group, backend=world.flag)
        by_share, by_weight = torch.autograd.grad(results, (share, mine), upstream.flatten(1).unbind())
    *expected, by_hidden, by_whole = by_formula(0.7)
    parts = by_hidden.flatten(0, 1).tensor_split(2)[world.rank], by_whole.tensor_split(2)[world.rank]
    close((*results, by_share, by_weight), (*expected, *parts))


def test_no_logits_are_made():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1536, H, generator=generator), torch.randn(2**15, H, generator=generator)
    labels = torch.randint(0, 2**15, (1536,), generator=generator)
    with LargestTensor() as largest:
        results = FusedLinearForPPO(backend="torch:eager")(hidden.requires_grad_(), weight.requires_grad_(), labels)
        sum(x.sum() for x in results).backward()
    assert 0 < largest.numel < 1536 * 2**15 / 2


def test_unshifted_labels_give_other_numbers():
    hidden, weight, labels, _ = problem()
    right, wrong = (FusedLinearForPPO()(hidden, weight, y)[0].mean() for y in (labels.roll(-1, -1), labels))
    assert abs(right - wrong) > 0.01


def test_what_is_refused():
    hidden, weight, labels, _ = problem()
    with pytest.raises(ValueError, match="reduction must be 'none', 'sum' or 'mean', got 'avg'"):
        linear_cross_entropy(hidden, weight, labels, 1.0, "avg")
    with pytest.raises(BackendUnavailable):
        FusedLinearForPPO(backend="torch:te")


@pytest.mark.skipif(importlib.util.find_spec("verl") is not None, reason="verl is installed")
def test_without_verl():
    with pytest.raises(ImportError, match=r"needs verl .*pip install 'verl>=0\.9'"):
        ours_for_verl.use_fused_log_probs()


@needs_verl
def test_the_module_is_verls():
    from verl.utils.experimental.torch_functional import FusedLinearForPPO as Verls

    hidden, weight, labels, upstream = problem()
    made = []
    for loss in (FusedLinearForPPO(backend="torch:eager"), Verls(chunk_size=5)):
        results = loss(hidden, weight, labels, 0.7)
        made.append((*results, *torch.autograd.grad(results, (hidden, weight), upstream.unbind())))
    close(*made)


def trained(steps=5):
    """Losses of a policy under verl's forward, and its parameters."""
    from transformers import LlamaForCausalLM
    from verl.models.transformers.monkey_patch import patch_forward_with_backends
    from verl.trainer.ppo.core_algos import agg_loss, compute_policy_loss_vanilla

    class Policy(LlamaForCausalLM):
        """verl replaces the forward of the class."""

    policy = Policy(made().config)
    policy.load_state_dict(made().state_dict())
    patch_forward_with_backends(policy, use_fused_kernels=True, fused_kernels_backend="torch")
    optimizer, losses, old = torch.optim.SGD(policy.parameters(), lr=1e-2), [], None
    tokens, mask = batch()["input_ids"], (batch()["labels"] != -100).float()
    settings = SimpleNamespace(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, global_batch_info={})
    settings.get = lambda name, default: default
    advantages = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        outputs = policy(input_ids=tokens, temperature=0.7, return_dict=True)
        old = outputs.log_probs.detach() if old is None else old
        loss, _ = compute_policy_loss_vanilla(old, outputs.log_probs, advantages, mask, config=settings)
        loss = loss - 0.01 * agg_loss(outputs.entropy, mask, "token-mean")
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, policy


@needs_verl
def test_in_verls_forward():
    (expected, other), undo = trained(), ours_for_verl.use_fused_log_probs(backend="torch:eager")
    with observing() as seen:
        losses, policy = trained()
    undo()
    assert names(seen) == "torch:eager"
    assert losses == pytest.approx(expected, abs=1e-5)
    assert (policy.lm_head.weight - made().lm_head.weight).abs().max() > 1e-3
    close(policy.parameters(), other.parameters(), rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="are not these any more"):
        undo()


@needs_verl
def test_as_an_external_module(tmp_path):
    # As verl's workers import it: while verl itself is being imported.
    (tmp_path / "my_losses.py").write_text(
        "from loss_core_torch.integrations import verl\nverl.use_fused_log_probs(backend='torch:eager')\n"
    )
    code = """
import torch, verl
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy
loss = FusedLinearForPPO(impl_backend="torch")
print(type(loss).__module__, loss.loss.kernel_choice.flag, linear_cross_entropy.func.__module__)
"""
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "VERL_USE_EXTERNAL_MODULES": "my_losses"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    name = "loss_core_torch.integrations.verl"
    assert ran.stdout.split() == [name, "torch:eager", name], ran.stderr
