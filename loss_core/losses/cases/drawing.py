"""Named and random test cases, shared by tests, `check` and `bench`; reproducible from a seed.

A recipe has the parameters of a case and the failure that it would catch; `make_case` draws its arrays for one config.
Values are float64; callers round them to the tested dtype first.
"""

# lead = leading dimensions of labels; T = their product, V = vocabulary, H = hidden

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from loss_core.losses.cases.recipes import HARDER, RECIPES, Array, Drawn
from loss_core.losses.definition import LossDef, Recipe, Sizes, definition_of, need_definition
from loss_core.registry import LOSS_CONFIG_REGISTRY

# A backend that compiles does so once per kind of random case. 12 kinds alternate; after every 100 cases a new kind
# replaces the oldest.
_KINDS_AT_A_TIME = 12
_CASES_OF_A_KIND = 100


@dataclass(frozen=True)
class Case:
    """One call of one loss: config, arguments, upstream gradient.

    Attributes:
        name: the recipe's name, or "random-SEED-INDEX".
        config: config of the loss.
        arrays: keyword arguments of the loss's forward, floats in float64.
        upstream: derivative of the objective by the result; None for ones.
        grad_of: arguments whose gradient is compared.
        strided: whether floating arrays are passed as slices of longer ones.
        catches: the failure that the case would catch.
    """

    name: str
    config: Any
    arrays: dict[str, Array]
    upstream: Array | None
    grad_of: tuple[str, ...]
    strided: bool = False
    catches: str = ""


def recipes_of(loss: str | Any) -> tuple[Recipe, ...]:
    """The recipes of a loss: those of every loss, then those of its definition."""
    return (*RECIPES, *need_definition(loss).recipes)


def recipe_names() -> tuple[str, ...]:
    """Names of all recipes of all registered losses."""
    names = [recipe.name for recipe in (*RECIPES, *HARDER)]
    for loss in LOSS_CONFIG_REGISTRY:
        if (definition := definition_of(loss)) is not None:
            names += [recipe.name for recipe in definition.recipes]
    return tuple(dict.fromkeys(names))


def named_cases(
    loss: str | Any, *, shape: tuple[int, ...] | None = None, only: tuple[str, ...] | None = None
) -> list[Case]:
    """The named cases of a loss.

    Args:
        loss: registry name: each case may set config fields; or a config, which is not changed.
        shape: (T, V) or (T, V, H) in place of the shapes of the recipes.
        only: names of the cases to draw; None for all except the harder ones.
    Raises:
        TypeError: the loss has no definition.
    """
    base = LOSS_CONFIG_REGISTRY[loss]() if isinstance(loss, str) else loss
    definition, known = need_definition(base), {f.name for f in fields(base)}
    recipes, cases = recipes_of(base), []
    if only is not None:
        recipes = tuple(recipe for recipe in (*recipes, *HARDER) if recipe.name in only)
    for recipe in recipes:
        sized = recipe if shape is None else _with_shape(recipe, shape)
        if sized is None or not known.issuperset(recipe.needs) or (recipe.over_logits and not _logits(definition)):
            continue
        tweaks = {k: v for k, v in recipe.fields.items() if k in known} if isinstance(loss, str) else {}
        config = replace(base, **tweaks)
        # A config that the user passed must have the values that the recipe is about.
        matches = all(getattr(config, k, v) == v for k, v in recipe.fields.items() if k != "reduction")
        if matches and _accepted(definition, config, recipe.extras) == recipe.extras:
            cases.append(make_case(sized, config, seed=zlib.crc32(recipe.name.encode())))
    return cases


def random_cases(loss: str | Any, count: int, seed: int, shape: tuple[int, ...] | None = None) -> list[Case]:
    """The first `count` random cases of a seed."""
    return [random_case(loss, index, seed, shape) for index in range(count)]


