"""TRL's trainers on a CPU: a tiny model, rows of random words, five steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.tiny_models import V, batch, made

SETTINGS = {
    "max_steps": 5, "optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none",
    "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 0, "dataloader_pin_memory": False,
    "bf16": False, "gradient_checkpointing": False, "max_grad_norm": 0.0,
}  # fmt: skip


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", unk_token="w0")


def sft(model: Any, folder: Any, **settings: Any) -> Any:
    rows = {name: x.tolist() for name, x in batch(size=16).items()}
    rows["completion_mask"] = [[int(label != -100) for label in row] for row in rows.pop("labels")]
    return _made("SFT", model, folder, rows, max_length=None, **settings)


def dpo(model: Any, folder: Any, **settings: Any) -> Any:
    # WPO weighs pairs by sums of squared probabilities, the last of the metrics.
    rows = {"prompt": _texts(4), "chosen": _texts(5), "rejected": _texts(6)}
    return _made("DPO", model, folder, rows, use_weighting=True, ref_model=made(), **settings)


def kto(model: Any, folder: Any, **settings: Any) -> Any:
    rows = {"prompt": _texts(4), "completion": _texts(5), "label": [True, False] * 4}
    return _made("KTO", model, folder, rows, ref_model=made(), **settings)


def grpo(model: Any, folder: Any, **settings: Any) -> Any:
    return _with_rewards("GRPO", model, folder, **settings)


def rloo(model: Any, folder: Any, **settings: Any) -> Any:
    return _with_rewards("RLOO", model, folder, **settings)


def distillation(model: Any, folder: Any, teacher: Any, **settings: Any) -> Any:
    sampling = {"max_completion_length": 6, "teacher_model": teacher}
    return _made("Distillation", model, folder, {"prompt": _texts(4)}, **sampling | settings)


def trained(trainer: Any) -> tuple[list[dict[str, float]], Any]:
    """The log of each step without times, and the trained model."""
    trainer.train()
    log = [{k: v for k, v in x.items() if "time" not in k} for x in trainer.state.log_history if "loss" in x]
    return log, trainer.model


def assert_same_training(ours: tuple[Any, Any], own: tuple[Any, Any]) -> None:
    """Assert that two results of `trained` have equal logs and parameters."""
    (log, model), (expected, other) = ours, own
    assert len(log) == SETTINGS["max_steps"]
    assert [x.keys() for x in log] == [x.keys() for x in expected]
    for step, step_of_own in zip(log, expected, strict=True):
        assert step == pytest.approx(step_of_own, rel=1e-5, abs=1e-5)
    for parameter, parameter_of_own in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, parameter_of_own, rtol=0, atol=1e-5)


def _with_rewards(name: str, model: Any, folder: Any, **settings: Any) -> Any:
    # The reference model comes from where the model says that it came from.
    model.save_pretrained(folder)
    model.config._name_or_path = str(folder)

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text.split())) % 3) for text in completions]

    sampling = {"num_generations": 2, "max_completion_length": 6, "temperature": 0.7, "beta": 0.1}
    return _made(name, model, folder, {"prompt": _texts(4)}, reward_funcs=reward, **sampling | settings)


def _made(name: str, model: Any, folder: Any, rows: Any, **given: Any) -> Any:
    """The trainer; given: fields of its config, or arguments of the trainer."""
    import datasets
    import trl

    own = ("ref_model", "teacher_model", "reward_funcs", "compute_loss_func")
    arguments = {key: given.pop(key) for key in own if key in given}
    fields = {"output_dir": str(folder), "learning_rate": 1e-3, "per_device_train_batch_size": 2, **SETTINGS, **given}
    config = getattr(trl, f"{name}Config")(**fields)
    data = datasets.Dataset.from_dict(rows)
    return getattr(trl, f"{name}Trainer")(
        model=model, args=config, train_dataset=data, processing_class=tokenizer(), **arguments
    )


def _texts(words: int) -> list[str]:
    generator = torch.Generator().manual_seed(words)
    return [" " + " ".join(f"w{i}" for i in torch.randint(3, V, (words,), generator=generator)) for _ in range(8)]
