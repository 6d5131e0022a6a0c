"""An elementwise kernel: a gradient times a scalar."""

import triton
import triton.language as tl

from loss_core_torch.kernels.gpu.kernels.memory import rounded


@triton.jit
def scaled_kernel(
    out_ptr, x_ptr,  # [N]
    factor_ptr,  # scalar
    count,  # N
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out = x * factor, rounded to out's dtype: program (block)."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < count, eviction_policy="evict_first")
    grad = x * tl.load(factor_ptr).to(x.dtype)
    tl.store(out_ptr + offs, rounded(grad, out_ptr.dtype.element_ty), mask=offs < count)
