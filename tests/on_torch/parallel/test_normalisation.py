"""Data parallel and gradient accumulation, as docs/normalisation.md has them: the gradient of one large batch.

Each mistake is off by what the page says, on the model and the batches of this file.
"""

# B = batch, S = sequence, V = vocabulary, H = hidden

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from helpers.process_group import over_processes
from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig

PAGE = Path(__file__).parents[3] / "docs" / "normalisation.md"
RANKS, STEPS, S, V, H = 2, 2, 24, 53, 16
# Valid tokens of the micro-batches, [RANKS][STEPS]: a rank and a step with few of them.
VALID = [[20, 6], [9, 3]]


class Model(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.layer, self.lm_head, self.loss = nn.Linear(H, H), nn.Linear(H, V, bias=False), loss

    def forward(self, batch, count=None):
        hidden, teacher, labels = batch
        hidden = torch.tanh(self.layer(hidden))
        if self.loss == "fused":
            loss = FusedLinearCEConfig(reduction="mean" if count is None else "sum").build(backend="torch:eager")
            return loss(hidden, labels, self.lm_head.weight, num_label_tokens=count)
        if self.loss == "distillation":
            loss = KDLossConfig(temperature=2.0).build(backend="torch:eager")
            return loss(self.lm_head(hidden), teacher, labels, num_batch_labels=count)
        loss = MaskedCrossEntropyConfig(reduction="mean" if count is None else "sum").build(backend="torch:eager")
        return loss(self.lm_head(hidden), labels, num_label_tokens=count)


def made(loss):
    torch.manual_seed(0)
    return Model(loss)


def micro_batches(ranks):
    """Hidden states, teacher logits and labels of each micro-batch of these ranks."""
    generator = torch.Generator().manual_seed(0)
    whole = []
    for valid in VALID:
        for number in valid:
            hidden, teacher = torch.randn(S, H, generator=generator), torch.randn(S, V, generator=generator)
            labels = torch.randint(0, V, (S,), generator=generator)
            labels[number:] = -100
            whole.append((hidden, teacher, labels))
    return [whole[STEPS * rank + step] for rank in ranks for step in range(STEPS)]


def of_one_large_batch(loss):
    model = made(loss)
    model([torch.stack(x) for x in zip(*micro_batches(range(RANKS)), strict=True)]).backward()
    return gradient_of(model)


def gradient_of(model):
    gradients = [parameter.grad for parameter in model.parameters()]
    return torch.cat([(x.full_tensor() if hasattr(x, "full_tensor") else x).flatten() for x in gradients])


def over_ranks(world, loss, *, count="step", factor=RANKS, sharded=False):
    """The gradient after the micro-batches of a step, each with `backward(loss * factor)`."""
    model = fully_shard(made(loss)) if sharded else DistributedDataParallel(made(loss))
    batches = micro_batches([world.rank])
    num_label_tokens = None
    if count != "micro-batch":
        num_label_tokens = sum((labels != -100).sum() for *_, labels in batches)
    if count == "step":
        dist.all_reduce(num_label_tokens)
    for i, batch in enumerate(batches):
        # Gradients are exchanged once a step; FSDP2 adds up what it exchanges at every micro-batch.
        with nullcontext() if sharded or i == len(batches) - 1 else model.no_sync():
            (model(batch, num_label_tokens) * factor).backward()
    return gradient_of(model)


def off(gradient, expected):
    return float((gradient - expected).norm() / expected.norm())


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("loss", ["over logits", "fused", "distillation"])
@over_processes(RANKS)
def test_it_is_one_large_batch(world, loss, sharded):
    # Under FSDP2 the weight of the head is read outside of its hooks; the root's gather it, which surround all.
    assert off(over_ranks(world, loss, sharded=sharded), of_one_large_batch(loss)) < 1e-6


# What the page calls it -> how.
MISTAKES = {
    "the factor `dp_size` left out": {"factor": 1},
    "a factor for the accumulation left out, where the trainer divides by it": {"factor": RANKS / STEPS},
    "each rank's own count": {"count": "rank", "factor": 1},
    "a mean over each micro-batch, divided by their number": {"count": "micro-batch", "factor": 1 / STEPS},
}


@pytest.mark.parametrize("mistake", MISTAKES)
@over_processes(RANKS)
def test_a_mistake_is_off_by_what_the_page_says(world, mistake):
    (said,) = re.findall(rf"^\| {re.escape(mistake)} \| (\d+) % \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    measured = off(over_ranks(world, "over logits", **MISTAKES[mistake]), of_one_large_batch("over logits"))
    assert round(100 * measured) == int(said), measured
