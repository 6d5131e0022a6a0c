"""Both losses in a Trainer: loss and parameters after some steps are those of the library's own loss."""

import pytest
import torch

from helpers.tiny_models import V, batch, made, with_biased_head
from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig, TEParallelCEConfig
from loss_core_torch.integrations.hf import causal_lm_loss, use_fused_loss

pytest.importorskip("transformers")

HEADS = {"untied": made, "tied": lambda: made(tie_word_embeddings=True), "bias": with_biased_head}
ROWS = [{"input_ids": x, "labels": y} for x, y in zip(*batch(size=16).values(), strict=True)]


def trainer_of(model, folder, steps=1, **arguments):
    import transformers

    settings = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=steps, max_steps=5,
        learning_rate=1e-2, optim="sgd", lr_scheduler_type="constant", logging_steps=1, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, eval_strategy="steps", eval_steps=5, prediction_loss_only=False, seed=0,
        dataloader_pin_memory=False, max_grad_norm=0.0,
    )  # fmt: skip
    # A column that is no argument of the forward: Trainer must still drop it.
    rows = [{**row, "unused": 1} for row in ROWS]
    return transformers.Trainer(model, settings, train_dataset=rows, eval_dataset=rows[:3], **arguments)


def trained(model, folder, **arguments):
    trainer = trainer_of(model, folder, **arguments)
    trainer.train()
    log = trainer.state.log_history
    return [x["loss"] for x in log if "loss" in x], [x["eval_loss"] for x in log if "eval_loss" in x], trainer


def assert_same_training(ours, own, folder, **arguments):
    losses, evaluations, _ = trained(ours, folder, **arguments)
    expected, others, _ = trained(own, folder, steps=arguments.get("steps", 1))
    assert len(losses) == 5
    assert losses == pytest.approx(expected, abs=1e-5)
    assert evaluations == pytest.approx(others, abs=1e-5)
    assert (ours.lm_head.weight - made().lm_head.weight).abs().max() > 1e-3
    for parameter, other in zip(ours.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3], ids=["one batch", "three batches"])
def test_over_logits(steps, tmp_path):
    assert_same_training(made(), made(), tmp_path, steps=steps, compute_loss_func=causal_lm_loss())


@pytest.mark.parametrize("steps", [1, 3], ids=["one batch", "three batches"])
@pytest.mark.parametrize("head", HEADS)
def test_fused(head, steps, tmp_path):
    ours, own = HEADS[head](), HEADS[head]()
    use_fused_loss(ours, FusedLinearCEConfig(), backend="torch:eager")
    assert_same_training(ours, own, tmp_path, steps=steps)


def test_gradient_accumulation_is_one_large_batch(tmp_path):
    small, large = made(), made()
    for model, size, steps in ((small, 1, 4), (large, 4, 1)):
        use_fused_loss(model)
        trainer = trainer_of(model, tmp_path, steps=steps)
        trainer.args.per_device_train_batch_size = trainer._train_batch_size = size
        trainer.train()
    for parameter, other in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-5)


def test_metrics_receive_logits_in_evaluation(tmp_path):
    model, seen = made(), []
    use_fused_loss(model)

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {}

    trainer_of(model, tmp_path, compute_metrics=metrics).evaluate()
    assert seen == [(3, 12, V)]


def test_accelerates_hook_around_the_head():
    # With device_map and CPU offload the forward attribute of the head is accelerate's.
    from accelerate.hooks import ModelHook, add_hook_to_module

    model, own, seen = made(), made(), []

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    add_hook_to_module(model.lm_head, Hook())
    use_fused_loss(model)
    torch.testing.assert_close(model(**batch()).loss, own(**batch()).loss, rtol=1e-5, atol=1e-5)
    assert seen == [model.lm_head]
    assert model.eval()(**batch()).logits.shape[-1] == V


def outputs_and_labels():
    outputs, labels = made()(input_ids=batch()["input_ids"]), batch()["labels"]
    valid = labels[:, 1:] != -100
    total = torch.nn.functional.cross_entropy(outputs.logits[:, :-1][valid], labels[:, 1:][valid], reduction="sum")
    return outputs, labels, total.detach(), int(valid.sum())


@pytest.mark.parametrize("config", [None, MaskedCrossEntropyConfig(reduction="mean"), TEParallelCEConfig()])
def test_without_a_count_it_is_the_mean(config):
    outputs, labels, total, number = outputs_and_labels()
    loss = causal_lm_loss(config)(outputs, labels)
    torch.testing.assert_close(loss, total / number)
    # A custom loss with reduction="sum" returns the sum instead.
    assert abs(total - loss) > 10


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_sum_divided_by_the_count(shape, reduction):
    outputs, labels, total, _ = outputs_and_labels()
    loss = causal_lm_loss(MaskedCrossEntropyConfig(reduction=reduction))
    torch.testing.assert_close(loss(outputs, labels, num_items_in_batch=torch.full(shape, 100)), total / 100)
    torch.testing.assert_close(loss(outputs, labels, 100), total / 100)


def test_data_parallel_multiplies_by_the_number_of_devices():
    # Trainer passes the count once for each device, and multiplies the loss by their number.
    outputs, labels, total, _ = outputs_and_labels()
    loss = causal_lm_loss()(outputs, labels, num_items_in_batch=torch.tensor(100).unsqueeze(0).expand(2, -1))
    torch.testing.assert_close(loss * 2, total / 100)


def test_tuples_of_outputs():
    outputs, labels, total, number = outputs_and_labels()
    torch.testing.assert_close(causal_lm_loss()(outputs.to_tuple(), labels), total / number)


def test_labels_that_are_shifted_already_give_another_number():
    outputs, labels, total, number = outputs_and_labels()
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    assert abs(causal_lm_loss()(outputs, shifted) - total / number) > 0.01


def test_what_is_refused():
    with pytest.raises(TypeError, match="got a FusedLinearCEConfig; for it there is use_fused_loss"):
        causal_lm_loss(FusedLinearCEConfig())
    with pytest.raises(TypeError, match="got a KDLossConfig"):
        causal_lm_loss(KDLossConfig())
    with pytest.raises(ValueError, match="reduction='none'"):
        causal_lm_loss(MaskedCrossEntropyConfig(reduction="none"))
    with pytest.raises(ValueError, match="ignore_index=0"):
        causal_lm_loss(MaskedCrossEntropyConfig(ignore_index=0))
    with pytest.raises(ValueError, match="labels is None"):
        causal_lm_loss()(outputs_and_labels()[0], None)
