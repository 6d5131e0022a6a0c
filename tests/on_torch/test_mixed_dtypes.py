"""16-bit hidden states with a float32 head, outside of autocast, as under FSDP2's bfloat16 policy.

The products are in the hidden states' dtype; the gradient of the head is float32 and summed in float32. Every other
difference of dtypes is an error that says so.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from helpers.torch_calls import built, cells, configs, count_of, inputs, run, takes

FUSED = [config for config in configs() if takes(config, "lm_weight")]
ENTROPIES = [config for config in FUSED if hasattr(config, "reduction")]
SIXTEEN = {"bfloat16": torch.bfloat16, "float16": torch.float16}
every_16_bits = pytest.mark.parametrize("dtype", SIXTEEN.values(), ids=SIXTEEN)
ALL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TAKEN = [(a, a) for a in ALL] + [(a, torch.float32) for a in SIXTEEN.values()]
REFUSED = [pair for pair in itertools.product(ALL, ALL) if pair not in TAKEN]


def mixed(config, dtype, lead=(2, 3), vocab=11, hidden=5, **options):
    """Arguments with 16-bit hidden states and a float32 head whose values are not representable in 16 bits."""
    arguments = inputs(config, lead, vocab, hidden, **options)
    arguments["hidden_states"] = arguments["hidden_states"].detach().to(dtype).requires_grad_()
    return arguments


def by_definition(config, arguments, upstream=1.0):
    """Loss and gradients in float64, the head rounded to the hidden states' dtype only for the products."""
    hidden = arguments["hidden_states"].detach().double().requires_grad_()
    weight = arguments["lm_weight"].detach().to(arguments["hidden_states"].dtype).double().requires_grad_()
    logits = (hidden @ weight.T).flatten(0, -2)
    loss = F.cross_entropy(
        logits, arguments["labels"].flatten(), reduction=config.reduction, ignore_index=config.ignore_index
    )
    grads = torch.autograd.grad(loss, (hidden, weight), torch.full_like(loss, upstream))
    return {"loss": loss.detach(), "hidden_states": grads[0], "lm_weight": grads[1]}


@every_16_bits
@cells(ENTROPIES)
def test_values_and_gradients(flag, config, dtype):
    arguments = mixed(config, dtype)
    got = run(built(config, flag), arguments, 0.75)
    expected = by_definition(config, arguments, 0.75)
    assert [got[name].dtype for name in ("loss", "hidden_states", "lm_weight")] == [torch.float32, dtype, torch.float32]
    torch.testing.assert_close(got["loss"].flatten(), expected["loss"].float().flatten(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["hidden_states"], expected["hidden_states"].to(dtype), rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(got["lm_weight"], expected["lm_weight"].float(), rtol=1e-5, atol=1e-5)


@every_16_bits
@cells(ENTROPIES)
def test_the_gradient_of_the_head_is_summed_in_float32(flag, config, dtype):
    # So many tokens that a sum in 16 bits would lose two digits, and blocks of tokens that are added up.
    arguments = mixed(config, dtype, (1500,) if flag != "torch:triton" else (100,), 37, 8)
    got = run(built(config, flag), arguments, 1.0)
    expected = by_definition(config, arguments)["lm_weight"]
    error = (got["lm_weight"].double() - expected).abs().max() / expected.abs().max()
    assert error < 1e-5
    rounded = got["lm_weight"].to(dtype).float()
    assert (got["lm_weight"] != rounded).float().mean() > 0.5, "every element is a number of 16 bits"


@every_16_bits
@cells(FUSED, interpreted=False)
def test_evaluation(flag, config, dtype):
    arguments = mixed(config, dtype)
    loss = built(config, flag)
    with torch.no_grad():
        torch.testing.assert_close(
            loss(**arguments), loss(**arguments | {"lm_weight": arguments["lm_weight"].to(dtype)})
        )


@every_16_bits
@cells(FUSED, interpreted=False)
def test_one_of_the_two_frozen(flag, config, dtype):
    loss = built(config, flag)
    arguments = mixed(config, dtype)
    expected = run(loss, arguments)
    for name in ("hidden_states", "lm_weight"):
        got = run(loss, arguments | {name: arguments[name].detach()})
        for key, value in got.items():
            torch.testing.assert_close(value, expected[key])


@every_16_bits
@cells(FUSED, interpreted=False)
def test_counts_and_all_ignored(flag, config, dtype):
    loss = built(config, flag)
    for extras, ignored in ((count_of(config, 0), 3), ({}, 1)):
        if ignored == 3 and not extras:
            continue
        got = run(loss, mixed(config, dtype, ignored=ignored) | extras)
        assert got["lm_weight"].dtype == torch.float32
        assert not any(value.any() for value in got.values())


@pytest.mark.slow
@every_16_bits
@cells(FUSED, flags=["torch", "torch:plain", "torch:eager"])
def test_in_torch_compile(flag, config, dtype):
    loss = built(config, flag)
    arguments = mixed(config, dtype)
    expected = run(loss, arguments)
    got = run(torch.compile(loss, backend="aot_eager", fullgraph=True), arguments)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        torch.testing.assert_close(got[name], value)
    torch._dynamo.reset()


@pytest.mark.parametrize(("hidden", "weight"), REFUSED, ids=lambda dtype: str(dtype).removeprefix("torch."))
@cells(FUSED, interpreted=False)
def test_other_differences_are_refused(flag, config, hidden, weight):
    arguments = inputs(config)
    arguments["hidden_states"] = arguments["hidden_states"].to(hidden)
    arguments["lm_weight"] = arguments["lm_weight"].to(weight)
    with pytest.raises(TypeError, match=rf"hidden_states is {hidden} but lm_weight is {weight}"):
        built(config, flag)(**arguments)
