"""`LossDef`: everything about a loss except its kernels, defined once per loss.

check, bench, captured calls, tensor-parallel splits and the command line read the definition; none of them branches on
the config class. `loss_core.register_loss(..., definition=LossDef(...))` gives a user-defined loss the same support.
"""

# T = tokens (all leading dimensions of labels), V = vocabulary, H = hidden, H_t = hidden of the teacher,
# K = classes per token whose teacher log-probabilities are given

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from loss_core.registry import DEFINITIONS, config_class_for

Floats = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]
# Upstream gradient of the result, of its shape; None is ones.
Upstream = NDArray[Any] | None
# Config field -> function that draws a value for it.
RandomFields = Mapping[str, Callable[[np.random.Generator], Any]]

# K: what inference engines and files of log-probabilities commonly store per token.
TOP_K = 64


class Sizes(NamedTuple):
    """Sizes of one call; K is `TOP_K`, or half of V if that is smaller.

    Attributes:
        lead: leading dimensions of labels, whose product is T.
        vocab, hidden: V and H; hidden is 0 if the loss has no hidden states.
    """

    lead: tuple[int, ...]
    vocab: int
    hidden: int = 0

    def shape(self, dims: tuple[str, ...]) -> tuple[int, ...]:
        """The shape of an argument with these dimensions.

        >>> Sizes((4, 6), 507).shape(("T", "V"))
        (4, 6, 507)
        """
        sizes = {
            "T": self.lead,
            "V": (self.vocab,),
            "H": (self.hidden,),
            # Not H, so that a mix-up of the two shows; and teachers are usually larger.
            "H_t": (2 * self.hidden,),
            "K": (max(min(self.vocab // 2, TOP_K), 1),),
        }
        return tuple(size for dim in dims for size in sizes[dim])


@dataclass(frozen=True)
class Argument:
    """One argument of a loss's forward.

    Attributes:
        name: keyword of the forward.
        dims: "T" (any number of leading dimensions), "V", "H", "H_t", "K"; () for a scalar.
        kind: "float"; "label" (integers: a class or ignore_index), "mark" (integers that are only compared with
            ignore_index), "index" (integers: classes), "mask", "count" (an integer that divides a sum), or "hint" (the
            number of valid tokens, which only saves work).
        differentiated: whether it has a gradient; trained: whether training needs that gradient.
        optional: whether it may be omitted.
        sum_only: whether it is accepted only with the reduction "sum".
        with_count: whether it is accepted only together with the argument of kind "count".
        draw: (shape, V, random generator) -> values; None: standard normal values, or random classes.
    """

    name: str
    dims: tuple[str, ...]
    kind: str = "float"
    differentiated: bool = True
    trained: bool = True
    optional: bool = False
    sum_only: bool = False
    with_count: bool = False
    draw: Callable[[tuple[int, ...], int, np.random.Generator], NDArray[Any]] | None = None

    @property
    def vocab_axis(self) -> int | None:
        """0 or -1: the vocabulary axis, which tensor parallelism shards; None where it is replicated on every rank."""
        if "V" not in self.dims:
            return None
        return 0 if self.dims[0] == "V" else -1

    def spread(self, sizes: Sizes, logit_scale: float) -> float:
        """Standard deviation of this argument for which that of the logits is about `logit_scale`."""
        if "V" not in self.dims:
            return 1.0
        return logit_scale if "T" in self.dims else logit_scale / float(np.sqrt(sizes.shape(self.dims)[-1]))


LABELS = Argument("labels", ("T",), "label", differentiated=False)
LOSS_WEIGHTS = Argument("loss_weights", ("T",), optional=True, sum_only=True)
MASK = Argument("mask", ("T",), "mask", differentiated=False, optional=True)


@dataclass(frozen=True)
class OracleResult:
    """Loss and gradients in float64.

    Attributes:
        loss: scalar, or the shape of labels for reduction="none".
        grads: gradient by argument name, of the argument's shape.
    """

    loss: Floats
    grads: dict[str, Floats]

    def size(self, upstream: Upstream) -> float:
        """Sum of |upstream * loss| over all differentiated results."""
        up = 1.0 if upstream is None else np.asarray(upstream, np.float64)
        return float(np.sum(np.abs(up * self.loss)))


Result = TypeVar("Result", bound=OracleResult)
# (config, arrays, upstream) -> result.
Oracle = Callable[[Any, Arrays, Upstream], Result]


@dataclass(frozen=True)
class Recipe:
    """The parameters of a test case; `loss_core.losses.cases.drawing` draws its arrays.

    Attributes:
        name: id in tables and on the command line.
        catches: the failure that it would catch.
        fields: config fields that the case sets, if the config has them; a config that the user passed is not changed.
        needs: config fields without which the case is skipped.
        lead, vocab, hidden: shape of the inputs. V = 507 is no multiple of a block, so that padding shows.
        scale: standard deviation of the logits.
        ignored: fraction of labels set to ignore_index.
        change: edits the drawn arrays in place; over_logits: whether it needs an argument [T, V].
        extras: arguments to add: "mask", "loss_weights", "count", "lm_bias"; or "upstream", a gradient of the result.
        strided: pass floating inputs as slices of longer arrays; those of the teacher stay contiguous, so that the
            layouts of student and teacher differ.
    """

    name: str
    catches: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    lead: tuple[int, ...] = (4, 6)
    vocab: int = 507
    hidden: int = 24
    scale: float = 3.0
    ignored: float = 0.3
    change: Callable[[Any], None] | None = None
    over_logits: bool = False
    extras: tuple[str, ...] = ()
    strided: bool = False


def draw_floats(definition: LossDef, sizes: Sizes, scale: float, rng: np.random.Generator) -> dict[str, Floats]:
    """Independent normal values for every required floating argument."""
    drawn = {}
    for argument in definition.inputs:
        values = rng.standard_normal(sizes.shape(argument.dims))
        if "V" in argument.dims:
            values = values * scale
        drawn[argument.name] = values / np.sqrt(values.shape[-1]) if argument.dims[0] == "V" else values
    return drawn


@dataclass(frozen=True)
class LossDef:
    """The definition of a loss: arguments, oracle, error bound, test cases, cost.

    Attributes:
        name: by which `bench` finds baselines that take the same inputs: "cross_entropy", "linear_cross_entropy",
            "distillation", or a new name, which has no baselines.
        arguments: of the forward.
        oracle: (config, arrays, upstream) -> OracleResult: loss and the gradient of each differentiated argument by
            definition, dense, in float64 NumPy. It shares no code with the implementations under test.
        error_bound: (config, arrays, expected, dtype, upstream, product_dtype) -> largest error that rounding
            explains, elementwise, for "loss" and each gradient; see `loss_core.losses.allowances`. None: it is
            estimated from the oracle, see `loss_core.losses.bounds.sensitivity`.
        recipes: cases in addition to those that every loss has.
        draw: (definition, sizes, scale, rng) -> the required floating arguments.
        random_fields: config field -> function of a random generator, for random cases.
        reduction: (config) -> "sum", "mean" (over valid tokens) or "none", for a call without a count.
        products: number of matrix products [T, H] x [H, V] of a forward, one per head; 0 for a loss over logits.
        lower: computes the results in the next lower arithmetic, see `loss_core.losses.lower`; None: it is derived from
            the arguments.
        results: (config) -> number of results; two or more are stacked along a new first axis, as is their upstream.
        row_numbers: numbers per token that ranks exchange when the vocabulary is sharded.
        sampled_rows: (config, [n, H] rows, [V, H] weight in blocks, arguments of the n rows) -> gradient of the n rows,
            for a call too large for the oracle; None if all floating arguments have the dimension T.
    """

    name: str
    arguments: tuple[Argument, ...]
    oracle: Oracle[OracleResult]
    error_bound: Callable[..., dict[str, Floats]] | None = None
    recipes: tuple[Recipe, ...] = ()
    draw: Callable[[LossDef, Sizes, float, np.random.Generator], dict[str, Floats]] = draw_floats
    random_fields: RandomFields = field(default_factory=dict)
    reduction: Callable[[Any], str] = lambda config: str(getattr(config, "reduction", "sum"))
    products: int = 0
    lower: Callable[..., dict[str, OracleResult]] | None = None
    results: Callable[[Any], int] = lambda config: 1
    row_numbers: int = 3
    sampled_rows: Callable[..., Floats] | None = None

    @property
    def inputs(self) -> tuple[Argument, ...]:
        """The required floating arguments."""
        return tuple(a for a in self.arguments if a.kind == "float" and not a.optional)

    @property
    def drawn(self) -> tuple[Argument, ...]:
        """The required arguments whose values are drawn: `inputs` and indices."""
        return tuple(a for a in self.arguments if a.kind in ("float", "index") and not a.optional)

    @property
    def vocab_axes(self) -> dict[str, int]:
        """Argument name -> vocabulary axis, for the arguments that have one."""
        return {a.name: a.vocab_axis for a in self.arguments if a.vocab_axis is not None}

    def find(self, kind: str) -> Argument | None:
        """The first argument of a kind."""
        return next((a for a in self.arguments if a.kind == kind), None)

    def accepts(self, config: Any, name: str) -> bool:
        """Whether the loss accepts an argument, given by name or kind, with this config."""
        found = next((a for a in self.arguments if name in (a.name, a.kind)), None)
        return found is not None and not (found.sum_only and self.reduction(config) != "sum")


def definition_of(loss: Any) -> LossDef | None:
    """The definition of a config, a config class or a registry name; None if it has no definition.

    A subclass inherits the definition, unless it is registered with a definition.
    """
    config_cls = config_class_for(loss) if isinstance(loss, str) else loss if isinstance(loss, type) else type(loss)
    for cls in config_cls.__mro__:
        if (found := DEFINITIONS.get(cls)) is not None:
            if isinstance(found, str):
                found = DEFINITIONS[cls] = importlib.import_module(f"loss_core.losses.{found}").DEFINITION
            return found
    return None


def need_definition(loss: Any) -> LossDef:
    """As `definition_of`, but never None.

    Raises:
        TypeError: there is no definition; says what to do.
    """
    if (found := definition_of(loss)) is None:
        name = loss if isinstance(loss, str) else type(loss).__name__
        raise TypeError(
            f"There is no definition of {name} in float64. Give one to loss_core.register_loss(..., definition="
            "LossDef(...)), or compare two implementations with loss_core.check.compare."
        )
    return found
