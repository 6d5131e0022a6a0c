"""Row terms: the few sums over the vocabulary that every loss and gradient of a row is made of.

Terms of pieces of a row (kernel blocks, vocabulary tiles, tensor-parallel ranks, scans) fold with `combine`. A loss is
an `Objective`: its values, and the coefficients of their gradient. Both are [T]-sized and are written here once,
over an array namespace `xp`: `numpy`, `torch` or `jax.numpy`. Kernels make terms, and a gradient from coefficients;
they know no losses.

Arrays have one shape `[...]` (one entry per row) and the dtype of the arithmetic; those of rows with K targets,
`[..., K]`.
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
