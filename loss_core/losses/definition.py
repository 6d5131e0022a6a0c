"""`LossDef`: all that a loss is apart from its kernels, said once per loss.

check, bench, captured calls, the splits over tensor parallel and the command line ask the definition; none of them
knows a loss by its class. `loss_core.register_loss(..., definition=LossDef(...))` makes a user's loss as known to
them as ours.
"""

# T = tokens (all leading dimensions of labels), V = vocabulary, H = hidden, H_t = hidden of a teacher, K = classes of a
# teacher per token

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
# A gradient of the result, of its shape; None is ones.
Upstream = NDArray[Any] | None
# Config field -> function that draws a value of it.
RandomFields = Mapping[str, Callable[[np.random.Generator], Any]]


# Classes of a teacher per token, as inference engines and files of log-probabilities have them.
TOP_K = 64


class Sizes(NamedTuple):
    """Sizes of one call; K is `TOP_K`, or half of V where that is less.

    Attributes:
        lead: leading dimensions of labels, whose product is T.
        vocab, hidden: V and H; hidden is 0 where the loss has none.
    """

    lead: tuple[int, ...]
    vocab: int
    hidden: int = 0

    def shape(self, dims: tuple[str, ...]) -> tuple[int, ...]:
        """The shape of an argument of these dimensions.

        >>> Sizes((4, 6), 507).shape(("T", "V"))
        (4, 6, 507)
        """
        sizes = {
            "T": self.lead,
            "V": (self.vocab,),
            "H": (self.hidden,),
            # Another number than H, so that one taken for the other shows; and a teacher is larger.
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
        kind: "float"; "label" (integers, class or ignore_index), "mark" (integers that say only what is ignored),
            "index" (integers, classes), "mask", "count" (an integer that divides a sum), or "hint" (the number
            of valid tokens, given for speed).
        differentiated: whether it has a gradient; trained: whether training needs that gradient.
        optional: whether it may be left out.
        sum_only: whether it is refused with another reduction than "sum".
        with_count: whether it is refused without the argument of kind "count".
        draw: (shape, V, random generator) -> numbers; None: normal ones, or random classes.
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
        """0 or -1: the axis over the vocabulary, which tensor parallel shards; None where every rank has it whole."""
        if "V" not in self.dims:
            return None
        return 0 if self.dims[0] == "V" else -1

    def spread(self, sizes: Sizes, logit_scale: float) -> float:
        """Standard deviation at which the logits have about `logit_scale`."""
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
        """Sum of |upstream x result| over all that the gradients are of."""
        up = 1.0 if upstream is None else np.asarray(upstream, np.float64)
        return float(np.sum(np.abs(up * self.loss)))


Result = TypeVar("Result", bound=OracleResult)
# (config, arrays, upstream) -> result.
Oracle = Callable[[Any, Arrays, Upstream], Result]


@dataclass(frozen=True)
class Recipe:
    """What is special about a test case; `loss_core.losses.cases.drawing` turns it into arrays.

    Attributes:
        name: id in tables and on the command line.
        catches: the failure that it would catch.
        fields: config fields that the case sets, where the config has them and is not the user's own.
        needs: names of fields without which the case makes no sense.
        lead, vocab, hidden: shape of the inputs. V = 507 is no multiple of a block, so that padding shows.
        scale: standard deviation of the logits.
        ignored: share of labels set to ignore_index.
        change: a further change of what was drawn; over_logits: it is about arguments [T, V].
        extras: arguments to add: "mask", "loss_weights", "count", "lm_bias"; or "upstream", a gradient of the result.
        strided: give floating inputs as slices of longer ones; the teacher's stay contiguous, so that the two differ.
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
    """Independent normal numbers for every floating argument that must be given."""
    drawn = {}
    for argument in definition.inputs:
        values = rng.standard_normal(sizes.shape(argument.dims))
        if "V" in argument.dims:
            values = values * scale
        drawn[argument.name] = values / np.sqrt(values.shape[-1]) if argument.dims[0] == "V" else values
    return drawn


@dataclass(frozen=True)
class LossDef:
    """What a loss is.

    Attributes:
        name: of the inputs it takes, by which `bench` finds baselines: "cross_entropy", "linear_cross_entropy",
            "distillation", or one of your own (which has none).
        arguments: of its forward.
        oracle: (config, arrays, upstream) -> OracleResult: loss and the gradient of each differentiated argument by
            definition, dense, in float64 NumPy. It shares no code with what it judges.
        error_bound: (config, arrays, expected, dtype, upstream, product_dtype) -> largest error that rounding
            explains, elementwise, for "loss" and each gradient; see `loss_core.losses.allowances`. None: it is
            estimated from the oracle, see `loss_core.losses.bounds.sensitivity`.
        recipes: cases besides those that every loss gets.
        draw: (definition, sizes, scale, rng) -> the floating arguments that must be given.
        random_fields: config field -> function of a random generator, for random cases.
        reduction: (config) -> "sum", "mean" (over valid tokens) or "none", without a count.
        products: matrix products [T, H] x [H, V] of a forward, one for each head; 0 where there is none.
        lower: what the next lower arithmetic would give, see `loss_core.losses.lower`; None: what the arguments tell.
        results: (config) -> how many results there are; those of several are stacked in front, as is their upstream.
        row_numbers: numbers per token that ranks exchange when they share the vocabulary.
        sampled_rows: (config, [n, H] rows, [V, H] weight in blocks, arguments of the n rows) -> the gradient of the
            rows, for a call too large for the oracle; None where all floating arguments have the dimension T.
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
        """The floating arguments that must be given."""
        return tuple(a for a in self.arguments if a.kind == "float" and not a.optional)

    @property
    def drawn(self) -> tuple[Argument, ...]:
        """`inputs`, and the indices that must be given."""
        return tuple(a for a in self.arguments if a.kind in ("float", "index") and not a.optional)

    @property
    def vocab_axes(self) -> dict[str, int]:
        """Axis over the vocabulary, by name of the arguments that have one."""
        return {a.name: a.vocab_axis for a in self.arguments if a.vocab_axis is not None}

    def find(self, kind: str) -> Argument | None:
        """The first argument of a kind."""
        return next((a for a in self.arguments if a.kind == kind), None)

    def accepts(self, config: Any, name: str) -> bool:
        """Whether the loss takes an argument, given by its name or kind, with this config."""
        found = next((a for a in self.arguments if name in (a.name, a.kind)), None)
        return found is not None and not (found.sum_only and self.reduction(config) != "sum")


def definition_of(loss: Any) -> LossDef | None:
    """The definition of a config, a config class or a registry name; None where there is none.

    A class that derives from one with a definition has that one, unless it is registered with another.
    """
    config_cls = config_class_for(loss) if isinstance(loss, str) else loss if isinstance(loss, type) else type(loss)
    for cls in config_cls.__mro__:
        if (found := DEFINITIONS.get(cls)) is not None:
            if isinstance(found, str):
                found = DEFINITIONS[cls] = importlib.import_module(f"loss_core.losses.{found}").DEFINITION
            return found
    return None


def need_definition(loss: Any) -> LossDef:
    """As `definition_of`, where there must be one.

    Raises:
        TypeError: there is none; says what to do.
    """
    if (found := definition_of(loss)) is None:
        name = loss if isinstance(loss, str) else type(loss).__name__
        raise TypeError(
            f"There is no definition of {name} in float64. Give one to loss_core.register_loss(..., definition="
            "LossDef(...)), or compare two implementations with loss_core.check.compare."
        )
    return found
