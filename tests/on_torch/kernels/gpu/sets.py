"""Triton kernel sets for tests: with the sizes for a GPU, with tiny sizes, with launches recorded."""

import torch

from loss_core_torch.kernels import Blocks
from loss_core_torch.kernels.gpu import GpuKernels, sizes
from loss_core_torch.kernels.gpu.launch import Launcher, launch

V = 37

# So that small inputs go through every loop: blocks of 16 columns (two lanes, two vectors of 4 each) and chunks of four
# tokens, or tiles of 20 columns, with logits of two tokens at a time; and rows shared by programs of 8 columns, two
# blocks, each.
TINY = sizes.LaunchParameters(block_v=16, vector=4, num_warps=1)
SHARED = sizes.LaunchParameters(block_v=4, vector=4, num_warps=1, piece_v=8)


def tiny_chunks(sizes):
    return Blocks(4, 2 if sizes.beside_bytes else 4, sizes.vocab)


def tiny_tiles(sizes, together):
    return Blocks(sizes.num_tokens, 2, 20)


SETS = {
    "own-sizes": GpuKernels(),
    "tiny-blocks": GpuKernels(Launcher(parameters=lambda *_: TINY, chunks=tiny_chunks, tiles=tiny_tiles)),
    "shared-rows": GpuKernels(Launcher(parameters=lambda *_: SHARED, chunks=tiny_chunks, tiles=tiny_tiles)),
}


def counted(**choices):
    """A kernel set, and the list to which each launch appends the name of its kernel."""
    launched = []

    def run(kernel, *args, **options):
        launched.append(kernel.fn.__name__)
        launch(kernel, *args, **options)

    return GpuKernels(Launcher(launch=run, **choices)), launched


def layouts(dtype=torch.float32):
    """[..., V] tensors that no reshape can flatten, of one to six dimensions, by name."""
    base = torch.randn(2, 3, 2, 3, 3, 9).to(dtype)
    return {
        "a row": base[0, 0, 0, 0, 0],
        "a matrix": base[0, 0, 0, 0],
        "a batched slice": base[0, 0, :, :-1, 0],
        "two slices and every other column": base[:, 1:, 0, 1:, 0, ::2],
        "five dimensions that do not merge": base[:, 1:, :, ::2, 1:],
        "transposed": base.transpose(0, 3)[:2, 1:, :, ::2, 1:],
        "the vocabulary outermost": base.permute(5, 3, 1, 0, 2, 4)[::4, :-1, 1:],
        "expanded columns": base[0, 1:, ..., :1].expand(2, 2, 3, 3, 5),
        "expanded rows": base[0, 0, 0, 0, :1].expand(5, 9),
        "without rows": base[:, :0],
        "a transposed matrix": base[0, 0, 0, 0].t(),
    }