def random_case(loss: str | Any, index: int, seed: int, shape: tuple[int, ...] | None = None) -> Case:
    """A case with random shape, fields, arguments and values; reproducible from index and seed.

    What triggers a compilation (shape, fields, the set of arguments) is drawn per kind, so that compiled programs are
    reused; values, their scale, which labels are ignored, and strides are drawn per index.
    """
    kind_index = index % _KINDS_AT_A_TIME + index // _CASES_OF_A_KIND
    kind, rng = np.random.default_rng([seed, kind_index]), np.random.default_rng([seed, index, 1])
    config = LOSS_CONFIG_REGISTRY[loss]() if isinstance(loss, str) else loss
    definition = need_definition(config)
    if isinstance(loss, str):
        known = {f.name for f in fields(config)}
        values = {name: draw(kind) for name, draw in definition.random_fields.items() if name in known}
        config = replace(config, **values)
    lead = tuple(int(n) for n in kind.integers(1, 7, kind.integers(1, 4)))
    extras = tuple(extra for extra in ("mask", "loss_weights", "count", "lm_bias", "upstream") if kind.random() < 0.4)
    recipe = Recipe(
        f"random-{seed}-{index}",
        "anything",
        lead=lead,
        vocab=int(kind.choice([1, 2, 3, 7, 31, 64, 129, 200])),
        hidden=int(kind.choice([1, 4, 17, 32])),
        scale=float(rng.choice([0.01, 1.0, 5.0, 100.0])),
        ignored=float(rng.choice([0.0, 0.3, 0.9])),
        extras=_accepted(definition, config, extras),
        strided=bool(rng.random() < 0.3),
    )
    sized = recipe if shape is None else _resized(recipe, shape)
    return make_case(sized, config, seed=int(rng.integers(2**31)))


def make_case(recipe: Recipe, config: Any, seed: int) -> Case:
    """Draw the arrays of a recipe for a config, which is not changed."""
    definition, rng = need_definition(config), np.random.default_rng(seed)
    labels = rng.integers(0, recipe.vocab, recipe.lead)
    sizes = Sizes(recipe.lead, recipe.vocab, recipe.hidden)
    arrays: dict[str, Array] = dict(definition.draw(definition, sizes, recipe.scale, rng))
    ignore_index = int(getattr(config, "ignore_index", -100))
    arrays["labels"] = np.where(rng.random(recipe.lead) < recipe.ignored, ignore_index, labels)
    if "mask" in recipe.extras:
        arrays["mask"] = (rng.random(recipe.lead) < 0.6).astype(np.int64)
    if "loss_weights" in recipe.extras:
        arrays["loss_weights"] = rng.random(recipe.lead) * 2
    if "lm_bias" in recipe.extras:
        arrays["lm_bias"] = rng.standard_normal(recipe.vocab) * recipe.scale
    if "count" in recipe.extras and (count := definition.find("count")) is not None:
        arrays[count.name] = np.asarray(7)
    if recipe.change is not None:
        rows = tuple(a.name for a in definition.inputs if a.dims[0] == "T")
        recipe.change(Drawn(recipe, arrays, ignore_index, rng, rows, _logits(definition)))
    upstream: Array | None = None
    if "upstream" in recipe.extras:
        lead = recipe.lead if definition.reduction(config) == "none" else ()
        stacked = () if (results := definition.results(config)) == 1 else (results,)
        upstream = np.asarray(rng.standard_normal((*stacked, *lead)))
    grad_of = tuple(a.name for a in definition.arguments if a.differentiated and a.name in arrays)
    return Case(recipe.name, config, arrays, upstream, grad_of, recipe.strided, recipe.catches)


def _logits(definition: LossDef) -> tuple[str, ...]:
    return tuple(a.name for a in definition.inputs if a.dims == ("T", "V"))


def _with_shape(recipe: Recipe, shape: tuple[int, ...]) -> Recipe | None:
    """The recipe at another shape; None if the recipe is about its shape."""
    return _resized(recipe, shape) if recipe.vocab == Recipe.vocab else None


def _resized(recipe: Recipe, shape: tuple[int, ...]) -> Recipe:
    return replace(recipe, lead=shape[:1], vocab=shape[1], hidden=shape[2] if len(shape) > 2 else recipe.hidden)


def _accepted(definition: LossDef, config: Any, extras: tuple[str, ...]) -> tuple[str, ...]:
    """The extras that a call with this config accepts together."""
    found = tuple(extra for extra in extras if extra == "upstream" or definition.accepts(config, extra))
    if "count" in found:
        return found
    refused = {argument.name for argument in definition.arguments if argument.with_count}
    return tuple(extra for extra in found if extra not in refused)
