"""No vocabulary (V = 0) or no hidden dimension (H = 0): the same error in training and evaluation, for all labels."""

import re

import pytest
import torch

from helpers.torch_calls import built, cells, configs, inputs, over_hidden_states

FUSED = [config for config in configs() if over_hidden_states(config)]
OVER_LOGITS = [config for config in configs() if not over_hidden_states(config)]


def every_call(of):
    """Parameters: all flags and the configs `of`, in training or not, with no, some or all tokens ignored."""

    def with_parameters(test):
        test = pytest.mark.parametrize("ignored", [0, 2, 1], ids=["none-ignored", "some-ignored", "all-ignored"])(test)
        test = pytest.mark.parametrize("requires_grad", [True, False], ids=["training", "evaluation"])(test)
        return cells(of, interpreted=False)(test)

    return with_parameters


def refusal(flag, config, ignored, requires_grad, **sizes):
    """The error message of the loss for inputs of these sizes."""
    with pytest.raises(ValueError, match="must not be empty") as caught:
        built(config, flag)(**inputs(config, (4,), ignored=ignored, requires_grad=requires_grad, **sizes))
    return str(caught.value)


@every_call(OVER_LOGITS)
def test_no_vocabulary(flag, config, ignored, requires_grad):
    said = refusal(flag, config, ignored, requires_grad, vocab=0)
    assert re.fullmatch(
        r"(student_)?logits has shape \(4, 0\): the vocabulary \(last dimension\) must not be empty\.", said
    )


@every_call(FUSED)
def test_no_hidden_dimension(flag, config, ignored, requires_grad):
    said = refusal(flag, config, ignored, requires_grad, hidden=0)
    assert re.fullmatch(r"(student_)?hidden_states has shape \(4, 0\): the hidden dimension must not be empty\.", said)


@every_call(FUSED)
def test_a_head_without_vocabulary(flag, config, ignored, requires_grad):
    said = refusal(flag, config, ignored, requires_grad, vocab=0)
    assert re.search(r"lm_weight has shape \(0, 5\).* must not be empty", said)


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
