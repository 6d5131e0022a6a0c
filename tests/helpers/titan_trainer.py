"""torchtitan's own trainer on a CPU, with a small Llama and random tokens; import this before torchtitan."""

# B = batch, S = sequence

import importlib.util
import os
import types
from dataclasses import dataclass

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

if importlib.util.find_spec("torchtitan") is None:
    pytest.skip("torchtitan is not installed", allow_module_level=True)

# torchtitan 0.3 reads the accelerator type when it is imported, "cuda" if there is none, and calls functions of its
# module that torch.cpu does not have.
torch._utils._get_available_device_type = lambda: "cpu"
torch.cpu.get_device_name = lambda device=None: "cpu"
torch.cpu.get_device_properties = lambda device=None: types.SimpleNamespace(total_memory=2**30)
torch.cpu.memory_stats = lambda device=None: {}
torch.cpu.reset_peak_memory_stats = torch.cpu.empty_cache = lambda: None

from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.config import ConfigManager  # noqa: E402
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention  # noqa: E402

B, S, STEPS = 2, 16, 5


class Tokens(BaseDataLoader):
    """Random tokens, different on each data-parallel rank; the first labels are ignored, more on later ranks."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config, *, dp_rank, **_):
        self.rank = dp_rank

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.rank)
        while True:
            tokens = torch.randint(0, 2048, (B, S + 1), generator=generator)
            labels = tokens[:, 1:].clone()
            labels[0, : 5 + 4 * self.rank] = -100
            yield {"input": tokens[:, :-1], "positions": torch.arange(S).expand(B, S)}, labels

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class NoTokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config, **_):
        super().__init__()

    def encode(self, *args):
        return []

    def decode(self, *args):
        return ""

    def get_vocab_size(self):
        return 2048


def trained(world, *arguments):
    """Losses of five steps, and the parameters after them; arguments are those of torchtitan's command line."""
    os.environ |= {"RANK": str(world.rank), "LOCAL_RANK": str(world.rank), "WORLD_SIZE": str(world.ranks)}
    config = ConfigManager().parse_args([
        "--module", "llama3", "--config", "llama3_debugmodel", "--training.local_batch_size", str(B),
        "--training.seq_len", str(S), "--training.steps", str(STEPS), "--training.disable_cuda_graphs",
        "--training.mixed_precision_param", "float32", "--debug.seed", "0", "--checkpoint.no-enable",
        "--validator.no-enable", *arguments,
    ])  # fmt: skip
    config.dataloader, config.tokenizer = Tokens.Config(), NoTokenizer.Config()
    del config.model_spec.model.layers[2:]
    # The attention of its recipes has no backward on a CPU.
    for _, _, parent, name in list(config.model_spec.model.traverse(FlexAttention.Config)):
        setattr(parent, name, ScaledDotProductAttention.Config())
    trainer, losses = config.build(), []
    for module in trainer.model_parts[0].modules():
        # Its factor of 1 is a premultiplied sum, which gloo does not support; a plain sum is equal.
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    log = trainer.metrics_processor.log

    def seen(step, loss, *args, **kwargs):
        losses.append(loss)
        log(step, loss, *args, **kwargs)

    trainer.metrics_processor.log = seen
    data = trainer.batch_generator(trainer.dataloader)
    # Not train(): after the first step it calls a barrier that gloo does not support.
    for trainer.step in range(1, STEPS + 1):
        trainer.train_step(data)
    parameters = {
        name: (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()
        for name, parameter in trainer.model_parts[0].named_parameters()
    }
    return losses, parameters, trainer
