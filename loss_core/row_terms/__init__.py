"""Row terms: the few sums over the vocabulary from which every loss and gradient of a row is computed.

Terms of pieces of a row (kernel blocks, vocabulary tiles, tensor-parallel ranks, scan steps) merge with `combine`. A
loss is an `Objective`: its values, and the coefficients of their gradient. Both are [T]-sized and are defined here
once, over an array namespace `xp`: `numpy`, `torch` or `jax.numpy`. Kernels compute terms, and a gradient from
coefficients; they do not depend on the loss.

Arrays have shape `[...]` (one entry per row), or `[..., K]` for K targets per row, in the compute dtype.
"""

from loss_core.row_terms.cross_entropy import OPTIONS, CrossEntropy, token_metrics
from loss_core.row_terms.guarded import Array, Namespace
from loss_core.row_terms.log_probs import LogProbability
from loss_core.row_terms.pairs import (
    EMPTY_PAIR,
    GAP_UNIT,
    MixtureTerms,
    PairTerms,
    beta_of,
    combine_pairs,
    jensen_shannon,
    kl_centre,
    kl_divergence,
    log_ratio_offset,
    log_shares,
    mixture_logs,
)
from loss_core.row_terms.rows import (
    EMPTY_ROW,
    IGNORED_ROW,
    Coefficients,
    Objective,
    RowTerms,
    Sums,
    combine,
    entropy,
    is_objective,
    log_sum_exp,
)
from loss_core.row_terms.top_k import TopK

__all__ = [
    "EMPTY_PAIR",
    "EMPTY_ROW",
    "GAP_UNIT",
    "IGNORED_ROW",
    "OPTIONS",
    "Array",
    "Coefficients",
    "CrossEntropy",
    "LogProbability",
    "MixtureTerms",
    "Namespace",
    "Objective",
    "PairTerms",
    "RowTerms",
    "Sums",
    "TopK",
    "beta_of",
    "combine",
    "combine_pairs",
    "entropy",
    "is_objective",
    "jensen_shannon",
    "kl_centre",
    "kl_divergence",
    "log_ratio_offset",
    "log_shares",
    "log_sum_exp",
    "mixture_logs",
    "token_metrics",
]
