"""The losses of the calls of a step add up to that of the full batch, if each call divides by the count of the step."""

import pytest
from hypothesis import given

from helpers.normalisation import assert_adds_up, losses, repeatable, steps
from loss_core import LOSS_CONFIG_REGISTRY, BackendUnavailable
from loss_core.dispatch.flags import load_backend


@losses()
@pytest.mark.parametrize("flag", ["torch:plain", "torch:eager"])
@repeatable
@given(step=steps())
def test_losses_of_calls_add_up(flag, loss, step):
    try:
        LOSS_CONFIG_REGISTRY[loss]().build(backend=flag)
    except BackendUnavailable as error:
        pytest.skip(str(error))

    def call(config, arrays, grad_of, upstream):
        found = load_backend("torch").evaluate(
            config.build(backend=flag), arrays, dtype="float64", upstream=upstream, grad_of=grad_of
        )
        return {"loss": found.loss, **found.grads}

    assert_adds_up(loss, step, call)
