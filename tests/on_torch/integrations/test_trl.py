"""The losses in TRL's trainers: loss, parameters and metrics are those of the trainer's own."""

import contextlib
import copy

import pytest
import torch

from helpers.largest_tensor import LargestTensor
from helpers.process_group import over_processes
from helpers.tiny_models import MINICPM3, batch, made, with_biased_head
from helpers.trl_trainers import assert_same_training, dpo, grpo, kto, rloo, sft, trained
from loss_core import BackendUnavailable, FusedLinearCEConfig
from loss_core.dispatch.observed import names, observing
from loss_core_torch.integrations import hf
from loss_core_torch.integrations import trl as ours_for_trl

trl = pytest.importorskip("trl")


def trainer_of(model, folder, steps=1, **settings):
    return sft(model, folder, gradient_accumulation_steps=steps, learning_rate=1e-2, **settings)


@pytest.mark.filterwarnings("ignore:.*compute_loss_func:FutureWarning")
@pytest.mark.parametrize("steps", [1, 3], ids=["one batch", "three batches"])
def test_over_logits(steps, tmp_path):
    ours = trainer_of(made(), tmp_path, steps, compute_loss_func=hf.causal_lm_loss())
    assert_same_training(trained(ours), trained(trainer_of(made(), tmp_path, steps)))


@pytest.mark.parametrize("steps", [1, 3], ids=["one batch", "three batches"])
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_fused(loss_type, steps, tmp_path):
    ours = trainer_of(made(), tmp_path, steps, loss_type=loss_type)
    ours_for_trl.use_fused_loss(ours, FusedLinearCEConfig(), backend="torch:eager")
    assert_same_training(trained(ours), trained(trainer_of(made(), tmp_path, steps, loss_type=loss_type)))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Granite", {"logits_scaling": 4.0}),
        ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 16}),
        ("MiniCPM3", MINICPM3),
    ],
)
def test_scales_and_softcaps(name, settings, tmp_path):
    ours = trainer_of(made(name, **settings), tmp_path)
    ours_for_trl.use_fused_loss(ours)
    assert_same_training(trained(ours), trained(trainer_of(made(name, **settings), tmp_path)))


def test_a_bias(tmp_path):
    ours = trainer_of(with_biased_head("Granite", logits_scaling=4.0), tmp_path)
    ours_for_trl.use_fused_loss(ours)
    assert_same_training(trained(ours), trained(trainer_of(with_biased_head("Granite", logits_scaling=4.0), tmp_path)))


def test_the_loss_is_ours(tmp_path):
    trainer = trainer_of(made(), tmp_path)
    seen = []
    ours_for_trl.use_fused_loss(trainer)
    trainer.model.lm_head.register_forward_hook(lambda head, args, output: seen.append(tuple(output.shape)))
    model, inputs = trainer.model.train(), batch()
    outputs = model(**inputs, fused_lm_head=True)
    assert seen == [(4, 12)]
    assert outputs.log_probs.shape == outputs.entropy.shape == (4, 11)


def test_undo(tmp_path):
    trainer = trainer_of(made(), tmp_path)
    before = trainer.model.forward
    undo = ours_for_trl.use_fused_loss(trainer)
    undo()
    assert trainer.model.forward == before
    with pytest.raises(RuntimeError, match="is not this one any more"):
        undo()


def test_log_probabilities_that_are_not_trls_are_an_error(tmp_path):
    trainer = trainer_of(made("Granite", logits_scaling=4.0), tmp_path)
    trainer.model.config.logits_scaling = 1.0
    ours_for_trl.use_fused_loss(trainer)
    with pytest.raises(RuntimeError, match="GraniteForCausalLM differ from TRL's by up to"):
        trainer.train()


@pytest.mark.filterwarnings("ignore:.*(compute_loss_func|label_smoothing_factor):FutureWarning")
def test_what_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"trainer is a LlamaForCausalLM; pass a trl\.SFTTrainer"):
        ours_for_trl.use_fused_loss(made())
    with pytest.raises(ValueError, match="it would not use this loss"):
        ours_for_trl.use_fused_loss(trainer_of(made(), tmp_path, compute_loss_func=hf.causal_lm_loss()))
    with pytest.raises(ValueError, match="it would not use this loss"):
        ours_for_trl.use_fused_loss(trainer_of(made(), tmp_path, label_smoothing_factor=0.1))
    trainer = trainer_of(made(), tmp_path, loss_type="dft")
    with pytest.raises(ValueError, match="have no meaning for"):
        ours_for_trl.use_fused_loss(trainer, FusedLinearCEConfig(label_smoothing=0.1))
    with pytest.raises(ValueError, match="ignore_index=-100"):
        ours_for_trl.use_fused_loss(trainer, FusedLinearCEConfig(ignore_index=0))


@pytest.fixture
def fused_log_probs():
    """Context in which TRL's function is replaced by ours."""

    @contextlib.contextmanager
    def taken(backend="torch:eager"):
        undo = ours_for_trl.use_fused_log_probs(backend=backend)
        try:
            yield
        finally:
            undo()

    return taken


@pytest.mark.parametrize("trainer_of", [sft, dpo, kto, grpo, rloo], ids=lambda trainer_of: trainer_of.__name__)
def test_fused_log_probs(trainer_of, fused_log_probs, tmp_path):
    expected = trained(trainer_of(made(), tmp_path))
    with fused_log_probs(), observing() as seen:
        found = trained(trainer_of(made(), tmp_path))
    assert names(seen) == "torch:eager"
    assert_same_training(found, expected)
    assert (found[1].lm_head.weight - made().lm_head.weight).abs().max() > 1e-4


OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
MODELS = {
    "scale and bias": lambda: with_biased_head("Granite", logits_scaling=4.0),
    "softcap and bias": lambda: with_biased_head("Gemma2", final_logit_softcapping=2.0, head_dim=16),
    "scale and softcap": lambda: made("Gemma2", final_logit_softcapping=2.0, head_dim=16, logit_scale=0.5),
}


def called(model, labels=None, outputs=OUTPUTS, **settings):
    """All outputs of one call of a copy, and its gradients."""
    from trl.trainer.utils import add_fused_lm_head

    model = copy.deepcopy(model)
    add_fused_lm_head(model, outputs=outputs, **settings)
    inputs = batch()
    found = model(**inputs | {"labels": inputs["labels"] if labels is None else labels}, fused_lm_head=True)
    (found.loss + sum(x.square().sum() for x in (found.log_probs, found.entropy) if x is not None)).backward()
    return dict(found), {name: x.grad for name, x in model.named_parameters()}


@pytest.mark.parametrize("outputs", [OUTPUTS, ("log_probs", "mean_logits"), ("log_probs",)], ids=len)
@pytest.mark.parametrize("name", MODELS)
def test_a_call(name, outputs, fused_log_probs):
    model = MODELS[name]()
    expected, others = called(model, outputs=outputs, temperature=0.7)
    with fused_log_probs():
        found, gradients = called(model, outputs=outputs, temperature=0.7)
    assert found.keys() == expected.keys() >= {*outputs, "loss"}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, others, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("cast", [False, True], ids=["as it is", "head in float32"])
def test_dtypes(cast, autocast, fused_log_probs):
    model = made() if autocast else made().bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, others = called(model, cast_lm_head_to_fp32=cast)
        with fused_log_probs():
            found, gradients = called(model, cast_lm_head_to_fp32=cast)
    assert {name: x.dtype for name, x in gradients.items()} == {name: x.dtype for name, x in others.items()}
    # Where the head is not in float32, TRL rounds its logits to bfloat16, which are up to 16 here.
    tolerance = 1e-5 if cast else 16 * 2.0**-8
    torch.testing.assert_close(found["log_probs"], expected["log_probs"], rtol=0, atol=tolerance)


def test_no_logits_are_made(fused_log_probs):
    from trl.trainer.utils import add_fused_lm_head

    # Logits of 128 MiB: more than a block of the kernel's.
    tokens = {name: x.repeat(32, 1) for name, x in batch(size=4).items()}
    model = made(vocab_size=2 * 2**14)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    with fused_log_probs(), LargestTensor() as largest:
        outputs = model(**tokens, fused_lm_head=True)
        (outputs.log_probs.sum() + outputs.entropy.sum()).backward()
    assert 0 < largest.numel < tokens["labels"].numel() * 2**14


@over_processes(2)
def test_log_probs_under_fsdp2(world):
    from torch.distributed.fsdp import fully_shard
    from trl.trainer.utils import add_fused_lm_head

    def trained_on(seed):
        model = with_biased_head()
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        for module in (*model.model.layers, model.lm_head, model):
            fully_shard(module)
        found = model(**batch(seed), fused_lm_head=True)
        (found.loss + found.entropy.sum()).backward()
        gradients = [x.grad.full_tensor() for x in model.parameters()]
        return found.log_probs.detach(), found.entropy.detach(), *gradients

    expected = trained_on(world.rank)
    undo = ours_for_trl.use_fused_log_probs(backend=world.flag)
    with observing() as seen:
        found = trained_on(world.rank)
    undo()
    assert names(seen) == world.flag
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_labels_that_are_shifted_already_give_other_log_probs(fused_log_probs):
    # The same number of valid labels, so that only the tokens differ.
    shifted = batch()["input_ids"].roll(-1, dims=1).masked_fill(batch()["labels"] == -100, -100)
    with fused_log_probs():
        right, wrong = called(made())[0]["loss"], called(made(), shifted)[0]["loss"]
    assert abs(right - wrong) > 0.01


def test_log_probs_that_are_refused(fused_log_probs, monkeypatch):
    from trl.trainer import utils

    theirs = utils._ChunkedLogProbFunction
    with pytest.raises(BackendUnavailable):
        ours_for_trl.use_fused_log_probs(backend="torch:te")
    assert utils._ChunkedLogProbFunction is theirs
    undo = ours_for_trl.use_fused_log_probs()
    with pytest.raises(ValueError, match="from loss_core already"):
        ours_for_trl.use_fused_log_probs()
    undo()
    with pytest.raises(RuntimeError, match="are not these any more"):
        undo()
    with fused_log_probs():
        with pytest.raises(ValueError, match=r"logit scale is 0\.0; it must be > 0"):
            called(made("Cohere", logit_scale=0.0))
        weight = torch.zeros(3, 2)
        weight.ds_id = 0  # As DeepSpeed marks what it has partitioned.
        with pytest.raises(ValueError, match="DeepSpeed ZeRO-3"):
            utils._ChunkedLogProbFunction.apply(torch.zeros(1, 2), weight, None, torch.zeros(1).long(), 1.0, 3)
    # A version of TRL with other arguments.
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", torch.autograd.Function)
    with pytest.raises(RuntimeError, match=r"pip install 'trl==1\.16"):
        ours_for_trl.use_fused_log_probs()
