"""Rows shared by several programs: each publishes the terms of its piece, and waits for those of the other pieces."""

import triton
import triton.language as tl

# Terms of a piece, at most.
PARTIAL_TERMS = tl.constexpr(5)

# Bits of a term that is not published yet; as a float NaN.
UNPUBLISHED = tl.constexpr(-1)

# Polls of about a microsecond each, after which a program gives up. The interpreter publishes all terms in advance.
MAX_POLLS = tl.constexpr(0 if triton.knobs.runtime.interpret else 1 << 24)


@triton.jit
def piece_of_row(vocab, PIECE_V: tl.constexpr, NUM_PIECES: tl.constexpr):
    """(row, piece, its first column, its number of columns) of this program. Programs of a row are consecutive."""
    program = tl.program_id(0)
    piece = program % NUM_PIECES
    start_v = piece * PIECE_V
    piece_vocab = vocab
    if NUM_PIECES > 1:
        piece_vocab = tl.minimum(vocab - start_v, PIECE_V)
    return (program // NUM_PIECES).to(tl.int64), piece, start_v, piece_vocab


@triton.jit
def publish(partials_ptr, term: tl.constexpr, x, piece, NUM_PIECES: tl.constexpr):
    """Store a term of this piece where the other programs of the row poll; partials_ptr points to the row's terms."""
    bits = x.to(partials_ptr.dtype.element_ty, bitcast=True)
    # A NaN from a logit may have the same bits.
    bits = tl.where(bits == UNPUBLISHED, UNPUBLISHED - 1, bits)
    tl.atomic_xchg(partials_ptr + (term * NUM_PIECES + piece).to(tl.int64), bits, sem="relaxed")


@triton.jit
def wait_for(partials_ptr, term: tl.constexpr, identity_P, NUM_PIECES: tl.constexpr):
    """[P] a term of every piece of the row, once all are published, followed by identity_P.

    Assumes that a GPU starts programs in the order of their index, so that those waited for are running. A term that
    is not published within MAX_POLLS is NaN: the device does not hang.
    """
    P: tl.constexpr = identity_P.shape[0]
    pieces = tl.arange(0, P)
    ptrs = partials_ptr + (term * NUM_PIECES + pieces).to(tl.int64)
    bits = tl.load(ptrs, mask=pieces < NUM_PIECES, other=0, volatile=True)
    polls = 0
    while (tl.max((bits == UNPUBLISHED).to(tl.int32), 0) > 0) & (polls < MAX_POLLS):
        bits = tl.load(ptrs, mask=pieces < NUM_PIECES, other=0, volatile=True)
        polls += 1
    return tl.where(pieces < NUM_PIECES, bits.to(identity_P.dtype, bitcast=True), identity_P)
