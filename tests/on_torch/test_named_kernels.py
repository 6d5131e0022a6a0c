"""A flag that names a kernel runs it for every input: torch:eager is never PyTorch's own cross entropy.

What ran is observed where it runs, not read from the module that was asked.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.torch_calls import cells, configs, count_of, inputs, over_hidden_states, run
from loss_core.dispatch.observed import names, observing

SIZES = {
    "one": {"lead": (1,), "vocab": 2, "hidden": 1},
    "64x1000": {"lead": (64,), "vocab": 1000, "hidden": 8},
    "16x32000": {"lead": (16,), "vocab": 32000, "hidden": 4},
}
every_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
# Operations of F.cross_entropy, F.kl_div and log_softmax.
OF_PYTORCH = ("log_softmax", "_softmax", "nll_loss", "cross_entropy", "kl_div")


class Operations(TorchDispatchMode):
    """Names of the operations that a call dispatches."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def of_pytorch(call):
    with Operations() as operations:
        call()
    assert operations.names
    return {name for name in operations.names if name.startswith("aten::") and any(part in name for part in OF_PYTORCH)}


@every_size
@pytest.mark.parametrize("ignored", [0, 3], ids=["none-ignored", "some-ignored"])
@cells(configs(), flags=["torch:eager"])
def test_eager_runs_none_of_pytorchs_losses(flag, config, size, ignored):
    loss = config.build(backend=flag)
    arguments = inputs(config, **size, ignored=ignored)
    assert not of_pytorch(lambda: run(loss, arguments))
    assert not of_pytorch(lambda: loss(**inputs(config, **size, ignored=ignored, requires_grad=False)))
    assert not of_pytorch(lambda: loss(**arguments, **count_of(config, 3)))


@every_size
@cells(configs(), flags=["torch:plain"])
def test_plain_runs_pytorchs_own_functions(flag, config, size):
    loss = config.build(backend=flag)
    assert of_pytorch(lambda: run(loss, inputs(config, **size)))


@cells(configs())
def test_the_kernel_that_runs_is_the_one_that_was_named_or_chosen(flag, config):
    loss = config.build(backend=flag)
    for options in (
        {"lead": (1,), "vocab": 2},
        {"ignored": 0},
        {"ignored": 3},
        {"ignored": 1},
        {"dtype": torch.bfloat16},
    ):
        arguments = inputs(config, **options)
        with observing() as training:
            run(loss, arguments)
        with observing() as evaluation, torch.no_grad():
            loss(**arguments)
        expected = flag if flag != "torch" else chosen(loss, arguments)
        assert (names(training), names(evaluation)) == (expected, expected), options


@cells(configs(), flags=["torch"])
def test_auto_runs_the_kernel_that_kernel_for_returns(flag, config):
    loss = config.build(backend=flag)
    for size in ({"lead": (2,), "vocab": 5}, {"lead": (64,), "vocab": 1000}, {"lead": (300,), "vocab": 8000}):
        arguments = inputs(config, **size)
        with observing() as seen:
            run(loss, arguments)
        assert names(seen) == chosen(loss, arguments)


def chosen(loss, arguments):
    """The flag that kernel_for returns for a call."""
    first = next(iter(arguments.values()))
    weight = arguments.get("lm_weight", arguments.get("student_lm_weight"))
    sizes = first.shape[-1:] if weight is None else weight.shape
    return loss.kernel_for(first.device, first.dtype, (arguments["labels"].numel(), *sizes)).flag


@cells(configs())
def test_a_named_kernel_is_the_choice_for_every_call(flag, config):
    if flag == "torch":
        pytest.skip("auto chooses by data")
    loss = config.build(backend=flag)
    assert loss.kernel_choice.flag == flag
    for shape in ((1, 1, 1), (64, 1000, 8), (8192, 128256, 4096)):
        shape = shape if over_hidden_states(config) else shape[:2]
        for dtype in (torch.float32, torch.bfloat16):
            assert loss.kernel_for(torch.device("cpu"), dtype, shape).flag == flag
