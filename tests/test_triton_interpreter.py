"""The Triton kernels on the CPU, in Triton's interpreter: the check, the laws of their states, strides, dispatch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loss_core import BackendUnavailable, MaskedCrossEntropyConfig
from loss_core.backend import flag_status

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton has no wheels but for Linux")

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).with_name("triton_worker.py")

SCENARIOS = (
    "matrix", "matrix_of_tiny_blocks", "own_shapes", "large_vocabulary", "operands_of_16_bits", "laws", "kd_laws",
    "tanh", "offsets", "strides", "labels_and_upstreams_of_any_stride", "one_pass", "overwritten", "skipping",
    "no_vocabulary", "compiled", "injected_bugs", "refuses_without_a_gpu", "auto_stays_eager",
)  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_interpreted(scenario):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(WORKER), scenario], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == f"held: {scenario}"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on")
def test_without_a_gpu_the_flag_says_what_it_needs():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status = flag_status("torch:triton")
    assert not status.usable
    assert status.version.startswith("triton ")
    with pytest.raises(BackendUnavailable, match=r"'torch:triton' needs an NVIDIA or AMD GPU.*TRITON_INTERPRET=1"):
        MaskedCrossEntropyConfig().build(backend="torch:triton")
