"""Both losses in an SFTTrainer: loss, parameters and metrics are those of the trainer's own loss."""

import pytest
import torch

from helpers.tiny_models import MINICPM3, V, batch, made, with_biased_head
from loss_core import FusedLinearCEConfig
from loss_core_torch.integrations import hf
from loss_core_torch.integrations import trl as ours_for_trl

trl = pytest.importorskip("trl")
METRICS = ("entropy", "mean_token_accuracy", "num_tokens")


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", unk_token="w0")


def trainer_of(model, folder, steps=1, loss_type="nll", label_smoothing=0.0, **arguments):
    import datasets

    settings = trl.SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=steps, max_steps=5,
        learning_rate=1e-2, optim="sgd", lr_scheduler_type="constant", logging_steps=1, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, seed=0, dataloader_pin_memory=False, loss_type=loss_type, bf16=False,
        label_smoothing_factor=label_smoothing, max_length=None, gradient_checkpointing=False, max_grad_norm=0.0,
    )  # fmt: skip
    rows = {name: x.tolist() for name, x in batch(size=16).items()}
    rows["completion_mask"] = [[int(label != -100) for label in row] for row in rows.pop("labels")]
    data = datasets.Dataset.from_dict(rows)
    return trl.SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer(), **arguments)


def trained(trainer):
    trainer.train()
    log = [x for x in trainer.state.log_history if "loss" in x]
    return [x["loss"] for x in log], [[x[name] for name in METRICS] for x in log]


def assert_same_training(ours, own):
    (losses, metrics), (expected, others) = trained(ours), trained(own)
    assert len(losses) == 5
    assert losses == pytest.approx(expected, abs=1e-5)
    for values, other in zip(metrics, others, strict=True):
        assert values == pytest.approx(other, abs=1e-4)
    for parameter, other in zip(ours.model.parameters(), own.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*compute_loss_func:FutureWarning")
@pytest.mark.parametrize("steps", [1, 3], ids=["one batch", "three batches"])
def test_over_logits(steps, tmp_path):
    ours = trainer_of(made(), tmp_path, steps, compute_loss_func=hf.causal_lm_loss())
    assert_same_training(ours, trainer_of(made(), tmp_path, steps))


@pytest.mark.parametrize("steps", [1, 3], ids=["one batch", "three batches"])
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_fused(loss_type, steps, tmp_path):
    ours = trainer_of(made(), tmp_path, steps, loss_type)
    ours_for_trl.use_fused_loss(ours, FusedLinearCEConfig(), backend="torch:eager")
    assert_same_training(ours, trainer_of(made(), tmp_path, steps, loss_type))


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
    assert_same_training(ours, trainer_of(made(name, **settings), tmp_path))


def test_a_bias(tmp_path):
    ours = trainer_of(with_biased_head("Granite", logits_scaling=4.0), tmp_path)
    ours_for_trl.use_fused_loss(ours)
    assert_same_training(ours, trainer_of(with_biased_head("Granite", logits_scaling=4.0), tmp_path))


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
        ours_for_trl.use_fused_loss(trainer_of(made(), tmp_path, label_smoothing=0.1))
    trainer = trainer_of(made(), tmp_path, loss_type="dft")
    with pytest.raises(ValueError, match="have no meaning for"):
        ours_for_trl.use_fused_loss(trainer, FusedLinearCEConfig(label_smoothing=0.1))
    with pytest.raises(ValueError, match="ignore_index=-100"):
        ours_for_trl.use_fused_loss(trainer, FusedLinearCEConfig(ignore_index=0))
