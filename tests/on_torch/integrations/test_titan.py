"""Both losses in torchtitan: its own trainer's loss and parameters after five steps are those of its own loss."""

# B = batch, S = sequence, V = vocabulary, H = hidden

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from helpers.largest_tensor import LargestTensor
from helpers.process_group import over_processes

if importlib.util.find_spec("torchtitan") is None:
    pytest.skip("torchtitan is not installed", allow_module_level=True)

# Before torchtitan, which otherwise assumes that the accelerator is a GPU.
from helpers.titan_trainer import trained

# isort: split
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, CrossEntropyLoss, MSELoss
from torchtitan.config.configs import CompileConfig
from torchtitan.distributed import utils as dist_utils
from torchtitan.distributed.spmd_types import set_current_spmd_mesh

from loss_core_torch.integrations import titan

B, S, V, H = 2, 16, 97, 32
OVER_LOGITS = "loss_core_torch.integrations.titan.cross_entropy"
FUSED = "loss_core_torch.integrations.titan.linear_cross_entropy"


# The default, spmd_types, does not shard over ranks with torch 2.13: fully_shard refuses its parameters.
DTENSOR = ("--parallelism.spmd_backend", "partial_dtensor")


def assert_same_training(world, override, loss, *arguments):
    expected, others, _ = trained(world, *arguments)
    losses, parameters, trainer = trained(world, *arguments, "--override.imports", override)
    assert type(trainer.loss_fn) is loss
    assert len(losses) == 5
    assert losses == pytest.approx(expected, abs=1e-5)
    assert parameters.keys() == others.keys()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, others[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True], ids=["over logits", "fused"])
@over_processes(1, 2)
def test_in_its_trainer(world, fused):
    # Its trainer puts the model under FSDP2, [norm, lm_head] as one group of it. Over two ranks a step has 3 batches.
    override, loss = (FUSED, titan.LinearCrossEntropy) if fused else (OVER_LOGITS, titan.CrossEntropy)
    batches, spmd = (3, DTENSOR) if world.ranks > 1 else (1, ())
    arguments = ["--training.global_batch_size", str(B * world.ranks * batches), *spmd]
    assert_same_training(world, override, loss, *arguments)


@over_processes(2)
def test_over_tensor_parallel(world):
    arguments = ["--parallelism.tensor_parallel_degree", "2", *DTENSOR]
    assert_same_training(world, OVER_LOGITS, titan.CrossEntropy, *arguments)
    with pytest.raises(ValueError, match=r"sharded over the mesh axes .*titan\.cross_entropy, over the logits"):
        trained(world, *arguments, "--override.imports", FUSED)


@over_processes(2)
def test_over_tensor_parallel_of_plain_tensors(world):
    # Each rank has its part of the vocabulary as a plain tensor; the group is that of the mesh around the call.
    head, hidden, labels, _ = problem()
    whole = head(hidden).detach()
    results = []
    dist_utils.set_spmd_backend("spmd_types")
    with set_current_spmd_mesh(init_device_mesh("cpu", (world.ranks,), mesh_dim_names=("tp",))):
        for loss in (CrossEntropyLoss.Config(global_vocab_size=V).build(), titan.CrossEntropy.Config().build()):
            logits = whole.tensor_split([V - V // 2], dim=-1)[world.rank].clone().requires_grad_()
            value, _ = loss(logits, labels, 27)
            value.backward()
            results.append((value.detach(), logits.grad))
        with pytest.raises(ValueError, match="without tensor parallel"):
            fused(head)(hidden, labels, 27)
    torch.testing.assert_close(*results)
    torch.testing.assert_close(results[0][0], F.cross_entropy(whole.flatten(0, 1), labels.flatten()))


def problem():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=False)
    hidden = torch.randn(B, S, H, generator=generator, requires_grad=True)
    tokens = torch.randint(0, V, (B, S + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, :5] = -100
    return head, hidden, labels, tokens[:, :-1]


def fused(head, **fields):
    loss = titan.LinearCrossEntropy.Config(**fields).build(compile_config=CompileConfig())
    loss.set_lm_head(head)
    return loss


def test_a_factor_on_the_loss_reaches_every_gradient():
    # torchtitan's own wrapper computes its gradients in the forward, without the factor.
    head, hidden, labels, _ = problem()
    count = (labels != -100).sum()
    loss, metrics = fused(head)(hidden, labels, count, positions=None)
    assert metrics == {}
    expected = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected)
    inputs = [hidden, head.weight]
    got = torch.autograd.grad(0.5 * loss, inputs)
    torch.testing.assert_close(got, torch.autograd.grad(0.5 * expected, inputs), rtol=1e-5, atol=1e-7)


def test_a_bias_of_the_head_and_its_gradient():
    _, hidden, labels, _ = problem()
    head = nn.Linear(H, V)
    loss, _ = fused(head)(hidden, labels, (labels != -100).sum())
    expected = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected)
    inputs = [hidden, head.weight, head.bias]
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs))


