"""How the kernels find rows in memory, read logits and store gradients.

Offsets are 64-bit throughout: a row begins where T * V may be beyond 2^31, and so may a strided column be.
"""

# W = columns of a vector, E = columns at either edge of a row

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def row_start(row, layout):
    """Offset of a row in elements; `row` is int64 and counts in C order, `layout` is a `launch.Layout`."""
    offset = row * 0
    for dim in tl.static_range(len(layout.sizes)):
        offset += (row % layout.sizes[dim]) * layout.strides[dim]
        row = row // layout.sizes[dim]
    return offset + row * layout.strides[len(layout.sizes)]


@triton.jit
def whole_vectors(row_ptr, vocab, W: tl.constexpr, ALIKE: tl.constexpr):
    """(head, body): columns before the first vector that is aligned, and columns of whole vectors from there on.

    A row of 50,257 begins anywhere: without this its loads would be of one column each. Where the tensors of a call do
    not begin their rows ALIKE, what is aligned in one is not in another: then all columns are the body.
    """
    if ALIKE:
        item_bytes: tl.constexpr = row_ptr.dtype.element_ty.primitive_bitwidth // 8
        place = row_ptr.to(tl.int64) // item_bytes
        head = tl.minimum(((-place) & (W - 1)).to(tl.int32), vocab)
        body = tl.multiple_of((vocab - head) // W * W, W)
    else:
        head = 0
        body = vocab
    return head, body


@triton.jit
def edge_columns(head, body, W: tl.constexpr):
    """Columns before and behind the body, and more: those below `vocab` are real."""
    offs = tl.arange(0, 2 * W)
    return tl.where(offs < head, offs, offs + body)


@triton.jit
def body_start(row_ptr, head, layout, ALIKE: tl.constexpr):
    """Where the body of a row begins."""
    ptr = row_ptr + head.to(tl.int64) * layout.stride_v
    if ALIKE:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def load_logits(ptr, offs_v, mask_v, layout, dtype: tl.constexpr, EVICT: tl.constexpr):
    """Columns of a row, -inf outside of it.

    EVICT says what the L2 cache does with them: "evict_last" where they will be read once more at once,
    "evict_first" where they were read for the last time.
    """
    ptrs = ptr + offs_v.to(tl.int64) * layout.stride_v
    return tl.load(ptrs, mask=mask_v, other=float("-inf"), eviction_policy=EVICT).to(dtype)


@triton.jit
def store_grad(ptr, offs_v, mask_v, layout, grad):
    """Columns of a row of a gradient, in the dtype that is stored there."""
    ptrs = ptr + offs_v.to(tl.int64) * layout.stride_v
    tl.store(ptrs, rounded(grad, ptr.dtype.element_ty), mask=mask_v, eviction_policy="evict_first")


@triton.jit
def store_zeros(row_ptr, vocab, layout, BLOCK_V: tl.constexpr, W: tl.constexpr, ALIKE: tl.constexpr):
    """Gradient of an ignored row: not a product with 0, its logits may be inf or NaN and are not even read."""
    head, body = whole_vectors(row_ptr, vocab, W, ALIKE)
    body_ptr = body_start(row_ptr, head, layout, ALIKE)
    for start in range(0, body, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        store_grad(body_ptr, offs_v, offs_v < body, layout, tl.zeros([BLOCK_V], tl.float32))
    if body < vocab:
        edge = edge_columns(head, body, W)
        store_grad(row_ptr, edge, edge < vocab, layout, tl.zeros([2 * W], tl.float32))


@triton.jit
def is_ignored(keep_ptr, row):
    """Whether a row is to be ignored: never where keep_ptr is None."""
    if keep_ptr is None:
        ignored = tl.full([], False, tl.int1)
    else:
        ignored = tl.load(keep_ptr + row) == 0
    return ignored


@triton.jit
def load_factor(ptr, dtype: tl.constexpr):
    """A scalar in memory, 1 where ptr is None."""
    if ptr is None:
        factor = tl.full([], 1.0, dtype)
    else:
        factor = tl.load(ptr).to(dtype)
    return factor


@triton.jit
def is_there(factor, HELD: tl.constexpr):
    """Whether a gradient is to be left as it lies: where it is HELD for a factor of 1, and the factor is 1."""
    if HELD:
        there = factor == 1
    else:
        there = tl.full([], False, tl.int1)
    return there


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in the dtype that is stored, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        # GPUs round; Triton's interpreter cuts off. With this carry first, cutting off is rounding.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
