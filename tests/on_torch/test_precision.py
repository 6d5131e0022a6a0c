"""Settings for reduced-precision float32 products have no effect on a loss."""

import contextlib

import pytest
import torch

from helpers.torch_calls import assert_same, cells, configs, inputs, run


@contextlib.contextmanager
def matmul_precision(value):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def attribute(where, name, value):
    before = getattr(where, name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, before)


SWITCHES = {
    "high": lambda: matmul_precision("high"),
    "medium": lambda: matmul_precision("medium"),
    "mkldnn-bf16": lambda: attribute(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "mkldnn-tf32": lambda: attribute(torch.backends.mkldnn.matmul, "fp32_precision", "tf32"),
    "cuda-allow-tf32": lambda: attribute(torch.backends.cuda.matmul, "allow_tf32", True),
}
SIZES = {"small": ((6,), 11, 5), "blocks": ((96,), 512, 64)}
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def state():
    """The values of the settings."""
    return torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
@cells(configs())
def test_bitwise_the_same_loss_and_gradients(flag, config, switch, size):
    loss = config.build(backend=flag)
    arguments = inputs(config, *size)
    expected = run(loss, arguments)
    with switch():
        before = state()
        got = run(loss, arguments)
        assert state() == before
    assert_same(got, expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["medium", "mkldnn-bf16"])
# Not torch:plain, whose products are in the graph: the compiler may apply a setting to them.
@cells(configs(["mean"]), flags=["torch", "torch:eager"])
def test_in_torch_compile(flag, config, switch):
    loss = torch.compile(config.build(backend=flag), backend="aot_eager", fullgraph=True)
    arguments = inputs(config, *SIZES["blocks"])
    expected = run(loss, arguments)
    with SWITCHES[switch]():
        got = run(loss, arguments)
    assert_same(got, expected, rtol=0, atol=0)
    torch._dynamo.reset()


@cells(configs(["sum"]), interpreted=False)
def test_an_error_restores_the_settings(flag, config):
    loss = config.build(backend=flag)
    with matmul_precision("high"):
        before = state()
        with pytest.raises(ValueError, match="labels has shape"):
            loss(**inputs(config) | {"labels": torch.zeros(7, dtype=torch.int64)})
        assert state() == before


@ON_GPU
@pytest.mark.parametrize("switch", ["high", "cuda-allow-tf32"])
@cells(configs(), interpreted=False)
def test_on_a_gpu(flag, config, switch):
    loss = config.build(backend=flag)
    arguments = {
        name: x.detach().cuda().requires_grad_(x.requires_grad) for name, x in inputs(config, *SIZES["blocks"]).items()
    }
    expected = run(loss, arguments)
    with SWITCHES[switch]():
        got = run(loss, arguments)
    assert_same(got, expected, rtol=0, atol=0)