@pytest.mark.parametrize("over_logits", [True, False], ids=["over logits", "fused"])
def test_without_a_count_it_is_the_sum(over_logits):
    # As torchtitan's validation calls it.
    head, hidden, labels, _ = problem()
    with torch.no_grad():
        loss = titan.CrossEntropy.Config().build() if over_logits else fused(head)
        total, _ = loss(head(hidden) if over_logits else hidden, labels)
    torch.testing.assert_close(total, F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum"))


def test_unshifted_labels_give_another_number():
    head, hidden, labels, tokens = problem()
    hidden = 3.0 * hidden
    unshifted = tokens.masked_fill(labels == -100, -100)
    right, wrong = (fused(head)(hidden, y, 27)[0].item() for y in (labels, unshifted))
    assert abs(right - wrong) > 0.01


def test_no_logits_are_made():
    head, hidden, labels, _ = problem()
    hidden, labels = (x.detach().repeat(1, 256, *[1] * (x.ndim - 2)) for x in (hidden, labels))
    loss = fused(head, backend="torch:eager")
    with LargestTensor() as largest:
        loss(hidden.requires_grad_(), labels, 1)[0].backward()
    assert largest.numel < labels.numel() * V


@pytest.mark.slow
@pytest.mark.parametrize("over_logits", [True, False], ids=["over logits", "fused"])
def test_compiled(over_logits):
    head, hidden, labels, _ = problem()
    setting = CompileConfig(enable=True, backend="aot_eager")
    loss = (titan.CrossEntropy if over_logits else titan.LinearCrossEntropy).Config().build(compile_config=setting)
    if not over_logits:
        loss.set_lm_head(head)
    assert hasattr(loss.fn, "_orig_mod")
    got, _ = loss(head(hidden) if over_logits else hidden, labels, 27)
    torch.testing.assert_close(got, F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten()))


def test_options_and_the_flag_reach_the_loss():
    made = titan.linear_cross_entropy(
        ChunkedLossWrapper.Config(), label_smoothing=0.1, logit_softcapping=30.0, backend="torch:eager"
    )
    head, hidden, labels, _ = problem()
    loss = made.build()
    loss.set_lm_head(head)
    assert loss.fn.kernel_choice.flag == "torch:eager"
    logits = 30.0 * torch.tanh(head(hidden) / 30.0)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(loss(hidden, labels)[0], expected)


@pytest.mark.parametrize("override", [titan.cross_entropy, titan.linear_cross_entropy])
def test_recipes_that_are_refused(override):
    assert override(CrossEntropyLoss.Config()) == override(ChunkedLossWrapper.Config())
    for config in (MSELoss.Config(), ChunkedLossWrapper.Config(loss_fn=MSELoss.Config()), BaseLoss.Config()):
        with pytest.raises(TypeError, match=r"not CrossEntropyLoss\.Config: cross entropy would be another loss"):
            override(config)
    with pytest.raises(TypeError, match="num_chunks"):
        override(CrossEntropyLoss.Config(), num_chunks=8)


def test_what_is_refused():
    head, hidden, labels, _ = problem()
    loss = titan.LinearCrossEntropy.Config().build()
    with pytest.raises(RuntimeError, match=r"call set_lm_head\(model.lm_head\) first"):
        loss(hidden, labels)
    loss.set_lm_head(head)
    with pytest.raises(TypeError, match="got advantages, too"):
        loss(hidden, labels, advantages=labels)
    with pytest.raises(ValueError, match="labels has shape"):
        loss(hidden, labels[:, 1:])
