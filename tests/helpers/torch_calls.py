"""Small calls of every loss on every flag of torch, for tests of what all of them guarantee.

New flags, configs and kernels are included automatically; the arguments of a loss come from its definition.
"""

# T = tokens (all leading dimensions of labels, flattened), V = vocabulary, H = hidden

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers import interpreter
from loss_core import (
    LOSS_CONFIG_REGISTRY,
    BackendUnavailable,
    FusedLinearLogProbsConfig,
    LogProbsConfig,
    LossConfig,
    TEParallelCEConfig,
)
from loss_core.dispatch.flags import COMPILED_AT_FIRST_CALL, all_flags, flag_status
from loss_core.losses.definition import Sizes, need_definition
from loss_core_torch.evaluate import as_one

REDUCTIONS = ("sum", "mean", "none")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)

PLAIN = "torch:plain"
SLOW = pytest.mark.slow


@functools.cache
def usable_flags() -> tuple[str, ...]:
    """`torch` (auto) and every kernel of torch that can run here; Triton's in its interpreter (see `interpreter`)."""
    named = [flag for flag in all_flags() if flag.startswith("torch:")]
    interpreted = [interpreter.FLAG] if interpreter.possible() else []
    return ("torch", *(flag for flag in named if flag in interpreted or flag_status(flag).usable))


def configs(reductions: Sequence[str] = REDUCTIONS, **values: Any) -> list[LossConfig]:
    """Every registered loss, once per reduction if it has that field.

    Args:
        values: of further fields; losses without one of these fields are skipped.
    """
    made = []
    for config_cls in LOSS_CONFIG_REGISTRY.values():
        known = {f.name for f in fields(config_cls)}
        if not set(values) <= known:
            continue
        # TEParallelCrossEntropy has the module of MaskedCrossEntropy without one field.
        chosen = reductions[:1] if config_cls is TEParallelCEConfig else reductions
        made += [config_cls(**values, reduction=r) for r in chosen] if "reduction" in known else [config_cls(**values)]
        if "divergence" in known and "divergence" not in values:
            # KL(student || teacher) is KL(teacher || student) with the roles exchanged.
            made.append(config_cls(**values, divergence="jsd", beta=0.3))
    return made


