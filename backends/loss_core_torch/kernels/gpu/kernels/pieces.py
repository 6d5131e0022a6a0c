"""Rows that several programs share: each tells the others the terms of its piece, and waits for theirs."""

import triton
import triton.language as tl

# Numbers of a row that programs tell each other, at most.
TOLD = tl.constexpr(5)

# The bits of one that was not told yet; as a number NaN.
UNTOLD = tl.constexpr(-1)

# Looks at memory before a program gives up, of about a microsecond each. In the interpreter all has been told before.
PATIENCE = tl.constexpr(0 if triton.knobs.runtime.interpret else 1 << 24)


@triton.jit
def piece_of_row(vocab, PIECE_V: tl.constexpr, PIECES: tl.constexpr):
    """(row, piece, its first column, its columns) of this program. A row's programs stand side by side."""
    program = tl.program_id(0)
    piece = program % PIECES
    first = piece * PIECE_V
    columns = vocab
    if PIECES > 1:
        columns = tl.minimum(vocab - first, PIECE_V)
    return (program // PIECES).to(tl.int64), piece, first, columns


@triton.jit
def tell(told_ptr, number: tl.constexpr, x, piece, PIECES: tl.constexpr):
    """Let the other programs of the row see a number of this piece; told_ptr is where those of the row begin."""
    bits = x.to(told_ptr.dtype.element_ty, bitcast=True)
    # A NaN that came with a logit may have these bits.
    bits = tl.where(bits == UNTOLD, UNTOLD - 1, bits)
    tl.atomic_xchg(told_ptr + (number * PIECES + piece).to(tl.int64), bits, sem="relaxed")


@triton.jit
def told(told_ptr, number: tl.constexpr, nothing_P, PIECES: tl.constexpr):
    """[P] a number of every piece of the row, once all have told it; behind the last of them nothing_P.

    Programs start in the order of their number, so that those of a row which wait are few, and those waited for run.
    Where one is never told all the same, it is NaN: not a device that hangs.
    """
    P: tl.constexpr = nothing_P.shape[0]
    pieces = tl.arange(0, P)
    ptrs = told_ptr + (number * PIECES + pieces).to(tl.int64)
    bits = tl.load(ptrs, mask=pieces < PIECES, other=0, volatile=True)
    looks = 0
    while (tl.max((bits == UNTOLD).to(tl.int32), 0) > 0) & (looks < PATIENCE):
        bits = tl.load(ptrs, mask=pieces < PIECES, other=0, volatile=True)
        looks += 1
    return tl.where(pieces < PIECES, bits.to(nothing_P.dtype, bitcast=True), nothing_P)
