"""How the Triton kernels are launched: layouts, sizes, and where they refuse to run."""

import os
import sys

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton has no wheels but for Linux", allow_module_level=True)

from loss_core import BackendUnavailable, MaskedCrossEntropyConfig
from loss_core.dispatch.flags import flag_status
from loss_core_torch.kernels.gpu import sizes
from loss_core_torch.kernels.gpu.launch import Layout, check_device, layout


def test_layouts_have_as_few_dimensions_as_walk_through_the_rows():
    x = torch.empty(4, 3, 5, 7)
    assert layout(x) == Layout((), (7,), 1)
    assert layout(x[0, 0, 0]) == Layout((), (0,), 1)
    assert layout(x[:, :1]) == Layout((5,), (7, 105), 1)
    assert layout(x[:, :, :-1]) == Layout((4,), (7, 35), 1)
    assert layout(x[:, :2, :-1, ::2]) == Layout((4, 2), (7, 35, 105), 2)
    assert layout(x.transpose(0, 3)) == Layout((15,), (7, 1), 105)


def test_a_launch_on_a_cpu_says_what_to_use():
    with pytest.raises(BackendUnavailable, match="Use 'torch:eager' for the CPU, or set TRITON_INTERPRET=1"):
        check_device(torch.device("cpu"), interpreted=False)
    check_device(torch.device("cpu"), interpreted=True)
    check_device(torch.device("cuda"), interpreted=False)


def test_chunks_are_few_equal_and_within_the_budget():
    assert sizes.chunk_tokens(8192, 128256, 6) == 1366 // 128 * 128
    assert sizes.chunk_tokens(1000, 100, 4) == 1024
    assert sizes.chunk_tokens(10, 67, 4, budget=0, multiple=2) == 2
    assert sizes.chunk_tokens(2000, 10**9, 4) == 128
    for tokens in (1500, 3000, 10000):
        chunk = sizes.chunk_tokens(tokens, 128256, 4)
        assert chunk * 128256 * 4 <= 1 << 30
        assert chunk % 128 == 0


def test_few_rows_are_cut_into_parts_and_many_are_not():
    assert sizes.launch_parameters(8192, 128256, torch.bfloat16, "terms").split == 1
    assert sizes.launch_parameters(4, 128256, torch.bfloat16, "terms").split > 1
    assert sizes.launch_parameters(4, 128256, torch.bfloat16, "row").split == 1
    assert sizes.launch_parameters(4, 100, torch.bfloat16, "terms").block_v == 128


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on")
def test_without_a_gpu_the_flag_says_what_it_needs():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status = flag_status("torch:triton")
    assert not status.usable
    assert status.version.startswith("triton ")
    with pytest.raises(BackendUnavailable, match=r"'torch:triton' needs an NVIDIA or AMD GPU.*TRITON_INTERPRET=1"):
        MaskedCrossEntropyConfig().build(backend="torch:triton")
