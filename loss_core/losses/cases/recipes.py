"""Recipes for every loss that has the arguments and fields they need; `drawing` draws their arrays."""

# lead = leading dimensions of labels; T = their product, V = vocabulary

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.field_checks import METRICS
from loss_core.losses.definition import Recipe

Array = NDArray[Any]


@dataclass
class Drawn:
    """A case under construction; `Recipe.change` edits its arrays.

    Attributes:
        rows: names of the floating arguments [T, ...]; logits: names of those with shape [T, V].
    """

    recipe: Recipe
    arrays: dict[str, Array]
    ignore_index: int
    rng: np.random.Generator
    rows: tuple[str, ...]
    logits: tuple[str, ...]


def _offset(drawn: Drawn) -> None:
    for name, offset in zip(drawn.logits, (1e4, -2e3), strict=False):
        drawn.arrays[name] = drawn.arrays[name] + offset


def _minus_inf(drawn: Drawn) -> None:
    banned = drawn.rng.random(drawn.recipe.vocab) < 0.5
    banned[0] = False
    for name in drawn.logits:
        drawn.arrays[name] = np.where(banned, -np.inf, drawn.arrays[name])
    _set_labels(drawn, 0)


def _minus_inf_at_labels(drawn: Drawn) -> None:
    banned = np.arange(drawn.recipe.vocab) < drawn.recipe.vocab // 2
    for name in drawn.logits:
        drawn.arrays[name] = np.where(banned, -np.inf, drawn.arrays[name])


def _nan_where_ignored(drawn: Drawn) -> None:
    labels = drawn.arrays["labels"]
    junk = np.resize([np.nan, np.inf, -np.inf], labels.shape)
    for name in drawn.rows:
        ignored = (labels == drawn.ignore_index)[..., None]
        drawn.arrays[name] = np.where(ignored, junk[..., None], drawn.arrays[name])


def _near_ignore_index(drawn: Drawn) -> None:
    labels = drawn.arrays["labels"]
    near = np.clip(drawn.ignore_index + drawn.rng.integers(-1, 2, labels.shape), 0, drawn.recipe.vocab - 1)
    drawn.arrays["labels"] = np.where(drawn.rng.random(labels.shape) < 0.5, near, labels)


def _edge_labels(drawn: Drawn) -> None:
    _set_labels(drawn, np.where(drawn.rng.random(drawn.arrays["labels"].shape) < 0.5, 0, drawn.recipe.vocab - 1))


def _labels_at_maximum(drawn: Drawn) -> None:
    for name in drawn.logits:
        largest = np.argmax(drawn.arrays[name], axis=-1)
        _set_labels(drawn, np.where(drawn.rng.random(largest.shape) < 0.5, largest, drawn.arrays["labels"]))


def _set_labels(drawn: Drawn, labels: Any) -> None:
    """Replace the labels that are not ignored."""
    given = drawn.arrays["labels"]
    drawn.arrays["labels"] = np.where(given == drawn.ignore_index, given, labels)


