"""No vocabulary (V = 0) or no hidden dimension (H = 0): one error that says so, whatever the call is for."""

import re

import pytest
import torch

from helpers.torch_calls import built, cells, configs, inputs, over_hidden_states

FUSED = [config for config in configs() if over_hidden_states(config)]
OVER_LOGITS = [config for config in configs() if not over_hidden_states(config)]
every_use = pytest.mark.parametrize("requires_grad", [True, False], ids=["training", "evaluation"])
every_share = pytest.mark.parametrize("ignored", [0, 2, 1], ids=["none-ignored", "some-ignored", "all-ignored"])


def message(name, what):
    return "^" + re.escape(f"{name} has shape (4, 0): the {what} must not be empty.")


@every_use
@every_share
@cells(OVER_LOGITS, interpreted=False)
def test_no_vocabulary(flag, config, ignored, requires_grad):
    arguments = inputs(config, (4,), vocab=0, ignored=ignored, requires_grad=requires_grad)
    name = next(name for name in arguments if name in ("logits", "student_logits"))
    with pytest.raises(ValueError, match=message(name, "vocabulary (last dimension)")):
        built(config, flag)(**arguments)


@every_use
@every_share
@cells(FUSED, interpreted=False)
def test_no_hidden_dimension(flag, config, ignored, requires_grad):
    arguments = inputs(config, (4,), hidden=0, ignored=ignored, requires_grad=requires_grad)
    name = next(name for name in arguments if name.endswith("hidden_states"))
    with pytest.raises(ValueError, match=message(name, "hidden dimension")):
        built(config, flag)(**arguments)


@every_use
@every_share
@cells(FUSED, interpreted=False)
def test_a_head_without_vocabulary(flag, config, ignored, requires_grad):
    arguments = inputs(config, (4,), vocab=0, ignored=ignored, requires_grad=requires_grad)
    with pytest.raises(ValueError, match=r"lm_weight has shape \(0, 5\).* must not be empty"):
        built(config, flag)(**arguments)


@cells(configs(), interpreted=False)
def test_no_tokens_are_no_error(flag, config):
    arguments = inputs(config, (0,))
    loss = built(config, flag)(**arguments)
    loss.sum().backward()
    assert not loss.any()
    for x in arguments.values():
        if x.requires_grad:
            assert x.grad is not None
            assert not x.grad.any()
    torch.testing.assert_close(loss, torch.zeros_like(loss))
