"""Named, seeded inputs that find bugs, shared by tests, `check` and `bench`.

A recipe says what is special about a case and which failure it would catch; `make_case` turns it
into arrays for one config. Values are float64: whoever runs a case rounds them to its dtype first.
"""

# lead = leading dimensions of labels; T = their product, V = vocabulary, H = hidden

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.build import LOSS_CONFIG_REGISTRY
from loss_core.config import FusedLinearCEConfig, KDLossConfig, LossConfig, MaskedCrossEntropyConfig

Array = NDArray[Any]

_MASKED, _FUSED, _PARALLEL, _KD = LOSS_CONFIG_REGISTRY
_LOGITS_CE = (_MASKED, _PARALLEL)
_CE = (*_LOGITS_CE, _FUSED)
ALL_LOSSES = (*_CE, _KD)

# V = 507: no multiple of a block, so that padding shows.
_LEAD, _VOCAB, _HIDDEN = (4, 6), 507, 24


@dataclass(frozen=True)
class Recipe:
    """What is special about a case.

    Attributes:
        name: id in tables and on the command line.
        catches: the failure that it would catch.
        losses: registry names it applies to.
        fields: config fields that the case sets when the config is not the user's own.
        lead, vocab, hidden: shape of the inputs.
        scale: standard deviation of the logits.
        ignored: share of labels set to ignore_index.
        special: name of a further change, see `_apply_special`.
        extras: forward arguments to add: "mask", "loss_weights", "count", "upstream".
        strided: give logits or hidden states as a slice of a longer sequence; the teacher's logits stay
            contiguous, so that the two differ.
    """

    name: str
    catches: str
    losses: tuple[str, ...] = ALL_LOSSES
    fields: Mapping[str, Any] = field(default_factory=dict)
    lead: tuple[int, ...] = _LEAD
    vocab: int = _VOCAB
    hidden: int = _HIDDEN
    scale: float = 3.0
    ignored: float = 0.3
    special: str = ""
    extras: tuple[str, ...] = ()
    strided: bool = False


@dataclass(frozen=True)
class Case:
    """One call of one loss: config, arguments, upstream gradient.

    Attributes:
        name: of the recipe, or how to reproduce a random case.
        config: what is built.
        arrays: keyword arguments of the loss's forward, floats in float64.
        upstream: derivative of the objective by the result; None for ones.
        grad_of: arguments whose gradient is compared.
        strided: floating arrays are to be given as slices of longer ones.
        catches: the failure that the case would catch.
    """

    name: str
    config: LossConfig
    arrays: dict[str, Array]
    upstream: Array | None
    grad_of: tuple[str, ...]
    strided: bool = False
    catches: str = ""


RECIPES = (
    Recipe("basic", "any error at all, and an upstream gradient that is left out", extras=("upstream",)),
    Recipe("none-ignored", "padding rows counted although nothing is ignored", ignored=0.0),
    Recipe("mean", "a mean over all positions instead of those that count", _CE, {"reduction": "mean"}),
    Recipe(
        "none", "the first token's upstream gradient used for all", _CE, {"reduction": "none"}, extras=("upstream",)
    ),
    Recipe("all-ignored", "0/0 when no label counts", fields={"reduction": "mean"}, ignored=1.0),
    Recipe("vocab-1", "V = 1, where loss and gradient are 0", vocab=1, ignored=0.2),
    Recipe("ragged", "padded columns that count, which only small logits show", scale=0.01),
    Recipe("huge-logits", "overflow of exp, or digits lost to a large maximum", scale=1e4),
    Recipe("offset", "digits lost when all logits share a large offset", (*_LOGITS_CE, _KD), special="offset"),
    Recipe("minus-inf", "NaN from -inf logits, as a vocabulary mask gives", (*_LOGITS_CE, _KD), special="minus-inf"),
    Recipe("ignore-index-0", "ignore_index compared with another number", fields={"ignore_index": 0}),
    Recipe("ignore-index-in-vocab", "ignore_index off by one", fields={"ignore_index": 5}, special="near-ignore"),
    Recipe("mask", "a mask that is left out, or turned round", _LOGITS_CE, extras=("mask",)),
    Recipe("nan-where-ignored", "0 * NaN in ignored rows", special="nan-where-ignored"),
    Recipe("count", "a token count that does not divide, or divides twice", extras=("count", "upstream")),
    Recipe("loss-weights", "weights left out, or without a gradient", _CE, extras=("loss_weights", "count")),
    Recipe("edge-labels", "the first or the last class missed by a block", special="edge-labels"),
    Recipe("no-upcast", "a float32 result where the input's dtype is promised", (_MASKED, _KD), {"fp32_upcast": False}),
    Recipe("strided", "strides taken for those of a contiguous array", strided=True, ignored=0.1),
    Recipe("softcap", "a softcap that is left out of the gradient", (_FUSED,), {"logit_softcapping": 5.0}, ignored=0.2),
    Recipe(
        "softcap-none",
        "a softcap lost when logits are computed again",
        (_FUSED,),
        {"logit_softcapping": 2.0, "reduction": "none"},
        extras=("upstream",),
    ),
    Recipe("many-tokens", "errors between token blocks", (_FUSED,), lead=(2, 333), vocab=67, hidden=16, scale=1.0),
    Recipe("many-tokens-kd", "errors between row blocks", (_KD,), {"chunk_size": 5}),
    Recipe("temperature", "a missing T^2, or a T in the wrong place", (_KD,), {"temperature": 2.5}),
    Recipe("cold", "a temperature below 1", (_KD,), {"temperature": 0.5}, extras=("count",)),
    Recipe("same-logits", "a divergence of equal distributions that is not 0", (_KD,), special="same-logits"),
)


