"""Vocabulary sharded over real processes (gloo), and the sharded head under FSDP2, against the oracle."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).with_name("distributed_worker.py")

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")


def _held(tmp_path, *flag, **variables):
    """Names of the scenarios that held, on both ranks."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, **variables}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), "2", str(tmp_path), *flag],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    found = []
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output[-4000:]
        found.append([line.removeprefix("held: ") for line in output.splitlines() if line.startswith("held: ")])
    assert found[0] == found[1]
    return found[0]


def test_two_processes(tmp_path):
    assert _held(tmp_path) == ["parallel-float32", "parallel-bfloat16", "kd-float32", "unequal", "fsdp"]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has no wheels but for Linux")
def test_two_processes_with_triton_kernels(tmp_path):
    held = _held(tmp_path, "torch:triton", TRITON_INTERPRET="1")
    assert held == ["parallel-float32", "parallel-bfloat16", "kd-float32"]
