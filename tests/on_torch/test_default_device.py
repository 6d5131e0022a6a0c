"""The caller's default device has no effect on tensors that are on another one."""

import contextlib

import pytest
import torch

from helpers.torch_calls import assert_same, built, cells, configs, count_of, inputs, run, takes


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


WAYS = {"set_default_device": default_device, "with torch.device": torch.device}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def every_argument(config):
    arguments = inputs(config) | count_of(config, 3)
    for name in ("mask", "loss_weights"):
        if takes(config, name):
            arguments[name] = torch.linspace(0.5, 1.5, 6).view(2, 3)
    return arguments


CALLS = {
    "every argument": every_argument,
    "none ignored": lambda config: inputs(config, ignored=0),
    "all ignored": lambda config: inputs(config, ignored=1),
    "a tensor as count": lambda config: inputs(config) | count_of(config, torch.tensor(3)),
}


@every_way
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@cells(configs())
def test_calls_on_a_cpu(flag, config, call, way):
    arguments, loss = call(config), built(config, flag)
    expected = run(loss, arguments, 1.0)
    with way("meta"):
        got = run(loss, arguments, 1.0)
    assert_same(got, expected, rtol=0, atol=0)


@every_way
@cells(configs(), interpreted=False)
def test_losses_built_and_evaluated_under_it(flag, config, way):
    arguments = inputs(config, requires_grad=False)
    expected = built(config, flag)(**arguments)
    with way("meta"):
        value = built(config, flag)(**arguments)
    assert torch.equal(value, expected)


@cells(configs(), flags=["torch", "torch:plain", "torch:eager"])
def test_a_default_dtype_of_float64(flag, config):
    arguments = inputs(config)
    loss = built(config, flag)
    expected = run(loss, arguments, 1.0)
    torch.set_default_dtype(torch.float64)
    try:
        got = run(loss, arguments, 1.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(got, expected, rtol=0, atol=0)