def recipe_names() -> tuple[str, ...]:
    """Names of all recipes."""
    return tuple(recipe.name for recipe in RECIPES)


def named_cases(
    loss: str | LossConfig,
    *,
    shape: tuple[int, ...] | None = None,
    only: tuple[str, ...] | None = None,
) -> list[Case]:
    """The named cases of a loss.

    Args:
        loss: registry name, where each case may set fields of its own; or a config, which is kept as it is.
        shape: (T, V) or (T, V, H) in place of the shapes of the recipes.
        only: names of the cases wanted; None for all.
    """
    base = LOSS_CONFIG_REGISTRY[loss]() if isinstance(loss, str) else loss
    fixed = not isinstance(loss, str)
    name = _loss_name(base)
    made = []
    for recipe in RECIPES:
        if name not in recipe.losses or (only is not None and recipe.name not in only):
            continue
        sized = recipe if shape is None else _with_shape(recipe, shape)
        if sized is None:
            continue
        known = {f.name for f in fields(base)}
        tweaks = {} if fixed else {k: v for k, v in sized.fields.items() if k in known}
        config = replace(base, **tweaks)
        if _applies(sized, config):
            made.append(make_case(sized, config, seed=zlib.crc32(recipe.name.encode())))
    return made


def random_cases(loss: str | LossConfig, count: int, seed: int, shape: tuple[int, ...] | None = None) -> list[Case]:
    """Cases with random shapes, values, fields and arguments; the same for the same seed."""
    made = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        base = LOSS_CONFIG_REGISTRY[loss]() if isinstance(loss, str) else loss
        config = base if not isinstance(loss, str) else _random_config(base, rng)
        lead = tuple(int(n) for n in rng.integers(1, 7, rng.integers(1, 4)))
        extras = [extra for extra in ("mask", "loss_weights", "count", "upstream") if rng.random() < 0.4]
        recipe = Recipe(
            f"random-{seed}-{index}",
            "anything",
            lead=lead,
            vocab=int(rng.choice([1, 2, 3, 7, 31, 64, 129, 200])),
            hidden=int(rng.choice([1, 4, 17, 32])),
            scale=float(rng.choice([0.01, 1.0, 5.0, 100.0])),
            ignored=float(rng.choice([0.0, 0.3, 0.9])),
            extras=tuple(extra for extra in extras if _accepts(config, extra)),
            strided=bool(rng.random() < 0.3),
        )
        sized = recipe if shape is None else _with_shape(recipe, shape)
        made.append(make_case(sized or recipe, config, seed=int(rng.integers(2**31))))
    return made


def make_case(recipe: Recipe, config: LossConfig, seed: int) -> Case:
    """Draw the arrays of a recipe for a config."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, recipe.vocab, recipe.lead)
    arrays: dict[str, Array] = _float_inputs(recipe, config, rng)
    ignore_index = int(getattr(config, "ignore_index", -100))
    labels = np.where(rng.random(recipe.lead) < recipe.ignored, ignore_index, labels)
    arrays["labels"] = labels
    _add_extras(recipe, config, arrays, rng)
    _apply_special(recipe, arrays, ignore_index, rng)
    reduction = getattr(config, "reduction", "")
    upstream: Array | None = None
    if "upstream" in recipe.extras:
        upstream = rng.standard_normal(recipe.lead if reduction == "none" else ())
    differentiable = ("logits", "hidden_states", "lm_weight", "student_logits", "teacher_logits", "loss_weights")
    grad_of = tuple(name for name in differentiable if name in arrays)
    return Case(recipe.name, config, arrays, np.asarray(upstream) if upstream is not None else None, grad_of,
                recipe.strided, recipe.catches)  # fmt: skip


def _loss_name(config: LossConfig) -> str:
    for name, config_cls in LOSS_CONFIG_REGISTRY.items():
        if isinstance(config, config_cls) and name in ALL_LOSSES:
            return name
    raise TypeError(
        f"There are no cases for {type(config).__name__}; they exist for {', '.join(ALL_LOSSES)}. "
        "For a loss of your own use loss_core.check.compare with your inputs."
    )


def _with_shape(recipe: Recipe, shape: tuple[int, ...]) -> Recipe | None:
    """The recipe at another shape; None where the shape is the point of the recipe."""
    if recipe.vocab != _VOCAB and not recipe.name.startswith("random"):
        return None
    hidden = shape[2] if len(shape) > 2 else recipe.hidden
    return replace(recipe, lead=(shape[0],), vocab=shape[1], hidden=hidden)


def _applies(recipe: Recipe, config: LossConfig) -> bool:
    """Whether a config that is the user's own still makes the case that the recipe means."""
    fits = all(_accepts(config, extra) for extra in recipe.extras)
    return fits and all(getattr(config, k, v) == v for k, v in recipe.fields.items() if k != "reduction")


