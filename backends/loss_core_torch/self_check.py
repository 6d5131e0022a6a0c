"""Compares two kernel sets on a few rows, before `torch:auto` chooses one by default.

A check of the machine (driver, compiler, chip), not of the mathematics, which `loss-core check` verifies.
"""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import torch
from torch import Tensor

from loss_core.row_terms import CrossEntropy, kl_divergence
from loss_core_torch.kernels import HeadOperands, KernelSet, Linear, PairCoefficients, Pairs, Rows, Wanted, linear_rows
from loss_core_torch.tracing import compute_dtype

# V = 515: no multiple of any block, and one block more than a power of 2.
_TOKENS, _VOCAB, _HIDDEN = 8, 515, 64

# A row that is long enough for several programs of a GPU to share it.
_LONG_VOCAB = 33_285

# Roundings by which the two may differ: of the arithmetic, in sums of some hundred terms of size 1; and of the dtype,
# to which results are rounded once, and the operands of a product before.
_ROUNDINGS_INSIDE, _ROUNDINGS = 64, 8


def disagreement(kernels: KernelSet, reference: KernelSet, device: torch.device, dtype: torch.dtype) -> str | None:
    """The first result that differs, with its values; None if all agree. A kernel that raises disagrees."""
    with torch.no_grad():
        expected = _results(reference, device, dtype)
        try:
            actual = _results(kernels, device, dtype)
        except Exception as error:
            return f"{kernels.flag} raised {type(error).__name__}: {error}"
    for name, want in expected.items():
        inside = _ROUNDINGS_INSIDE * torch.finfo(compute_dtype(dtype)).eps
        allowed = (inside + _ROUNDINGS * torch.finfo(want.dtype).eps) * want.abs().max().double()
        got = actual[name].double()
        difference = (got - want.double()).abs()
        # Not `>`: NaN must not pass.
        if not bool(difference.max() <= allowed):
            index = int(difference.nan_to_num(torch.inf).argmax())
            values = f"{float(got.flatten()[index]):.6g} and {float(want.flatten()[index]):.6g}"
            return f"{name} of {kernels.flag} and {reference.flag} in {dtype} is {values} at element {index}"
    return None


def _results(kernels: KernelSet, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Terms and gradients of every kind by name, of inputs that are the same in every call."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    student, teacher, hidden, weight = (
        draw(_TOKENS, _VOCAB), draw(_TOKENS, _VOCAB), draw(_TOKENS, _HIDDEN), draw(_VOCAB, _HIDDEN),
    )  # fmt: skip
    labels_T = torch.randint(0, _VOCAB, (_TOKENS,), generator=generator).to(device)
    coef_T = torch.linspace(0.5, 1.0, _TOKENS, dtype=compute_dtype(dtype), device=device)
    keep_T = torch.arange(_TOKENS, device=device) != 3
    objective = CrossEntropy(_VOCAB)
    row_terms, row_grad, _ = kernels.row_terms_and_grad(Rows(student, labels_T, keep_T), coef_T, objective)
    pairs = Pairs(student, teacher, keep_T, 0.5)
    pair_terms = kernels.pair_terms(pairs)
    kl_T = kl_divergence(torch, pair_terms)
    long_rows, long_teacher = draw(2, _LONG_VOCAB), draw(2, _LONG_VOCAB)
    _, long_grad, _ = kernels.row_terms_and_grad(
        Rows(long_rows, labels_T[:2], None), coef_T[:2], CrossEntropy(_LONG_VOCAB)
    )
    _, long_pair_grad = kernels.pair_terms_and_grad(Pairs(long_rows, long_teacher, None, 0.5), coef_T[:2])
    linear = Linear(HeadOperands(hidden, weight, dtype), labels_T)
    linear_terms, linear_grads = linear_rows.terms_and_grads(kernels, linear, coef_T, objective, Wanted(True, True))
    mixture = kernels.pair_mixture(pairs, pair_terms, 0.5)
    return {
        "the sum of a row": row_terms.s[keep_T],
        "the gradient of the logits": row_grad,
        "the gradient of long rows": long_grad,
        "the divergence of a row": kl_T[keep_T],
        "the student's gradient of long rows": long_pair_grad,
        "the student's gradient": kernels.pair_grad(pairs, pair_terms, PairCoefficients(kl_T, coef_T, False)),
        "the teacher's gradient": kernels.pair_grad(pairs, pair_terms, PairCoefficients(kl_T, coef_T, True)),
        "the student's divergence from the mixture": mixture.kl_s[keep_T],
        "the student's gradient to the mixture": kernels.pair_grad(
            pairs, pair_terms, PairCoefficients(mixture.kl_s, coef_T, False, 0.5)
        ),
        "the sum of a fused row": linear_terms.s,
        "the gradient of the hidden states": linear_grads.hidden_TH.to(dtype),
        "the gradient of the weight": linear_grads.weight_VH.to(dtype),
    }
