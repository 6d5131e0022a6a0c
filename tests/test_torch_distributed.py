"""The losses over real processes (gloo), against the oracle: tensor parallel, FSDP2, both, and what must not hang."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).with_name("distributed_worker.py")

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")


def _held(tmp_path, ranks, *flag, **variables):
    """Names of the scenarios that held, on all ranks."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")])
    # Idle threads must sleep: there are more processes than cores.
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_WAIT_POLICY": "PASSIVE", **variables}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(ranks), str(tmp_path), *flag],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = []
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
        found.append([line.removeprefix("held: ") for line in output.splitlines() if line.startswith("held: ")])
    assert all(names == found[0] for names in found)
    return found[0]


# The numbers are those of the scenarios in distributed_worker.py: none is left out in silence.
@pytest.mark.parametrize(("ranks", "scenarios"), [(1, 3), (2, 19), (3, 7), (4, 10)])
def test_processes(tmp_path, ranks, scenarios):
    assert len(_held(tmp_path, ranks)) == scenarios


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has no wheels but for Linux")
def test_processes_with_triton_kernels(tmp_path):
    assert len(_held(tmp_path, 2, "torch:triton", TRITON_INTERPRET="1")) == 2
