"""Invalid token counts: an error that names the value, for a number and for a tensor."""

import pytest
import torch

from helpers.torch_calls import cells, configs, count_of, inputs

COUNTED = [config for config in configs() if count_of(config, 1)]
WRONG = {
    "minus-1": -1,
    "minus-half": -0.5,
    "nan": float("nan"),
    "int64": torch.tensor(-3),
    "int32": torch.tensor(-3, dtype=torch.int32),
    "float32": torch.tensor(-2.5),
    "float64": torch.tensor(-2.5, dtype=torch.float64),
    "nan-tensor": torch.tensor(torch.nan),
    "minus-inf": torch.tensor(-torch.inf),
}


@pytest.mark.parametrize("requires_grad", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("count", WRONG.values(), ids=WRONG)
@cells(COUNTED, interpreted=False)
def test_negative_and_nan(flag, config, count, requires_grad):
    arguments = inputs(config, requires_grad=requires_grad)
    (name,) = count_of(config, 1)
    value = str(float(count)).removesuffix(".0")
    with pytest.raises(ValueError, match=rf"^{name} must be >= 0, got .*{value}"):
        config.build(backend=flag)(**arguments, **{name: count})


@pytest.mark.parametrize("count", [float("inf"), torch.tensor(torch.inf)], ids=["number", "tensor"])
@cells(COUNTED, interpreted=False)
def test_an_infinite_count_is_treated_alike_as_number_and_tensor(flag, config, count):
    # The same loss, or the same error.
    outcomes = []
    for given in (count, torch.tensor(torch.inf), float("inf")):
        try:
            outcomes.append(config.build(backend=flag)(**inputs(config), **count_of(config, given)).item())
        except ValueError as error:
            outcomes.append(type(error))
    assert len(set(map(str, outcomes))) == 1, outcomes


@pytest.mark.slow
@cells(COUNTED, flags=["torch", "torch:plain", "torch:eager"])
def test_under_a_trace_the_loss_is_nan(flag, config):
    # There it is not readable: never a silent finite loss.
    compiled = torch.compile(config.build(backend=flag), backend="aot_eager", fullgraph=True)
    for count in (torch.tensor(-3), torch.tensor(torch.nan)):
        assert compiled(**inputs(config), **count_of(config, count)).isnan()
    torch._dynamo.reset()
