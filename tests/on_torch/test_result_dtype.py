"""The dtype of a loss depends only on its logits and on fp32_upcast."""

import itertools

import pytest
import torch

from helpers.torch_calls import cells, configs, count_of, every_dtype, inputs, leaves, takes, weights_of

COUNTS = {
    "number": 3,
    "float": 3.0,
    "float64": torch.tensor(3.0, dtype=torch.float64),
    "float16": torch.tensor(3.0, dtype=torch.float16),
    "int64": torch.tensor(3),
    "int32": torch.tensor(3, dtype=torch.int32),
}
every_count = pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
COUNTED = [config for config in configs() if count_of(config, 1)]


def wanted(config, dtype):
    if not getattr(config, "fp32_upcast", True):
        return dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


@every_count
@every_dtype
@cells(COUNTED)
def test_a_count_of_any_dtype(flag, config, dtype, count):
    loss = config.build(backend=flag)
    counts = count_of(config, count)
    training = loss(**inputs(config, dtype=dtype), **counts)
    frozen = inputs(config, dtype=dtype, requires_grad=False)
    with torch.no_grad():
        ungraded = loss(**inputs(config, dtype=dtype), **counts)
    values = [training, loss(**frozen, **counts), ungraded]
    assert [value.dtype for value in values] == [wanted(config, dtype)] * 3
    # The same loss for every type of count.
    for value in values:
        torch.testing.assert_close(value.detach(), loss(**frozen, **count_of(config, 3)))


@every_dtype
@cells(configs(fp32_upcast=False), interpreted=False)
def test_a_count_of_float64_without_upcast(flag, config, dtype):
    loss = config.build(backend=flag)
    for requires_grad in (True, False):
        counts = count_of(config, COUNTS["float64"])
        assert loss(**inputs(config, dtype=dtype, requires_grad=requires_grad), **counts).dtype == dtype


@pytest.mark.parametrize("given", [torch.float64, torch.int64, torch.float16], ids=["float64", "int64", "float16"])
@cells([config for config in configs() if takes(config, "loss_weights") or takes(config, "mask")], interpreted=False)
def test_other_arguments_of_any_dtype(flag, config, given):
    loss = config.build(backend=flag)
    for argument in ("loss_weights", "mask"):
        for dtype, requires_grad in itertools.product((torch.float32, torch.bfloat16), (True, False)):
            arguments = inputs(config, dtype=dtype, requires_grad=requires_grad)
            ones = torch.ones(arguments["labels"].shape, dtype=given)
            if argument == "loss_weights":
                arguments |= weights_of(config, ones)
            elif takes(config, argument):
                arguments[argument] = ones
            assert loss(**arguments).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("requires_grad", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("count", [COUNTS["float64"], COUNTS["int64"]], ids=["float64", "int64"])
@cells(COUNTED, flags=["torch", "torch:plain", "torch:eager"])
def test_in_torch_compile(flag, config, count, requires_grad):
    loss = torch.compile(config.build(backend=flag), backend="aot_eager", fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        value = loss(**inputs(config, dtype=dtype, requires_grad=requires_grad), **count_of(config, count))
        assert value.dtype == torch.float32
    torch._dynamo.reset()


@every_dtype
@cells(COUNTED, interpreted=False)
def test_gradients_keep_the_dtype_of_their_input(flag, config, dtype):
    arguments = inputs(config, dtype=dtype)
    config.build(backend=flag)(**arguments, **count_of(config, COUNTS["float64"])).backward()
    assert {name: x.grad.dtype for name, x in leaves(arguments).items()} == dict.fromkeys(leaves(arguments), dtype)