def _accepts(config: LossConfig, extra: str) -> bool:
    """Whether the loss takes this argument with this config."""
    if extra == "upstream":
        return True
    if isinstance(config, KDLossConfig):
        return extra == "count"
    if extra == "mask":
        return not isinstance(config, FusedLinearCEConfig)
    return getattr(config, "reduction", "") == "sum"


def _random_config(base: LossConfig, rng: np.random.Generator) -> LossConfig:
    values: dict[str, Any] = {"ignore_index": int(rng.choice([-100, -1, 0, 2]))}
    if isinstance(base, KDLossConfig):
        values |= {"temperature": float(rng.choice([0.5, 1.0, 2.0, 4.0])), "chunk_size": int(rng.choice([0, 1, 3]))}
    else:
        values["reduction"] = str(rng.choice(["sum", "mean", "none"]))
    if isinstance(base, FusedLinearCEConfig):
        values["logit_softcapping"] = float(rng.choice([0.0, 3.0, 30.0]))
    if isinstance(base, MaskedCrossEntropyConfig | KDLossConfig):
        values["fp32_upcast"] = bool(rng.random() < 0.7)
    return replace(base, **values)


def _float_inputs(recipe: Recipe, config: LossConfig, rng: np.random.Generator) -> dict[str, Array]:
    shape = (*recipe.lead, recipe.vocab)
    if isinstance(config, FusedLinearCEConfig):
        hidden = rng.standard_normal((*recipe.lead, recipe.hidden))
        weight = rng.standard_normal((recipe.vocab, recipe.hidden)) * recipe.scale / np.sqrt(recipe.hidden)
        return {"hidden_states": hidden, "lm_weight": weight}
    if isinstance(config, KDLossConfig):
        student = rng.standard_normal(shape) * recipe.scale
        return {"student_logits": student, "teacher_logits": student + rng.standard_normal(shape) * recipe.scale / 2}
    return {"logits": rng.standard_normal(shape) * recipe.scale}


def _add_extras(recipe: Recipe, config: LossConfig, arrays: dict[str, Array], rng: np.random.Generator) -> None:
    if "mask" in recipe.extras:
        arrays["mask"] = (rng.random(recipe.lead) < 0.6).astype(np.int64)
    if "loss_weights" in recipe.extras:
        arrays["loss_weights"] = rng.random(recipe.lead) * 2
    if "count" in recipe.extras:
        name = "num_batch_labels" if isinstance(config, KDLossConfig) else "num_label_tokens"
        arrays[name] = np.asarray(7)


def _apply_special(recipe: Recipe, arrays: dict[str, Array], ignore_index: int, rng: np.random.Generator) -> None:
    labels = arrays["labels"]
    logits = [name for name in ("logits", "student_logits", "teacher_logits", "hidden_states") if name in arrays]
    if recipe.special == "offset":
        for name, offset in zip(logits, (1e4, -2e3), strict=False):
            arrays[name] = arrays[name] + offset
    elif recipe.special == "minus-inf":
        banned = rng.random(recipe.vocab) < 0.5
        banned[0] = False
        for name in logits:
            arrays[name] = np.where(banned, -np.inf, arrays[name])
        arrays["labels"] = np.where(labels == ignore_index, labels, 0)
    elif recipe.special == "nan-where-ignored":
        junk = np.resize([np.nan, np.inf, -np.inf], labels.shape)
        for name in logits:
            arrays[name] = np.where((labels == ignore_index)[..., None], junk[..., None], arrays[name])
    elif recipe.special == "near-ignore":
        near = np.clip(ignore_index + rng.integers(-1, 2, labels.shape), 0, recipe.vocab - 1)
        arrays["labels"] = np.where(rng.random(labels.shape) < 0.5, near, labels)
    elif recipe.special == "edge-labels":
        edges = np.where(rng.random(labels.shape) < 0.5, 0, recipe.vocab - 1)
        arrays["labels"] = np.where(labels == ignore_index, labels, edges)
    elif recipe.special == "same-logits":
        arrays["teacher_logits"] = arrays["student_logits"].copy()
