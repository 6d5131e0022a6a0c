"""The loss of Megatron's language models: on tensors, and in place of a model's own."""

# B = batch, S = sequence, V = vocabulary

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from helpers.largest_tensor import LargestTensor
from helpers.process_group import over_processes
from loss_core import FusedLinearCEConfig, MaskedCrossEntropyConfig, TEParallelCEConfig
from loss_core.check import check
from loss_core.check.judge.implementation import implementation_named
from loss_core_torch.integrations.megatron import language_model_loss

B, S, V = 3, 10, 96


def problem():
    generator = torch.Generator().manual_seed(0)
    logits_SBV = torch.randn(S, B, V, generator=generator, requires_grad=True)
    return torch.randint(0, V, (B, S), generator=generator), logits_SBV


@pytest.mark.parametrize("config", [None, MaskedCrossEntropyConfig(reduction="none")])
def test_each_token_has_its_own_loss(config):
    labels, logits = problem()
    labels[0, :4] = -100
    weights = torch.randn(B, S)
    loss = language_model_loss(config)(labels, logits)
    expected = F.cross_entropy(logits.permute(1, 2, 0), labels, reduction="none")
    assert loss.shape == (B, S)
    assert loss.is_contiguous()
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), logits)
    torch.testing.assert_close(gradient, torch.autograd.grad((expected * weights).sum(), logits)[0])


@pytest.mark.parametrize("batch_first", [False, True], ids=["sequence first in memory", "batch first in memory"])
def test_the_logits_are_not_copied(batch_first):
    # 64 MiB: more than a block of the kernel's.
    logits = torch.zeros(4, 128, 2**15).transpose(0, 1) if batch_first else torch.zeros(128, 4, 2**15)
    loss = language_model_loss(backend="torch:eager")
    with torch.no_grad(), LargestTensor() as largest:
        loss(torch.zeros(4, 128, dtype=torch.long), logits)
    assert 0 < largest.numel < logits.numel()


def test_labels_that_are_not_shifted_give_another_number():
    labels, logits = problem()
    loss = language_model_loss()
    assert abs(loss(labels, logits).mean() - loss(labels.roll(1, 1), logits).mean()) > 0.01


def test_what_is_refused():
    labels, logits = problem()
    with pytest.raises(TypeError, match="got a FusedLinearCEConfig"):
        language_model_loss(FusedLinearCEConfig(reduction="none"))
    with pytest.raises(ValueError, match="reduction='sum', but Megatron takes one loss per token"):
        language_model_loss(TEParallelCEConfig())
    with pytest.raises(ValueError, match=r"labels has shape \(10, 3\) and logits \(10, 3, 96\).*sequence-first"):
        language_model_loss()(labels.T, logits)


def model_of(world):
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(world.ranks)
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=2, use_cpu_initialization=True,
        tensor_model_parallel_size=world.ranks,
    )  # fmt: skip
    return GPTModel(config, get_gpt_layer_local_spec(), vocab_size=V, max_sequence_length=S)


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
@over_processes(2)
def test_in_place_of_a_models_own(world):
    # Its attention needs a GPU, so the method that is replaced is called with logits.
    from megatron.core import parallel_state

    model = model_of(world)
    try:
        labels, whole = problem()
        part = V // world.ranks
        weights = torch.randn(B, S, generator=torch.Generator().manual_seed(1))
        results = []
        for replaced in (False, True):
            if replaced:
                model.compute_language_model_loss = language_model_loss()
            logits = whole.detach()[..., world.rank * part : (world.rank + 1) * part].clone().requires_grad_()
            # Megatron's own writes over its logits.
            loss = model.compute_language_model_loss(labels, logits * 1.0)
            (loss * weights).sum().backward()
            results.append((loss.detach(), logits.grad))
        torch.testing.assert_close(*results)
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
def test_its_own_loss_is_judged_by_name():
    judged = [implementation_named("megatron")]
    report = check("MaskedCrossEntropy", implementations=judged, dtypes=["float32"], only=["basic"])
    broken = {verdict.clause for verdict in report.broken}
    assert {"inputs left alone", "backward twice", "labels that are no class"} <= broken
    assert not {"values", "gradient of logits", "strided columns"} & broken
