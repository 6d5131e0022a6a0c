"""Which baselines there are for a call."""

from __future__ import annotations

from dataclasses import replace

from helpers.bench import LOSSES, job
from loss_core.baselines import TIMED


def test_baselines_are_those_that_exist_over_ranks():
    calls = [replace(job(loss, 300), dtype="bfloat16") for loss in LOSSES]
    over = {name for name, found in TIMED.items() if any(found.fits(call.definition.name, call.tp) for call in calls)}
    alone = {name for name, found in TIMED.items() if any(found.fits(call.definition.name, 1) for call in calls)}
    assert over == {"plain-torch", "torch-loss-parallel", "te", "plain-jax"}
    assert alone == set(TIMED) - {"plain-torch", "torch-loss-parallel"}
