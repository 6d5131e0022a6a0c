"""Addresses of rows, loads of logits and stores of gradients.

Offsets are 64-bit throughout: that of a row, or of a strided column, may exceed 2^31.
"""

# W = columns of a vector, E = 2 W columns at the edges of a row

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def row_start(row, layout):
    """Offset of a row in elements; `row` is its int64 index in C order, `layout` a `launch.Layout`."""
    offset = row * 0
    for dim in tl.static_range(len(layout.sizes)):
        offset += (row % layout.sizes[dim]) * layout.strides[dim]
        row = row // layout.sizes[dim]
    return offset + row * layout.strides[len(layout.sizes)]


@triton.jit
def head_and_body(row_ptr, vocab, W: tl.constexpr):
    """(head, body): number of columns before the first aligned vector, and of columns in full vectors from there.

    A row of 50,257 columns may begin at any column of a vector: without a head, each of its loads would be of one
    column. W is 1, and the body all columns, if tensors of the call differ in this offset or have strided columns.
    """
    if W > 1:
        item_bytes: tl.constexpr = row_ptr.dtype.element_ty.primitive_bitwidth // 8
        address = row_ptr.to(tl.int64) // item_bytes
        head = tl.minimum(((-address) & (W - 1)).to(tl.int32), vocab)
        body = tl.multiple_of((vocab - head) // W * W, W)
    else:
        head = 0
        body = vocab
    return head, body


@triton.jit
def edge_columns(head, body, W: tl.constexpr):
    """[2 * W] indices of the columns before and after the body, then of columns that are not below `vocab`."""
    offs = tl.arange(0, 2 * W)
    return tl.where(offs < head, offs, offs + body)


@triton.jit
def body_start(row_ptr, head, layout, W: tl.constexpr):
    """Pointer to the first column of the body."""
    ptr = row_ptr + head.to(tl.int64) * layout.stride_v
    if W > 1:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def load_logits(ptr, offs_v, mask_v, layout, dtype: tl.constexpr, EVICT: tl.constexpr):
    """Columns of a row, -inf outside of the mask.

    EVICT is the L2 cache's policy: "evict_last" if the program reads them again, "evict_first" for the last read.
    """
    ptrs = ptr + offs_v.to(tl.int64) * layout.stride_v
    return tl.load(ptrs, mask=mask_v, other=float("-inf"), eviction_policy=EVICT).to(dtype)


@triton.jit
def store_grad(ptr, offs_v, mask_v, layout, grad):
    """Store columns of a row's gradient, rounded to the dtype of the memory."""
    ptrs = ptr + offs_v.to(tl.int64) * layout.stride_v
    tl.store(ptrs, rounded(grad, ptr.dtype.element_ty), mask=mask_v, eviction_policy="evict_first")


@triton.jit
def store_zeros(row_ptr, vocab, layout, BLOCK_V: tl.constexpr, W: tl.constexpr):
    """Store the gradient of an ignored row, without reading its logits: 0 times inf or NaN is NaN."""
    head, body = head_and_body(row_ptr, vocab, W)
    body_ptr = body_start(row_ptr, head, layout, W)
    for start in range(0, body, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        store_grad(body_ptr, offs_v, offs_v < body, layout, tl.zeros([BLOCK_V], tl.float32))
    if body < vocab:
        edge = edge_columns(head, body, W)
        store_grad(row_ptr, edge, edge < vocab, layout, tl.zeros([2 * W], tl.float32))


@triton.jit
def is_ignored(keep_ptr, row):
    """Whether a row is ignored; False if keep_ptr is None."""
    if keep_ptr is None:
        ignored = tl.full([], False, tl.int1)
    else:
        ignored = tl.load(keep_ptr + row) == 0
    return ignored


@triton.jit
def load_optional(ptr, offset, default: tl.constexpr, dtype: tl.constexpr):
    """The element at ptr + offset in another dtype; `default` if ptr is None."""
    if ptr is None:
        x = tl.full([], default, dtype)
    else:
        x = tl.load(ptr + offset).to(dtype)
    return x


@triton.jit
def already_written(factor, PREFILLED: tl.constexpr):
    """Whether memory already holds the gradient: PREFILLED with that for a factor of 1, and the factor is 1."""
    if PREFILLED:
        written = factor == 1
    else:
        written = tl.full([], False, tl.int1)
    return written


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in another dtype, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        # GPUs round, Triton's interpreter truncates: with this carry, truncating is rounding.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
