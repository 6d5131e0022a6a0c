"""One benchmark call: loss, shape, dtype, and inputs that are the same for every implementation.

Inputs are one block of random numbers, repeated to the full shape on the device: a tensor of 8192 x 262144 then
costs a copy, not minutes of random number generation, and torch and JAX compute with the same values.
"""

# T = tokens, V = vocabulary, H = hidden

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loss_core.bench.measure.shards import rank_sizes
from loss_core.loss_config import LossConfig
from loss_core.losses.definition import LossDef, Sizes, need_definition

# Prime, so that rows of any width start at different offsets of the repeated block: no two rows are equal.
BLOCK = 4_194_301

# Standard deviation of the logits: between that of an untrained model, near 1, and of a trained one, near 3.
LOGIT_SCALE = 2.0

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

# Most elements of one logits array of a reduced call, which is compared with float64.
_REDUCED_ELEMENTS = 2**22

_SAMPLED_TOKENS = 8


@dataclass(frozen=True)
class Job:
    """One measured call.

    Attributes:
        config: the loss, as returned by `LossConfig.to_dict`: a worker can resolve the class only after it has imported
            the user's modules.
        shape: (T, V), or (T, V, H) where an argument has a hidden size.
        dtype: of the floating inputs.
        device: "cpu", "cuda", or another device name of torch.
        ignored: share of labels that are ignore_index.
        seed: of the inputs.
        forward_only: the loss without gradients.
        tp: ranks that shard the vocabulary; 1 for an unsharded vocabulary in one process.
        count_known: whether our loss receives the count of valid tokens as num_valid_tokens.
    """

    config: Mapping[str, Any]
    shape: tuple[int, ...]
    dtype: str
    device: str = "cpu"
    ignored: float = 0.0
    seed: int = 0
    forward_only: bool = False
    tp: int = 1
    count_known: bool = False

    def loss_config(self) -> LossConfig:
        """The config; the modules that register it must have been imported."""
        return LossConfig.from_dict(self.config)

    @property
    def definition(self) -> LossDef:
        """Definition of the loss.

        Raises:
            TypeError: if it was registered without a definition.
        """
        return need_definition(self.config["name"])

    @property
    def float_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the floating arguments, by name."""
        sizes = Sizes((self.shape[0],), *self.shape[1:])
        return {argument.name: sizes.shape(argument.dims) for argument in self.definition.inputs}

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the floating arguments whose gradients are measured: those that training needs."""
        return tuple(argument.name for argument in self.definition.inputs if argument.trained)

    @property
    def num_valid_tokens(self) -> int:
        """Count of labels that are not ignored."""
        return self.shape[0] - round(self.shape[0] * self.ignored)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Count of classes on each rank."""
        return rank_sizes(self.shape[1], self.tp)

    def of_largest_rank(self) -> Job:
        """The call with the vocabulary shard of rank 0, the largest."""
        return replace(self, shape=(self.shape[0], self.sizes[0], *self.shape[2:]), tp=1)

    def reduced(self) -> Job:
        """The same call with fewer tokens and a smaller hidden size, for a dense float64 oracle; V is unchanged."""
        limit = max(_REDUCED_ELEMENTS // self.shape[1], 16)
        tokens = min(self.shape[0], limit, 256)
        return replace(self, shape=(tokens, self.shape[1], *(min(h, limit) for h in self.shape[2:])))


@dataclass(frozen=True)
class Tiled:
    """An array defined by a block of values that is repeated to fill it.

    Attributes:
        block: [n] float32, or int64 for indices.
        shape: of the array.
    """

    block: NDArray[Any]
    shape: tuple[int, ...]

    def full(self) -> NDArray[Any]:
        """The materialized array."""
        return np.resize(self.block, self.shape)

    def row_range(self, start: int, stop: int) -> Tiled:
        """Consecutive rows of a 2-D array, as a separate array."""
        width = self.shape[1]
        return Tiled(np.roll(self.block, -start * width), (stop - start, width))

    def rows(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Selected rows of a 2-D array, without materializing the others."""
        width = self.shape[1]
        return np.take(self.block, indices[:, None] * width + np.arange(width), mode="wrap")


def count_argument(job: Job, labels: NDArray[np.int64]) -> dict[str, int]:
    """Keyword arguments of our loss besides arrays: num_valid_tokens of the labels if job.count_known, else none."""
    if not job.count_known:
        return {}
    return {"num_valid_tokens": int(np.count_nonzero(labels != getattr(job.loss_config(), "ignore_index", -100)))}


def sampled_tokens(job: Job) -> NDArray[np.int64]:
    """Indices of the tokens whose gradient is compared at the full shape: the first, the last, and some between."""
    return np.unique(np.linspace(0, job.shape[0] - 1, _SAMPLED_TOKENS).astype(np.int64))


def input_bytes(job: Job) -> int:
    """Bytes of the floating inputs, summed over the ranks."""
    sharded = job.definition.vocab_axes
    copies = {name: 1 if name in sharded else job.tp for name in job.float_shapes}
    return BYTES[job.dtype] * sum(copies[name] * math.prod(shape) for name, shape in job.float_shapes.items())


def gradient_bytes(job: Job) -> int:
    """Bytes of the gradients that a call returns, on the rank with the most classes."""
    if job.forward_only:
        return 0
    shapes = job.of_largest_rank().float_shapes
    return BYTES[job.dtype] * sum(math.prod(shapes[name]) for name in job.trained)


def make_inputs(job: Job) -> tuple[dict[str, Tiled], NDArray[np.int64]]:
    """Inputs by argument name, and labels [T] with the exact share of ignored ones.

    Deterministic: the same job has the same inputs in every process.
    """
    sizes = Sizes((job.shape[0],), *job.shape[1:])
    tokens, vocab = job.shape[:2]
    tiles = {}
    for index, argument in enumerate(job.definition.drawn):
        rng = np.random.default_rng([job.seed, index])
        shape = sizes.shape(argument.dims)
        if argument.draw is not None:
            # Complete rows: the values of one row may depend on each other.
            rows = argument.draw((min(shape[0], BLOCK // shape[-1]), *shape[1:]), vocab, rng).reshape(-1)
            tiles[argument.name] = Tiled(rows.astype(np.float32) if argument.kind == "float" else rows, shape)
            continue
        block = rng.standard_normal(min(math.prod(shape), BLOCK), np.float32)
        tiles[argument.name] = Tiled(block * np.float32(argument.spread(sizes, LOGIT_SCALE)), shape)
    rng = np.random.default_rng([job.seed, len(tiles)])
    labels = rng.integers(0, vocab, tokens)
    ignore_index = int(getattr(job.loss_config(), "ignore_index", -100))
    # A drawn label that equals ignore_index would change the share.
    labels = np.where(labels == ignore_index, (labels + 1) % vocab, labels)
    labels[rng.permutation(tokens)[: tokens - job.num_valid_tokens]] = ignore_index
    return tiles, labels
