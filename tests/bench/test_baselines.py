"""Which baselines support a call."""

from __future__ import annotations

from dataclasses import replace

from helpers.bench import LOSSES, job
from loss_core.baselines import TIMED


def test_baselines_over_ranks_and_on_one_process():
    calls = [replace(job(loss, 300), dtype="bfloat16") for loss in LOSSES]
    over = {name for name, b in TIMED.items() if any(b.fits(call.definition.name, call.tp) for call in calls)}
    alone = {name for name, b in TIMED.items() if any(b.fits(call.definition.name, 1) for call in calls)}
    assert over == {"plain-torch", "torch-loss-parallel", "te", "plain-jax"}
    assert alone == set(TIMED) - {"plain-torch", "torch-loss-parallel"}