class _Stacked(nn.Module):
    """A loss with several results, stacked along a new first axis."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return as_one(self.loss(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(super().__getattr__("loss"), name) if name != "loss" else super().__getattr__(name)


def built(config: LossConfig, flag: str) -> Any:
    """The built loss, with a single tensor as its result."""
    loss = config.build(backend=flag)
    return _Stacked(loss) if isinstance(config, LogProbsConfig | FusedLinearLogProbsConfig) else loss


def name_of(config: LossConfig) -> str:
    """Such as "MaskedCrossEntropy-mean", "KDLoss-jsd"."""
    name = next(name for name, config_cls in LOSS_CONFIG_REGISTRY.items() if type(config) is config_cls)
    return "-".join([name, *(getattr(config, f) for f in ("reduction", "divergence") if hasattr(config, f))])


def cells(configs: Iterable[LossConfig], flags: Iterable[str] | None = None, *, interpreted: bool = True) -> Any:
    """Parametrise a test over (flag, config), with ids such as "torch:eager-KDLoss".

    Args:
        flags: None for all usable flags. Tests of a named flag that is not usable fail.
        interpreted: whether to include Triton's kernels, which are slow in its interpreter.
    """
    usable = usable_flags()
    return pytest.mark.parametrize(
        ("flag", "config"),
        [
            # Those that compile at the first call do so for each kind of input.
            pytest.param(flag, config, id=f"{flag}-{name_of(config)}", marks=[SLOW] * (flag in COMPILED_AT_FIRST_CALL))
            for flag, config in itertools.product(usable if flags is None else flags, configs)
            # `auto` only chooses among the others.
            if (flag != "torch" or getattr(config, "reduction", "mean") == "mean")
            and (interpreted or flag != interpreter.FLAG)
            and (flag not in usable or _serves(flag, config))
        ],
    )


def _serves(flag: str, config: LossConfig) -> bool:
    if flag == interpreter.FLAG and not flag_status(flag).usable:
        return True
    try:
        config.build(backend=flag)
    except BackendUnavailable:
        return False
    return True


def takes(config: LossConfig, argument: str) -> bool:
    """Whether a loss accepts an argument, given by its name or kind, with this config."""
    return need_definition(config).accepts(config, argument)


def over_hidden_states(config: LossConfig) -> bool:
    """Whether a loss computes its logits from hidden states and weights."""
    return bool(need_definition(config).products)


def reduction_of(config: LossConfig) -> str:
    """ "sum", "mean" or "none": the shape of labels."""
    return need_definition(config).reduction(config)


def count_of(config: LossConfig, value: Any) -> dict[str, Any]:
    """The count argument under its name in this loss; empty if it accepts none."""
    found = need_definition(config).find("count")
    return {found.name: value} if found is not None and takes(config, "count") else {}


def weights_of(config: LossConfig, value: Tensor) -> dict[str, Any]:
    """loss_weights, with a count if required; empty if the loss accepts none."""
    found = next((a for a in need_definition(config).arguments if a.name == "loss_weights"), None)
    if found is None or not takes(config, found.name):
        return {}
    return {found.name: value} | (count_of(config, 4) if found.with_count else {})


def inputs(
    config: LossConfig,
    lead: tuple[int, ...] = (2, 3),
    vocab: int = 11,
    hidden: int = 5,
    *,
    dtype: torch.dtype = torch.float32,
    ignored: int = 3,
    seed: int = 0,
    requires_grad: bool = True,
) -> dict[str, Tensor]:
    """Draw the required arguments of a loss.

    Args:
        lead: shape of labels.
        ignored: every ignored-th label is ignore_index, starting with the first; 0 for none.
    """
    g = torch.Generator().manual_seed(seed)
    sizes = Sizes(lead, vocab, hidden)
    made = {}
    for argument in need_definition(config).arguments:
        shape = sizes.shape(argument.dims)
        if argument.optional:
            continue
        if argument.draw is not None:
            drawn = torch.from_numpy(argument.draw(shape, vocab, np.random.default_rng(seed)))
            floating = argument.kind == "float"
            made[argument.name] = drawn.to(dtype).requires_grad_(requires_grad) if floating else drawn
        elif argument.kind == "float":
            made[argument.name] = torch.randn(shape, generator=g).to(dtype).requires_grad_(requires_grad)
        else:
            made[argument.name] = torch.randint(0, max(vocab, 1), shape, generator=g)
            if ignored:
                made[argument.name].view(-1)[::ignored] = config.ignore_index
    return made


def leaves(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The arguments that require a gradient."""
    return {k: x for k, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}


def per_token(config: LossConfig, name: str) -> bool:
    """Whether an argument has one row per token."""
    return any(a.name == name and a.dims[:1] == ("T",) for a in need_definition(config).arguments)


def run(loss: Callable[..., Tensor], arguments: Mapping[str, Any], upstream: Any = None) -> dict[str, Tensor]:
    """The loss and its gradients by name; upstream None: values that differ between tokens."""
    value = as_one(loss(**arguments))
    if upstream is None:
        ones = torch.ones_like(value).reshape(-1)
        upstream = (0.5 + ones.cumsum(0) / max(ones.numel(), 1)).reshape(value.shape)
    elif not isinstance(upstream, Tensor):
        upstream = torch.full_like(value, upstream)
    wanted = leaves(arguments)
    grads = torch.autograd.grad(value, list(wanted.values()), upstream.to(value).expand_as(value))
    return {"loss": value.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], **tolerance: Any) -> None:
    """Assert that tensors by name are close; bitwise equal with rtol=0, atol=0."""
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def names_plain(error: BaseException | None) -> bool:
    """Whether the message of an error, or of its causes, names torch:plain."""
    seen = set()
    while error is not None and id(error) not in seen:
        if PLAIN in str(error):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def right_or_names_plain(flag: str, call: Callable[[], None]) -> None:
    """Run a test's call: it passes or, for other flags than torch:plain, raises an error that names torch:plain.

    An AssertionError always fails the test.
    """
    try:
        call()
    except AssertionError:
        raise
    except Exception as error:
        if flag == PLAIN or not names_plain(error):
            raise
