"""`LossDef`, everything about a loss except its kernels, and the definitions of the built-in losses."""

from loss_core.losses.bounds.errors import error_ratio
from loss_core.losses.cases.drawing import Case, named_cases, random_cases
from loss_core.losses.definition import (
    LABELS,
    LOSS_WEIGHTS,
    MASK,
    Argument,
    LossDef,
    OracleResult,
    Recipe,
    Sizes,
    definition_of,
)
from loss_core.losses.oracle import allowances, evaluate

__all__ = [
    "LABELS",
    "LOSS_WEIGHTS",
    "MASK",
    "Argument",
    "Case",
    "LossDef",
    "OracleResult",
    "Recipe",
    "Sizes",
    "allowances",
    "definition_of",
    "error_ratio",
    "evaluate",
    "named_cases",
    "random_cases",
]