RECIPES = (
    Recipe("basic", "any error at all, and an upstream gradient that is not used", extras=("upstream",)),
    Recipe("none-ignored", "padding rows counted although nothing is ignored", ignored=0.0),
    Recipe("mean", "a mean over all tokens instead of the valid ones", {"reduction": "mean"}, ("reduction",)),
    Recipe("none", "the first token's upstream gradient used for all",
           {"reduction": "none"}, ("reduction",), extras=("upstream",)),
    Recipe("all-ignored", "0/0 when no token is valid", {"reduction": "mean"}, ignored=1.0),
    Recipe("vocab-1", "V = 1, where loss and gradient are 0", vocab=1, ignored=0.2),
    Recipe("ragged", "padded columns that are included, which only small logits show", scale=0.01),
    Recipe("huge-logits", "overflow of exp, or digits lost to a large maximum", scale=1e4),
    Recipe("offset", "digits lost when all logits share a large offset", change=_offset, over_logits=True),
    Recipe("minus-inf", "NaN from -inf logits, as a vocabulary mask gives", change=_minus_inf, over_logits=True),
    Recipe("ignore-index-0", "a hard-coded ignore_index", {"ignore_index": 0}),
    Recipe("ignore-index-in-vocab", "ignore_index off by one", {"ignore_index": 5}, change=_near_ignore_index),
    Recipe("mask", "a mask that is not used, or inverted", extras=("mask",)),
    Recipe("nan-where-ignored", "0 * NaN in ignored rows", change=_nan_where_ignored),
    Recipe("count", "a token count that does not divide, or divides twice", extras=("count", "upstream")),
    Recipe("loss-weights", "weights that are not used, or have no gradient", extras=("loss_weights", "count")),
    Recipe("edge-labels", "the first or the last class missed by a block", change=_edge_labels),
    Recipe("no-upcast", "a float32 result where the input's dtype is promised",
           {"fp32_upcast": False}, ("fp32_upcast",)),
    Recipe("smoothing", "mass taken off the label but not spread, or spread over one shard's classes",
           {"label_smoothing": 0.1, "reduction": "none"}, ("label_smoothing",), extras=("upstream",)),
    Recipe("smoothing-weights", "smoothing without weights and count",
           {"label_smoothing": 0.3}, ("label_smoothing",), extras=("loss_weights", "count")),
    Recipe("softcap", "a softcap that is missing in the gradient",
           {"logit_softcapping": 5.0}, ("logit_softcapping",), ignored=0.2),
    Recipe("softcap-ragged", "padded columns of -inf that a softcap makes finite",
           {"logit_softcapping": 0.5}, ("logit_softcapping",), scale=0.01),
    Recipe("softcap-none", "a softcap lost when logits are recomputed",
           {"logit_softcapping": 2.0, "reduction": "none"}, ("logit_softcapping",), extras=("upstream",)),
    Recipe("softcap-minus-inf",
           "a label's logit of -inf, finite after the softcap, treated as one of another shard",
           {"logit_softcapping": 2.0, "reduction": "none"}, ("logit_softcapping",), change=_minus_inf_at_labels,
           over_logits=True, extras=("upstream",)),
    Recipe("softcap-vocab-1", "a padded column of -inf that a softcap makes finite, where V = 1",
           {"logit_softcapping": 2.0, "z_loss": 0.1}, ("logit_softcapping",), vocab=1, extras=("upstream",)),
    Recipe("z-loss", "a z-loss that is missing in the gradient, or without weights and count",
           {"z_loss": 0.1}, ("z_loss",), extras=("loss_weights", "count", "upstream")),
    Recipe("metrics", "metrics without weights or count, or that are differentiated",
           {"metrics": METRICS, "z_loss": 0.1}, ("metrics",), extras=("loss_weights", "count", "upstream")),
    Recipe("metrics-none", "metrics of another token, or from an approximate maximum",
           {"metrics": METRICS, "z_loss": 0.1, "reduction": "none"}, ("metrics",), change=_labels_at_maximum,
           extras=("upstream",)),
    Recipe("z-loss-smoothing", "one of two options lost when both are on",
           {"z_loss": 1e-3, "label_smoothing": 0.1, "reduction": "none"}, ("z_loss",), extras=("upstream",)),
    Recipe("strided", "strides taken for those of a contiguous array", strided=True, ignored=0.1),
)  # fmt: skip

# Drawn if a lower arithmetic would pass all other cases of a row. Its error is largest relative to the bound where a
# weight's gradient is a sum over many tokens, where logits are far apart, and where few classes and hidden values keep
# the bound small.
_LOWER = "a lower arithmetic that would pass all other cases"
HARDER = (
    Recipe("harder-1", _LOWER, lead=(8, 32), vocab=101, ignored=0.0),
    Recipe("harder-2", _LOWER, lead=(16, 64), vocab=33, hidden=16, scale=30.0, ignored=0.0),
    Recipe("harder-3", _LOWER, lead=(16, 64), vocab=5, hidden=4, scale=30.0, ignored=0.0),
)
