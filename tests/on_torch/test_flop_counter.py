"""PyTorch's FlopCounterMode counts every product of a fused loss, whichever library computes it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers.torch_calls import built, cells, configs, inputs, reduction_of, run, takes

FUSED = [config for config in configs() if takes(config, "lm_weight")]
T, V, H = 48, 160, 32
PRODUCT = 2 * T * H * V


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def arguments_of(config, dtype=torch.float32):
    return inputs(config, (T,), V, H, dtype=dtype, ignored=0)


def computed_again(config):
    """Whether the backward may recompute the logits: where the upstream gradient is not a scalar."""
    return reduction_of(config) == "none"


# Larger sizes, too: the library may depend on the size.
@pytest.mark.parametrize("scale", [1, 8], ids=["small", "large"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["float32", "bfloat16", "float64"]
)
@cells(FUSED)
def test_training(flag, config, dtype, scale):
    loss = built(config, flag)
    arguments = inputs(config, (T * scale,), V * scale, H, dtype=dtype, ignored=0)
    products = flops(lambda: run(loss, arguments)) / (PRODUCT * scale**2)
    # Logits, and both gradients.
    assert products in ((3, 4) if computed_again(config) else (3,))


@cells(FUSED, interpreted=False)
def test_evaluation(flag, config):
    loss = built(config, flag)
    with torch.no_grad():
        assert flops(lambda: loss(**arguments_of(config))) == PRODUCT


@cells(FUSED, interpreted=False)
def test_a_frozen_head(flag, config):
    loss = built(config, flag)
    arguments = arguments_of(config)
    arguments["lm_weight"] = arguments["lm_weight"].detach()
    assert flops(lambda: run(loss, arguments)) / PRODUCT in ((2, 3) if computed_again(config) else (2,))
