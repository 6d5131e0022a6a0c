"""How the Triton kernels are launched: layouts, sizes, and where they refuse to run."""

import os
import sys

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton has no wheels but for Linux", allow_module_level=True)

from loss_core import BackendUnavailable, MaskedCrossEntropyConfig
from loss_core.dispatch.flags import flag_status
from loss_core_torch.kernels import HeadSizes
from loss_core_torch.kernels.gpu import launch, products, sizes
from loss_core_torch.kernels.gpu.launch import Layout, layout, same_alignment
from on_torch.kernels.gpu.sets import TINY


def test_layouts_merge_leading_dimensions():
    x = torch.empty(4, 3, 5, 7)
    assert layout(x) == Layout((), (7,), 1)
    assert layout(x[0, 0, 0]) == Layout((), (0,), 1)
    assert layout(x[:, :1]) == Layout((5,), (7, 105), 1)
    assert layout(x[:, :, :-1]) == Layout((4,), (7, 35), 1)
    assert layout(x[:, :2, :-1, ::2]) == Layout((4, 2), (7, 35, 105), 2)
    assert layout(x.transpose(0, 3)) == Layout((15,), (7, 1), 105)


def test_a_launch_on_a_cpu_says_what_to_use():
    with pytest.raises(BackendUnavailable, match="Use 'torch:eager' for the CPU, or set TRITON_INTERPRET=1"):
        launch.check_device(torch.device("cpu"), interpreted=False)
    launch.check_device(torch.device("cpu"), interpreted=True)
    launch.check_device(torch.device("cuda"), interpreted=False)


def _sizes(num_tokens, vocab, beside_bytes, rounded_bytes=0):
    return HeadSizes(num_tokens, vocab, 4096, 4, beside_bytes, rounded_bytes, torch.device("cuda"))


def _chunks(*args):
    blocks = sizes.chunks(_sizes(*args))
    assert blocks.classes == args[1]
    return blocks[:2]


def _tiles(num_tokens, vocab, beside_bytes, together=False):
    tokens, logits_tokens, classes = sizes.tiles(_sizes(num_tokens, vocab, beside_bytes), together)
    assert tokens == num_tokens
    return classes, logits_tokens


def test_chunks_are_few_equal_and_within_the_budget():
    # float32 logits and their gradient in bfloat16, within the memory of a bfloat16 weight of 152k x 4096.
    chunk, logits = _chunks(8192, 151936, 2, 4096 * 151936 * 2)
    assert (chunk, logits) == (2816, 512)
    assert (chunk * 2 + logits * 4) <= 4096 * 2
    # A float32 weight, or one that needs no gradient, frees no memory: 1 GiB.
    chunk, logits = _chunks(8192, 151936, 2)
    assert 151936 * (chunk * 2 + logits * 4) <= 1 << 30
    # A gradient in place of the logits: 1 GiB.
    assert _chunks(8192, 128256, 0, 1 << 34) == (2048, 2048)
    assert _chunks(1000, 100, 0) == (1000, 1000)
    assert _chunks(2000, 10**9, 0) == (128, 128)
    assert _chunks(2000, 10**9, 2) == (128, 128)
    assert _chunks(0, 100, 2) == (0, 0)
    for tokens in (1500, 3000, 10000):
        chunk, logits = _chunks(tokens, 128256, 2)
        assert 128256 * (chunk * 2 + logits * 4) <= 1 << 30
        assert chunk % 128 == 0 or chunk == tokens


def test_tiles_are_wide_and_their_logits_small():
    columns, tokens = _tiles(4096, 131072, 2)
    assert (columns, tokens) == (32768, 1024)
    assert 4096 * columns * 2 <= 256 << 20
    assert tokens * columns * 4 <= 128 << 20
    # A gradient in place of the logits, which then exist for all tokens.
    assert _tiles(4096, 131072, 0) == (16384, 4096)
    # Kept for a second pass, they exist together with their gradient.
    assert _tiles(8192, 16032, 2, True) == (16032, 8192)
    assert _tiles(8192, 128256, 2, True) == _tiles(8192, 128256, 2)
    assert _tiles(1 << 20, 128256, 2) == (1024, 32768)
    assert _tiles(0, 100, 2) == (100, 0)


