"""Fused linear cross entropy of `torch:triton`: the vendor's matrix products around a kernel of our own.

For each chunk of tokens: logits (product 1, float32), the kernel `cross_entropy_row_kernel` over them, which
gives the loss and E = coef (softmax - onehot) times the softcap's slope, then grad_hidden = E @ W (product 2)
and grad_weight += E.T @ h (product 3), accumulated in float32. E takes the logits' place in memory where the
products want float32 operands, and a buffer of half the size where they want 16-bit ones.
"""

# T = tokens, B = tokens of a chunk, H = hidden, V = vocabulary

from __future__ import annotations

import torch
from torch import Tensor

from loss_core_torch import eager_linear, triton_kernels, triton_launch, triton_sizes
from loss_core_torch.opaque import opaque
from loss_core_torch.values import compute_dtype

# Bytes of a chunk's logits and of E. Each chunk reads and writes the whole float32 gradient of the weight once
# (5 GB for 152k x 4096: 1.5 ms of an H100, where the products of 1024 tokens take 5), so a chunk wants to be large.
CHUNK_BYTES = 1 << 30

# Rows of a chunk come in multiples of the tiles of matrix products.
_CHUNK_MULTIPLE = 128


def chunk_tokens(num_tokens: int, vocab: int, bytes_per_logit: int) -> int:
    """Tokens of a chunk: what the budget holds, in as few chunks as possible of about equal size."""
    fitting = max(CHUNK_BYTES // max(vocab * bytes_per_logit, 1) // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE, _CHUNK_MULTIPLE)
    chunks = -(-num_tokens // fitting)
    even = -(-num_tokens // max(chunks, 1))
    return min(fitting, -(-even // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE)


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype in which the logits' gradient enters its two products.

    Args:
        dtype: to which hidden states and weight are rounded.
        device: GPUs multiply 16-bit operands many times faster; elsewhere it is the dtype of the arithmetic.
    """
    return dtype if device.type == "cuda" and _multiplies_into_float32() else compute_dtype(dtype)


def _multiplies_into_float32() -> bool:
    """Whether torch multiplies 16-bit matrices into a float32 one on this kind of GPU.

    Its out_dtype= overloads raise on ROCm ("float output with half input is not enabled") and under TunableOp
    (aten/src/ATen/native/cuda/Blas.cpp); float32 operands serve there.
    """
    return torch.version.hip is None and not torch.cuda.tunable.is_enabled()


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, in out's dtype whatever that of the operands; no temporary of out's size.

    Read in torch's sources, not run on a GPU yet: out_dtype= exists on CUDA alone, for float32 from float16 or
    bfloat16, with any transposition of the operands. `mm` passes `out` on as the addend with beta 0, which is not
    read, NaN or not. `addmm` takes a float32 addend since pull request 167931 (November 2025; before, only one of the
    operands' dtype), and copies it only where it is another tensor than `out`.
    """
    if a.dtype == out.dtype or a.device.type != "cuda":
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=float(add), out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


@opaque(eager_linear._fake_linear)
def linear_cross_entropy(
    h_TH: Tensor,
    w_VH: Tensor,
    labels_T: Tensor,
    keep_T: Tensor,
    coef_T: Tensor,
    softcap: float,
    product_dtype: torch.dtype,
    want_grads: list[bool],
    skip_ignored: bool | None,
    num_valid: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss per token and the gradients of sum(coef * loss); see `eager_linear.linear_cross_entropy`.

    With skip_ignored None on a GPU, shapes do not depend on values and nothing is read back: ignored tokens take part
    in the products, as zeros.
    """
    places_N, _ = eager_linear.tokens_in_products(keep_T, skip_ignored, num_valid)
    if places_N is not None:
        # The tokens that take part, as if there were no others.
        some = (x.index_select(0, places_N) for x in (h_TH, labels_T, keep_T, coef_T))
        h_NH, labels_N, keep_N, coef_N = some
        loss_N, grad_NH, grad_w = _over_chunks(h_NH, w_VH, labels_N, keep_N, coef_N, softcap, product_dtype, want_grads)
        loss_T = torch.zeros(keep_T.shape, dtype=loss_N.dtype, device=keep_T.device).index_copy_(0, places_N, loss_N)
        grad_h = grad_NH
        if want_grads[0]:
            grad_h = torch.zeros(h_TH.shape, dtype=loss_N.dtype, device=keep_T.device)
            grad_h.index_copy_(0, places_N, grad_NH)
        return loss_T, grad_h, grad_w
    return _over_chunks(h_TH, w_VH, labels_T, keep_T, coef_T, softcap, product_dtype, want_grads)


def _over_chunks(
    h_TH: Tensor,
    w_VH: Tensor,
    labels_T: Tensor,
    keep_T: Tensor,
    coef_T: Tensor,
    softcap: float,
    product_dtype: torch.dtype,
    want_grads: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    want_h, want_w = want_grads
    num_tokens, vocab = keep_T.numel(), w_VH.shape[0]
    # The kernel takes rows that lie side by side; the upstream of a sum is expanded from one number.
    coef_T, labels_T = coef_T.contiguous(), labels_T.contiguous()
    dtype, device = compute_dtype(h_TH.dtype), h_TH.device
    operand = operand_dtype(product_dtype, device)
    loss_T = torch.zeros(keep_T.shape, dtype=dtype, device=device)
    # Every row and every entry is written below, unless there are no tokens.
    grad_h = torch.empty(h_TH.shape if want_h else (0,), dtype=dtype, device=device)
    grad_w = torch.empty(w_VH.shape if want_w else (0,), dtype=dtype, device=device)
    if num_tokens == 0 or vocab == 0:
        return loss_T, grad_h.zero_(), grad_w.zero_()
    w_VH = w_VH.to(product_dtype).to(operand)
    with_grad = want_h or want_w
    unscale = None
    if with_grad and operand == torch.float16:
        coef_T, unscale = _near_one(coef_T)
    own_buffer = with_grad and operand != dtype
    rows = chunk_tokens(num_tokens, vocab, dtype.itemsize + own_buffer * operand.itemsize)
    logits_buffer = torch.empty((min(rows, num_tokens), vocab), dtype=dtype, device=device)
    grad_buffer = torch.empty_like(logits_buffer, dtype=operand) if own_buffer else logits_buffer
    m_B, s_B = (torch.empty(logits_buffer.shape[:1], dtype=dtype, device=device) for _ in range(2))
    size = triton_sizes.launch_parameters(logits_buffer.shape[0], vocab, dtype, "row")
    for start in range(0, num_tokens, rows):
        at = slice(start, min(start + rows, num_tokens))
        keep_B = keep_T[at]
        # What an ignored token holds must not reach a product, not even times 0.
        h_BH = torch.where(keep_B[:, None], h_TH[at].to(product_dtype), 0.0).to(operand)
        z_BV, e_BV = logits_buffer[: h_BH.shape[0]], grad_buffer[: h_BH.shape[0]]
        _multiply(h_BH, w_VH.t(), z_BV)
        triton_launch._launch(
            triton_kernels.cross_entropy_row_kernel, (h_BH.shape[0],), z_BV, e_BV, labels_T[at], keep_B, coef_T[at],
            m_B, s_B, loss_T[at], vocab, 1, 1, vocab, 0, 0, 1,
            size=size, SOFTCAP=softcap, WITH_GRAD=with_grad, BLOCK_V=size.block_v, UNROLL=size.unroll,
        )  # fmt: skip
        if want_h:
            _multiply(e_BV, w_VH, grad_h[at])
        if want_w:
            _multiply(e_BV.t(), h_BH, grad_w, add=start > 0)
    if unscale is not None:
        grad_h, grad_w = grad_h.mul_(unscale), grad_w.mul_(unscale)
    return loss_T, grad_h, grad_w


def _near_one(coef_T: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients times a power of two that brings the largest near 1, and what takes it away again.

    A mean over 8192 tokens would put every probability below 2e-4 beneath what float16 can hold.
    """
    # A NaN is the mark of one token; it must not reach the others.
    _, exponent = torch.frexp(coef_T.nan_to_num(nan=0.0).abs().amax())
    exponent = exponent.clamp(-100, 100)
    one = torch.ones_like(exponent, dtype=coef_T.dtype)
    return torch.ldexp(coef_T, -exponent), torch.ldexp(one, exponent)
