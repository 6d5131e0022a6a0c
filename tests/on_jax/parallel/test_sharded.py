"""Losses with a vocabulary sharded over JAX devices, against the oracle on the full problem; and their collectives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[3]
SCENARIOS = [
    (
        "sharded_worker.py",
        "oracle_float32",
        "oracle_shards",
        "where_the_gradient_is_taken",
        "sequence_parallel",
        "hidden_states_that_vary",
        "uneven",
        "placed",
        "rows_and_vocabulary_manual",
        "errors",
        "second_derivatives",
    ),
    ("explicit_worker.py", "on_no_mesh", "replicated_beside_sharded_rows"),
    ("sharded_hlo_worker.py", "inside_shard_map", "no_logits_move", "moved_logits_are_detected"),
    pytest.param(
        ("sharded_worker.py", "oracle_dtypes", "second_derivatives_of_linear_distillation"), marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(
    "scenarios", SCENARIOS, ids=["values", "explicit axes", "collectives", "other dtypes and both heads"]
)
def test_on_four_devices(scenarios: tuple[str, ...]) -> None:
    worker, *names = scenarios
    if worker == "sharded_hlo_worker.py" and jax.__version_info__ < (0, 9):
        pytest.skip("XLA of JAX 0.8 inserts other collectives")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / worker), *names],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    passed = [line.removeprefix("passed: ") for line in done.stdout.splitlines()]
    assert passed == names, done.stderr[-4000:]