def test_a_torch_without_float32_addends_multiplies_in_float32(monkeypatch):
    """It would raise in the second chunk only, so it is tried once per device, before the first."""

    def refuses(*args, **options):
        if "out_dtype" in options:
            raise RuntimeError("self and mat1 must have the same dtype")
        return torch.empty(0)

    tried = torch.device("meta")
    for addmm, expected in ((refuses, False), (lambda *args, **options: None, True)):
        products.adds_to_float32.cache_clear()
        monkeypatch.setattr(torch, "addmm", addmm)
        assert products.adds_to_float32(tried) == expected
        gpu = torch.device("cuda")
        monkeypatch.setattr(products, "adds_to_float32", lambda _, found=expected: found)
        monkeypatch.setattr(torch.cuda.tunable, "is_enabled", lambda: False)
        found = products.operand_dtype(torch.bfloat16, gpu)
        assert found == (torch.bfloat16 if expected else torch.float32)
        monkeypatch.undo()
    products.adds_to_float32.cache_clear()


def test_sizes_of_launches():
    long, short = (sizes.launch_parameters(vocab, torch.bfloat16, "row") for vocab in (128256, 100))
    assert (long.block_v, long.vector, long.num_warps) == (4096, 8, 2)
    assert (short.block_v, short.num_warps) == (128, 1)
    # A long row has a program for every 8192 columns, the last one for the rest.
    assert [size.num_pieces(vocab) for size, vocab in ((long, 128256), (long, 131072), (short, 100))] == [16, 16, 1]
    assert launch.piece_constants(long, 151936) == {"NUM_PIECES": 19, "P": 32, "PIECE_V": 8192, "PUBLISH_ONLY": False}
    for kind in ("row", "general_row", "pair_row"):
        assert sizes.launch_parameters(32768, torch.bfloat16, kind).num_pieces(32768) == 1
        assert sizes.launch_parameters(128256, torch.float64, kind).num_pieces(128256) == 1
        # All programs of a row must run at the same time.
        assert sizes.launch_parameters(1 << 20, torch.bfloat16, kind).num_pieces(1 << 20) == 1
    # float32 logits and a bfloat16 gradient: a vector of the narrower dtype.
    assert sizes.launch_parameters(128256, torch.float32, "row", torch.bfloat16).vector == 8
    assert sizes.launch_parameters(128256, torch.float32, "row").vector == 4
    assert sizes.warps_on(long, amd=True) * 64 == sizes.warps_on(long, amd=False) * 32


def test_memory_of_partial_terms():
    assert launch.new_partials(3, 1, torch.empty(3)) is None
    for dtype, bits in ((torch.float32, torch.int32), (torch.float64, torch.int64)):
        partials = launch.new_partials(3, 4, torch.empty(3, dtype=dtype))
        assert (partials.shape, partials.dtype) == ((3, 5, 4), bits)
        assert partials.view(dtype).isnan().all()


def test_alignment_of_rows():
    x = torch.empty(6, 50257, dtype=torch.bfloat16)
    assert same_alignment(8, x, torch.empty_like(x), torch.empty_like(x, dtype=torch.float32))
    # Rows of a batched slice are not aligned as those of a new tensor are.
    batch = torch.empty(2, 4, 50257)
    assert not same_alignment(4, batch[:, :-1], torch.empty(2, 3, 50257))
    assert same_alignment(4, batch[:, :-1], torch.empty_like(batch)[:, :-1])
    assert not same_alignment(8, x[:, 1:], x[:, :-1])
    assert not same_alignment(8, x[:, ::2])
    assert same_alignment(8, x[:, 8:], x[:, :-8])
    # Rows of full vectors are aligned in every layout.
    batch = torch.empty(2, 4, 50264)
    assert same_alignment(4, batch[:, :-1], torch.empty(2, 3, 50264))
    assert launch.column_constants(TINY, batch[:, :-1], batch[:, 1:]) == {"BLOCK_V": 16, "L": 4, "W": 4}
    assert launch.column_constants(TINY, batch[:, :-1, 1:], batch[:, 1:, :-1]) == {"BLOCK_V": 8, "L": 8, "W": 1}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on")
def test_without_a_gpu_the_flag_says_what_it_needs():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status = flag_status("torch:triton")
    assert not status.usable
    assert status.version.startswith("triton ")
    with pytest.raises(BackendUnavailable, match=r"'torch:triton' needs an NVIDIA or AMD GPU.*TRITON_INTERPRET=1"):
        MaskedCrossEntropyConfig().build(backend="torch:triton")
