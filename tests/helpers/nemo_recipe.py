"""Recipes of NeMo AutoModel on a CPU: its own setup, data, steps and losses, on a tiny model of transformers.

Run it in a separate process: it replaces functions of torch.cuda.
"""

import os

import torch
from torch.distributed.fsdp import fully_shard

from helpers.tiny_models import V, made

RECIPE = {
    "dist_env": {"backend": "gloo"},
    "seed": 0,
    "step_scheduler": {
        "global_batch_size": 8, "local_batch_size": 2, "max_steps": 5, "num_epochs": 9, "ckpt_every_steps": 99,
    },
    "distributed": {"strategy": "ddp"},
    "checkpoint": {"enabled": False},
    "model": {},
    "dataset": {
        "_target_": "nemo_automodel.components.datasets.llm.mock.build_unpacked_dataset",
        "num_sentences": 48, "vocab_size": V, "max_sentence_len": 12, "mean_len": 8.0,
    },
    "dataloader": {
        "_target_": "torchdata.stateful_dataloader.StatefulDataLoader",
        "collate_fn": "nemo_automodel.components.datasets.utils.default_collater",
    },
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
    "clip_grad_norm": {"max_norm": 1e9},
}  # fmt: skip


def trained(world, folder, loss_fn, *, without_logits_to_keep=False, sharded=False, **sections):
    """Losses of five steps, and the recipe after them; loss_fn is the section of that name."""
    # Targets outside of nemo_automodel must be allowed before it is imported.
    os.environ["NEMO_ENABLE_USER_MODULES"] = "1"
    from nemo_automodel.components.config.loader import ConfigNode
    from nemo_automodel.recipes.llm import kd, train_ft

    # The recipes of nemo-automodel 0.7 read the memory of a GPU, and move the models that they build to a GPU.
    torch.cuda.reset_peak_memory_stats = torch.cuda.empty_cache = lambda *_: None
    torch.cuda.max_memory_allocated = lambda *_: 0
    os.environ |= {"RANK": str(world.rank), "LOCAL_RANK": str(world.rank), "WORLD_SIZE": str(world.ranks)}

    def model(*_, **__):
        student = made()
        if without_logits_to_keep:
            student.forward = _Forward(student)
        if sharded:
            return fully_shard(student)
        return torch.nn.parallel.DistributedDataParallel(student) if world.ranks > 1 else student

    train_ft.build_model = model
    kd._build_teacher_model = lambda *_, **__: made("Gemma2", head_dim=16).eval()
    kd._verify_tokenizer_compatibility = lambda *_: None
    recipe_of = kd.KnowledgeDistillationRecipeForNextTokenPrediction if "kd_loss_fn" in sections else (
        train_ft.TrainFinetuneRecipeForNextTokenPrediction
    )  # fmt: skip
    settings = {**RECIPE, "loss_fn": loss_fn, "checkpoint": {"enabled": False, "checkpoint_dir": folder}, **sections}
    recipe = recipe_of(ConfigNode(settings))
    recipe.setup()
    losses = []
    recipe.log_train_metrics = lambda sample: losses.append(sample.metrics["loss"])
    recipe.run_train_validation_loop()
    return losses, recipe


class _Forward:
    """A forward whose signature does not have logits_to_keep."""

    def __init__(self, model):
        self.own = model.forward

    def __call__(self, input_ids=None, attention_mask=None, position_ids=None, output_hidden_states=None):
        return self.own(input_ids, attention_mask, position_ids, output_hidden_states=output_hidden_states)
