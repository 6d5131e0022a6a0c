"""The losses over a sharded vocabulary in small blocks, pieces of rows and tiles."""

from helpers.process_group import over_processes
from helpers.sharded_problem import LOSSES, Problem, cases, holds_sharded, splits
from loss_core_torch.kernels import Blocks
from loss_core_torch.kernels.eager import EagerKernels
from loss_core_torch.kernels.eager.sizes import Sizes

# A budget below all tokens: the fused loss goes over its blocks twice, in small pieces.
SMALL = Sizes(elements_cpu=80, logits_bytes_cpu=0, min_tokens=5, max_tokens=5, tile_columns_cpu=7)


@over_processes(2)
def test_recomputed_logits(world):
    for loss in LOSSES:
        for case in cases(loss):
            for sizes in splits(41, world.ranks)[1:3]:
                holds_sharded(world, Problem(case), sizes, kernels=EagerKernels(SMALL))


@over_processes(2, flag="torch:triton")
def test_triton_in_small_blocks(world):
    """The same in blocks of 16 columns, chunks of two tokens, and tiles of 20 columns."""
    from loss_core_torch.kernels.gpu import GpuKernels
    from loss_core_torch.kernels.gpu.launch import Launcher
    from loss_core_torch.kernels.gpu.sizes import LaunchParameters

    size = LaunchParameters(block_v=16, vector=4, num_warps=1)
    launcher = Launcher(
        parameters=lambda *_: size,
        chunks=lambda sizes: Blocks(2, 2, sizes.vocab),
        tiles=lambda sizes, _: Blocks(sizes.num_tokens, 2, 20),
    )
    kernels = GpuKernels(launcher)
    for loss in LOSSES:
        for case in cases(loss, shape=(3, 49), only=("basic", "softcap-none")):
            fields = {"skip_ignored": False} if loss == "FusedLinearCrossEntropy" else {}
            holds_sharded(world, Problem(case), splits(49, world.ranks)[1], kernels=kernels, **fields)
